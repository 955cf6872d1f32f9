"""Images of the prompts of a large table, in shards: in one process, or on a Ray cluster.

May import the core, the bundles and the pipeline, and ``hipa_deploy.serve.cluster`` to join Ray.
Ray is imported in ``ray_shards`` alone, when a function there is called.
"""
