"""Bundles for any task that are a manifest without graphs."""

from __future__ import annotations

from pathlib import Path

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Strength
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.tasks import Task


def bundle(task: Task, **changes) -> Bundle:
    """Return the embedded bundle as if it were for a task, 64 x 64 pixels, and 16 x 16 latents."""
    manifest = Bundle.open(BUNDLE).manifest
    one_step = manifest.one_step.model_copy(update={"height": 64, "width": 64})
    changed = manifest.model_copy(update={"task": task, "one_step": one_step, **changes})
    return Bundle(Path("b"), changed)


def strengths(*values: float) -> tuple[Strength, ...]:
    """Return a manifest's entries for some strengths of an edit."""
    entries = []
    for value in values:
        entry = Strength(strength=value, timestep=round(999 * value), alpha_bar=0.5)
        entries.append(entry)
    return tuple(entries)
