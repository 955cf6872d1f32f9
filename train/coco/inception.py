"""Inception v3 of 2015-12-05, the network that FID is defined with, from NVIDIA's TorchScript file.

The file holds the network itself, so that nothing else has to be installed. StyleGAN2-ADA made it;
clean-fid, and so GigaGAN's and DMD2's evaluation, load the same one.

Shapes: B images of a batch, S = 299.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.train.coco.prepare_images import clean_resize
from hipa_deploy.train.coco.protocol import FEATURES, INCEPTION_URL


class Inception:
    """The pooled features of Inception v3.

    Args:
        path: TorchScript file with a part ``layers``, as inception-2015-12-05.pt has it.
        device: where it runs.

    Raises:
        HipaError: it is no such file.

    Example:
        >>> inception = Inception(Path("inception-2015-12-05.pt"), "cuda")
        >>> inception(images).shape
        (8, 2048)

    """

    def __init__(self, path: Path, device: str | torch.device) -> None:
        remedy = f"Expected NVIDIA's TorchScript file: curl -O {INCEPTION_URL}"
        with as_line(f"--inception {path} cannot be loaded", remedy):
            network = torch.jit.load(str(path), map_location=device).eval()
        if not hasattr(network, "layers"):
            raise HipaError(f"--inception {path} has no part 'layers'. {remedy}")
        self._path = path
        self._layers: Any = network.layers
        self._device = device

    @torch.no_grad()
    def __call__(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Features float32 [B, 2048] of images uint8 [B, H, W, 3].

        Raises:
            HipaError: the network gives something else.

        """
        resized = np.stack([clean_resize(image) for image in images_BHWC])
        pixels_B3SS = torch.from_numpy(resized).to(self._device)
        # The network's own scaling of pixels, which its part ``layers`` leaves out.
        features = self._layers((pixels_B3SS - 128) / 128)
        if features.numel() != len(resized) * FEATURES:
            raise HipaError(
                f"--inception {self._path}: the network gives {tuple(features.shape)}. "
                f"Expected {FEATURES} features of each of {len(resized)} images."
            )
        found: np.ndarray = features.reshape(len(resized), FEATURES).float().cpu().numpy()
        return found
