"""The image service on several processes and machines: replicas of each bundle, through Ray Serve.

May import ``hipa_deploy.serve``, its web, and what these may import. Ray is imported in
``ray_replicas`` and ``application``, and only when a function there is called or that module is
named to ``serve run``.
"""
