"""From a bundle's ONNX to engines: the memory plan, the worker process, the precision check.

May import: the core and the other rooms of ``engines``, but ``latency``.
"""

from typing import TYPE_CHECKING

if not TYPE_CHECKING:  # a type checker would take any name for one that exists
    from hipa_deploy.old_names import old_names

    __getattr__ = old_names(__name__)
