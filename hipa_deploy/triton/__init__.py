"""A bundle as a model repository of NVIDIA's Triton Inference Server, and the model that runs it.

May import the core and ``hipa_deploy.engines.store``. Triton's own module is imported in
``python_model`` alone, which nothing but Triton imports.
"""
