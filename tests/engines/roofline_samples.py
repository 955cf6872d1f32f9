"""Bundles with costs for the tests of the roofline, and its table as text."""

from __future__ import annotations

import io

from rich.console import Console

from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.bundle.manifest import Cost
from hipa_deploy.engines.latency.roofline import Roofline, render_roofline

COSTS = {
    "unet": Cost(flops=34_000_000_000, weight_bytes=40_000_000, io_bytes=800_000),
    "vae_decoder": Cost(flops=1_000_000, weight_bytes=100_000_000, io_bytes=2_000_000),
}


def with_costs(bundle: Bundle) -> Bundle:
    """Write ``COSTS`` into the manifest, as the export does."""
    stages = []
    for stage in bundle.manifest.stages:
        stages.append(stage.model_copy(update={"cost": COSTS[stage.spec.name]}))
    manifest = bundle.manifest.model_copy(update={"stages": tuple(stages)})
    (bundle.root / MANIFEST).write_text(manifest.model_dump_json())
    return Bundle.open(bundle.root)


def shown(roofline: Roofline) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render_roofline(roofline))
    return console.file.getvalue()
