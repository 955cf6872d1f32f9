"""From prompt to image in one step: tokenizer, noise, stages, and the public pipeline.

May import: the ground, ``bundle``, ``images`` and ``embedded``. ``open_stages`` alone opens the backends of
``hipa_deploy.engines``, when it is called.
"""
