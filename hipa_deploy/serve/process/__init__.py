"""The process of the image service: its command, its keys, its socket, its signals.

May import ``hipa_deploy.serve.web`` and what that may import. The command module itself imports
nothing heavy, because ``hipa --help`` imports it.
"""
