"""What a bundle's owner and a caller want done to every image before it is shown."""

from __future__ import annotations

from hipa_deploy.bundle.adaptor_swap import loaded_unet_sha256
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.generate.jobs.result import GenerateResult
from hipa_deploy.generate.jobs.withheld import Flagged
from hipa_deploy.generate.runner import Runner
from hipa_deploy.marks.marker import ImageMarker, watermark_payload
from hipa_deploy.marks.safety import Checker, SafetyChecker


def bundle_marker(bundle: Bundle, safety: Runner | None) -> ImageMarker:
    """What a bundle's owner wants done to every image, for stages that another program runs.

    Args:
        bundle: the bundle.
        safety: its safety checker's network; None where it has none.

    """
    return ImageMarker(payload_of(bundle, None), checkers_of(bundle, safety, None))


def payload_of(bundle: Bundle, watermark: bool | int | None) -> int | None:
    """The watermark's number; None for no watermark."""
    unet = loaded_unet_sha256(bundle, None)
    return watermark_payload(bundle.manifest.marks, unet, watermark)


def checkers_of(bundle: Bundle, network: Runner | None, own: Checker | None) -> tuple[Checker, ...]:
    """What sees every image: the bundle's safety checker, then the user's."""
    checkers: list[Checker] = []
    safety = bundle.manifest.safety
    if safety is not None and network is not None:
        checkers.append(SafetyChecker(network, safety.settings))
    if own is not None:
        checkers.append(own)
    return tuple(checkers)


def guarded(marker: ImageMarker, result: GenerateResult) -> GenerateResult:
    """Withhold the images that a checker flags, and watermark the others.

    Raises:
        HipaError: a checker fails.

    """
    if marker.does_nothing:
        return result
    kept = []
    flagged = []
    for i, reason in enumerate(marker.reasons(result.images_BHWC)):
        if reason is None:
            kept.append(i)
        else:
            flagged.append(Flagged(i, result.prompts[i], result.seeds[i], reason))
    return GenerateResult(
        images_BHWC=marker.mark(result.images_BHWC[kept]),
        prompts=tuple(result.prompts[i] for i in kept),
        seeds=tuple(result.seeds[i] for i in kept),
        parameters=tuple({**result.parameters[i], **marker.facts} for i in kept),
        flagged=tuple(flagged),
    )
