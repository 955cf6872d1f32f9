"""Render the ``Example:`` sections of docstrings as code.

The docstrings follow Google's style, which allows ``Example:`` and ``Examples:``. Griffe, which
reads them for the site, knows the second as a section of code and takes the first for a note.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class DocstringExamples(griffe.Extension):
    """Rename the sections while the source is read. The source files stay as they are."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls this for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
