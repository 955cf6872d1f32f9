"""``hipa-demo``: the whole chain on the embedded model, and each task with its embedded adaptor.

May import: everything but ``commands``. This is the one room outside ``train`` and ``export`` that
calls both; it does so inside functions, so that the core can be imported without their libraries.
"""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # a type checker would take any name for one that exists
    from hipa_deploy.old_names import old_names

    __getattr__ = old_names(__name__)
