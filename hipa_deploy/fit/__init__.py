"""What suits a device: the options that ``--for TARGET`` sets, and whether a model will fit there.

May import: the core, ``export`` where it needs no torch, and ``engines``. It never imports torch.
"""
