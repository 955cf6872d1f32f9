"""What the parameters of a draft say about the image that is to be refined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hipa_deploy.bundle.adaptor_swap import AdaptorSwap, joint_sha256, stage_files
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.errors import HipaError, RequestError, brief
from hipa_deploy.generate.refine.refiner import refine_settings

# What a draft was asked for, and its final image is asked for too.
_CHOICES = ("height", "width", "truncate", "prompt_weights")


def draft_choices(bundle: Bundle, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``OneStepPipeline.jobs`` for the final image of a draft.

    Args:
        bundle: the bundle that refines.
        parameters: of the draft, as ``GenerateResult`` or a PNG has them.

    Raises:
        HipaError: the draft was made from another image, with another base model, or with other
            LoRAs: its final image would be one of its own.

    """
    if "task" in parameters:
        task = str(parameters["task"])[:20]
        raise HipaError(
            f"a draft was made from another image (task {task}), from which refining does not "
            "start. Expected images of a prompt alone."
        )
    base = bundle.manifest.base_model.sha256
    if parameters.get("base_model") != base:
        raise HipaError(
            f"a draft was made with another base model than that of {bundle.root}. "
            "Refine it with the bundle that made it."
        )
    own = [lora.model_dump(mode="json") for lora in bundle.manifest.loras]
    if parameters.get("loras", []) != own:
        raise HipaError(
            f"a draft was made with other LoRAs than the base model of {bundle.root} has. "
            "Refine it with a bundle that was exported with them."
        )
    return {name: parameters[name] for name in _CHOICES if name in parameters}


def check_swap(bundle: Bundle, swap: AdaptorSwap | None) -> None:
    """Check that the drafts of a swapped adaptor are of the base model that refines them.

    Raises:
        HipaError: the swap has LoRAs that the bundle's base model lacks, or lacks some of its own.

    """
    if swap is not None and swap.manifest.loras != bundle.manifest.loras:
        raise RequestError(
            f"adaptor {swap.root} has other LoRAs than the base model of {bundle.root}, so its "
            "drafts cannot be refined. Swap it out, or export a bundle with these LoRAs.",
            argument="adaptor",
            told="this adaptor has other LoRAs than its base model, so its drafts cannot be "
            "refined. Ask for the model without the adaptor.",
            owner="export one with these LoRAs",
        )


def refine_facts(bundle: Bundle, settings: RefineSettings) -> dict[str, Any]:
    """What reproduces a final image, beside the parameters of its draft."""
    refinement = bundle.manifest.refine
    assert refinement is not None  # settings were made for this bundle
    # Its noise schedule and the empty prompt's context lie in the same folder.
    files = stage_files(bundle, refinement.stage.spec.name)
    files.pop(refinement.tables, None)
    return settings.model_dump(mode="json") | {"unet": joint_sha256(files)}


def recorded_settings(bundle: Bundle, recorded: Any, where: str) -> RefineSettings:
    """The settings that an image was refined with, from its parameters.

    Args:
        bundle: that refines it again.
        recorded: the entry 'refine' of the parameters, which may be a stranger's.
        where: the image, for messages.

    Raises:
        HipaError: a damaged record, or another base UNet than the bundle's.

    """
    names = {"sampler", "steps", "guidance", "unet"}
    if not isinstance(recorded, dict) or recorded.keys() != names:
        raise HipaError(
            f"{where}: its parameters have refine={brief(recorded)}. "
            "Expected an image that hipa-generate wrote."
        )
    settings = refine_settings(bundle, recorded["steps"], recorded["guidance"], recorded["sampler"])
    if refine_facts(bundle, settings)["unet"] != recorded["unet"]:
        raise HipaError(
            f"{where} was refined with another base UNet than {bundle.root} has, and would become "
            "another picture. Give the bundle that made it."
        )
    return settings
