"""A draft becomes the base model's own image: many guided steps from the draft's noise.

May import: ``hipa_deploy.generate`` and what that may import.
"""
