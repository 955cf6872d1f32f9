"""The base model's UNet, without the adaptor, as one more stage of a bundle: it refines drafts.

May import: ``hipa_deploy.export``, ``hipa_deploy.export.graph`` and the core.
"""
