"""An adaptor or a bundle as a repository of the Hugging Face hub: its folder, card and upload.

May import ``models``, ``bundle``, ``embedded``, ``disk``. It imports no torch: weights are copied
byte by byte.
"""
