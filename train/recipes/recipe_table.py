"""The base of every table of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

CODE = r"[\w.]+:\w+"  # a user's own code, as 'module:function'


class Settings(BaseModel):
    """Frozen; an unknown key is an error; the text under a field becomes its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
