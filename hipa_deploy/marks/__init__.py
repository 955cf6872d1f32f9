"""What an image says about itself: parameters, provenance, signature, watermark; and its checker.

Numpy and Pillow only. It may import ``disk``, ``embedded`` and ``bundle``; c2pa-python is imported
where an image is signed.
"""
