"""What an image says about itself: parameters, provenance, signature, watermark; and its checker.

Numpy and Pillow only. It may import ``disk`` and ``embedded``; c2pa-python is imported
where an image is signed.
"""
