"""The generation parameters of an image: all that reproduces it. A PNG carries them as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hipa_deploy.bundle.adaptor_swap import AdaptorSwap, loaded_unet_sha256
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import BUNDLE as EMBEDDED_BUNDLE
from hipa_deploy.embedded import NAME as EMBEDDED_NAME


def image_parameters(
    bundle: Bundle,
    backend: str,
    swap: AdaptorSwap | None,
    prompt: str,
    seed: int,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """All that reproduces an image.

    Args:
        bundle: that made it.
        backend: that ran the stages, not 'auto'.
        swap: the adaptor that was swapped in; None: the bundle's own.
        prompt: of the image.
        seed: of the image.
        facts: what else was asked for, such as its size.

    """
    manifest = bundle.manifest
    adaptor = manifest.adaptor
    loras = manifest.loras
    if swap:
        adaptor = swap.manifest.adaptor
        loras = swap.manifest.loras
    # Images of a bundle without LoRAs have the parameters that they always had.
    added = {"loras": [lora.model_dump(mode="json") for lora in loras]} if loras else {}
    return {
        "producer": manifest.producer,
        "prompt": prompt,
        "seed": seed,
        **facts,
        "backend": backend,
        "precision": manifest.precision,
        "base_model": manifest.base_model.sha256,
        "adaptor": adaptor.sha256 if adaptor else None,
        **added,
        "unet": loaded_unet_sha256(bundle, swap),
        "bundle": bundle.sha256,
        "bundle_name": _name_of(bundle),
    }


def _name_of(bundle: Bundle) -> str:
    """What a user calls the bundle, without the folder that it lies in."""
    root = bundle.root.resolve()
    return EMBEDDED_NAME if root == EMBEDDED_BUNDLE.resolve() else root.name
