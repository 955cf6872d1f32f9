"""CLIP score: the cosine of an image and its caption, by a CLIP of transformers in a local folder.

Hessel et al. 2021, arXiv 2104.08718, without its factor 2.5 and its clip at 0: as the tables of
one-step models print it.

Shapes: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hipa_deploy.train.coco.protocol import FETCH_PEERS_CLIP
from hipa_deploy.train.losses.clip_folder import clip_config, load_clip


def clip_size(folder: Path) -> tuple[int, int, int]:
    """Width and layers of a CLIP's vision part, and the width of its embeddings.

    Raises:
        HipaError: the folder has no configuration of a CLIP.

    """
    config = clip_config(folder, "--clip", FETCH_PEERS_CLIP)
    vision = config.vision_config
    return vision.hidden_size, vision.num_hidden_layers, config.projection_dim


class ClipScore:
    """Cosines of images and captions.

    Args:
        folder: a CLIP of transformers: model, tokenizer and preprocessing.
        device: where it runs, in float32.
        prefix: put before each caption.

    Raises:
        HipaError: the folder cannot be loaded.

    Example:
        >>> score = ClipScore(Path("clip-vit-g-14"), "cuda", "A photo depicts ")
        >>> score(images, ["a red apple", "a boat"])
        array([0.31, 0.28], dtype=float32)

    """

    def __init__(self, folder: Path, device: str | torch.device, prefix: str) -> None:
        self._clip = load_clip(folder, "--clip", FETCH_PEERS_CLIP)
        self._model = self._clip.model.to(device)
        self._device = device
        self._prefix = prefix

    @torch.no_grad()
    def __call__(self, images_BHWC: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Cosines of images and captions.

        Args:
            images_BHWC: uint8 [B, H, W, 3].
            captions: B of them. Those that are too long for the text encoder are cut.

        Returns:
            float32 [B] in [-1, 1].

        """
        texts = [self._prefix + caption for caption in captions]
        tokens = self._clip.tokens(texts)
        pictures = [Image.fromarray(image) for image in images_BHWC]
        pixels = self._clip.processor(images=pictures, return_tensors="pt")["pixel_values"]
        made = self._model(
            input_ids=tokens["input_ids"].to(self._device),
            attention_mask=tokens["attention_mask"].to(self._device),
            pixel_values=pixels.to(self._device),
        )
        cosines = torch.nn.functional.cosine_similarity(made.image_embeds, made.text_embeds, dim=1)
        found: np.ndarray = cosines.float().cpu().numpy()
        return found
