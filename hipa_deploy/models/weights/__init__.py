"""Weights on a disk: which files are loaded, how they are read, and what model they are.

Training, export and evaluation load every part of a model here, so they accept and refuse alike.

May import the ground. Its modules import torch, diffusers and safetensors inside functions only.
"""
