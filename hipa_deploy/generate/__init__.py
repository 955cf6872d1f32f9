"""From prompt to image in one step: tokenizer, noise, stages, and the public pipeline.

May import: the ground, ``bundle``, ``images`` and ``embedded``. ``open_stages`` and ``swap_stage``
alone import ``hipa_deploy.engines``, when they are called.
"""
