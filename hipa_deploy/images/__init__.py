"""Images in and out: reading, masks, tiles, PNG with generation parameters, a task's source image.

May import the ground (errors, interrupts, record, tasks), ``disk``, ``bundle``.
"""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # a type checker would take any name for one that exists
    from hipa_deploy.old_names import old_names

    __getattr__ = old_names(__name__)
