"""Models on a user's disk: where one is, of what kind, and the folders of adaptors and decoders.

May import the ground (errors, interrupts, record, tasks), ``disk`` and ``embedded``; torch and
diffusers only inside the functions that convert a checkpoint, fetch a model or read a
configuration.
"""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # a type checker would take any name for one that exists
    from hipa_deploy.old_names import old_names

    __getattr__ = old_names(__name__)
