"""LoRAs: read from a file in any layout, checked whole, and merged by exact arithmetic.

Training and export merge with this one room. The layouts: diffusers (old and new), peft, kohya and
LyCORIS (LoRA, LoCon, LoHa, LoKr), with DoRA, biases, an alpha a layer, and parts for text encoders.

May import the ground and ``hipa_deploy.models``. Its modules import torch, so nothing that a device
runs imports them.
"""
