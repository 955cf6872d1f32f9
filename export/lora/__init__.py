"""LoRA files as people have them: read in any layout, checked whole, merged by exact arithmetic.

The layouts: diffusers (old and new), peft, kohya and LyCORIS (LoRA, LoCon, LoHa, LoKr), with DoRA,
biases, an alpha a layer, and parts for text encoders.

May import: the core, and nothing else of ``hipa_deploy.export``.
"""
