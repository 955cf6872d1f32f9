"""Make an image once more from what its file says: ``hipa-generate --again IMAGE``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hipa_deploy.bundle.adaptor_swap import AdaptorSwap, adapted_stage, loaded_unet_sha256
from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.embedded import NAME, resolve_bundle
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.generate.runner import BACKENDS
from hipa_deploy.images.read import read_image
from hipa_deploy.marks.image_file import pixels_sha256
from hipa_deploy.marks.read_marks import FileMarks, read_marks, read_parameters

_TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "seed": (int,),
    "height": (int,),
    "width": (int,),
    "backend": (str,),
    "unet": (str,),
}
_SHOWN = 1000  # characters of a prompt in a message
_TEXTS = ("bundle", "bundle_name", "precision", "base_model", "adaptor", "watermark", "producer")


def _options_of(parameters: dict[str, Any]) -> str:
    """The options of a command with which an image was made from another image."""
    named = ["height", "width", "seed", "strength", "scale", "feather"]
    if parameters["task"] == "upscale":
        named = ["overlap"]  # its size is the image's, and no noise goes into it
    options = []
    for name in named:
        value = parameters.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            options.append(f"--{name} {value}")
    # An image without the fact is older than the option.
    if parameters["task"] == "inpaint" and parameters.get("match") is not True:
        options.append("--no-match")
    for name in ("truncate", "prompt_weights"):
        if parameters.get(name) is True:
            options.append("--" + name.replace("_", "-"))
    return " ".join(options)


@dataclass(frozen=True)
class Recipe:
    """What an image was made from.

    Attributes:
        path: of the image.
        marks: what its file says.
        parameters: of the image, each of the right type.

    """

    path: Path
    marks: FileMarks
    parameters: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read the record of an image.

        Raises:
            HipaError: there is none of this package, it is damaged, or the image was made from
                another image, which is not in the file.

        """
        parameters = read_parameters(path)
        for key, types in _TYPES.items():
            value = parameters.get(key)
            if not isinstance(value, types) or isinstance(value, bool):
                raise HipaError(
                    f"{path}: its parameters have {key}={brief(value)}. "
                    "Expected an image that hipa-generate wrote."
                )
        for key in _TEXTS:
            if not isinstance(parameters.get(key, ""), str | None):
                raise HipaError(
                    f"{path}: its parameters have {key}={brief(parameters[key])}, no text. "
                    "Expected an image that hipa-generate wrote."
                )
        if parameters["backend"] not in BACKENDS:
            raise HipaError(
                f"{path} was made with the backend {brief(parameters['backend'])}, which this "
                "version does not have. Give the prompt and the seed by hand."
            )
        if "task" in parameters:
            task = str(parameters["task"])[:20]
            raise HipaError(
                f"{path} was made from another image, which is not in it. Run hipa-{task} with "
                f"that image, the prompt {brief(parameters['prompt'], _SHOWN)} and the options "
                f"{_options_of(parameters)}"
            )
        return cls(path, read_marks(path), parameters)

    def find_bundle(self, given: str | None) -> Path:
        """The bundle's folder: the one that is given, else the one that the record names.

        Raises:
            HipaError: none is given, and there is no folder of the recorded name here.

        """
        if given is not None:
            return resolve_bundle(given)
        name = self.parameters.get("bundle_name")
        # The record may be a stranger's: a name in this folder, and no path out of it.
        if name and name == Path(name).name and name not in (".", ".."):
            root = resolve_bundle(name)
            if name == NAME or (root / MANIFEST).is_file():
                return root
        raise HipaError(
            f"{self.path} was made with the bundle {brief(name or 'of an older version')}, which "
            "is not in this folder. Run: hipa-generate BUNDLE --again IMAGE"
        )

    def find_adaptor(self, bundle: Bundle, given: str | None) -> str | None:
        """The adaptor to swap in: the one that is given, else the bundle's that fits the record.

        Returns:
            None where the bundle's own weights made the image, or where no adaptor of the bundle
            fits; ``differences`` says so then.

        """
        if given is not None:
            return given
        if self._has_weights_of(bundle, None):
            return None
        folder = bundle.root / "adaptors"
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            try:
                swap = AdaptorSwap.open(bundle, path)
            except HipaError:
                continue
            if self._has_weights_of(bundle, swap):
                return str(path)
        return None

    def differences(self, bundle: Bundle, adaptor: str | None, backend: str) -> list[str]:
        """What is not as it was, a line each: the weights, the bundle, the backend.

        Args:
            bundle: that makes the image now.
            adaptor: that is swapped in.
            backend: that runs it, not 'auto'.

        Raises:
            HipaError: the weights are others, so that another picture would come.

        """
        swap = None if adaptor is None else AdaptorSwap.open(bundle, adaptor)
        before = self.parameters
        now_unet = loaded_unet_sha256(bundle, swap)
        if not self._has_weights_of(bundle, swap):
            lines = [f"UNet {before['unet'][:12]}, here {now_unet[:12]}"]
            now = {
                "base_model": bundle.manifest.base_model.sha256,
                "precision": bundle.manifest.precision,
            }
            for key, value in now.items():
                if before.get(key) != value:
                    lines.append(f"{key} {str(before.get(key))[:12]}, here {value[:12]}")
            raise HipaError(
                f"{self.path} was made with other weights than {bundle.root} has "
                f"({'; '.join(lines)}), and would become another picture. Give the bundle that "
                "made it, and --adaptor if one was swapped in."
            )
        lines = []
        if before.get("bundle") not in (None, bundle.sha256):
            lines.append(
                "the bundle's manifest is another one, with the same UNet (text encoder, decoder "
                "or marks may differ)"
            )
        if before["backend"] != backend:
            lines.append(f"backend {before['backend']}, now {backend}")
        return lines

    def _has_weights_of(self, bundle: Bundle, swap: AdaptorSwap | None) -> bool:
        """Whether the image was made with these weights of the UNet."""
        before = self.parameters
        if before["unet"] == loaded_unet_sha256(bundle, swap):
            return True
        # Earlier versions recorded the graph's hash alone, which all adaptors share where the
        # weights lie beside it. The bundle and the adaptor that they recorded tell them apart.
        graph = bundle.manifest.files[bundle.stages[adapted_stage(bundle)].path]
        if before["unet"] != graph or before.get("bundle") != bundle.sha256:
            return False
        manifest = bundle.manifest if swap is None else swap.manifest
        adaptor = manifest.adaptor.sha256 if manifest.adaptor else None
        loras = [lora.model_dump(mode="json") for lora in manifest.loras]
        return before.get("adaptor") == adaptor and before.get("loras", []) == loras

    def compare(self, image_HWC: np.ndarray) -> str:
        """How the new image compares with the one in the file, in words.

        Args:
            image_HWC: uint8 [H, W, 3], before it is encoded.

        """
        if self.marks.xmp.pixels:
            if self.marks.xmp.pixels == pixels_sha256(image_HWC):
                return "the same image, pixel for pixel"
            if self.marks.format == "JPEG":
                return "not the same pixels as were recorded"
        stored_HWC = read_image(self.path)
        if stored_HWC.shape != image_HWC.shape:
            return f"another size: {stored_HWC.shape[1]}x{stored_HWC.shape[0]} in the file"
        error = np.abs(stored_HWC.astype(int) - image_HWC)
        if not error.any():
            return "the same image, pixel for pixel"
        share = 100 * np.mean(error.any(axis=-1))
        return f"not the same pixels: {share:.1f} % differ, by at most {error.max()} of 255"
