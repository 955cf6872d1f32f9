"""Inception and CLIP, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from hipa_deploy.errors import HipaError
from hipa_deploy.train.coco.clip_score import ClipScore, clip_size
from hipa_deploy.train.coco.coco_request import check_inception
from hipa_deploy.train.coco.inception import Inception
from hipa_deploy.train.coco.prepare_images import clean_resize
from hipa_deploy.train.coco.protocol import FETCH_PEERS_CLIP
from hipa_deploy.train.losses.clip_folder import check_clip_folder, clip_sha256
from tests.coco_samples import write_clip
from tests.inception_layout import Layers, SmallLayers, write_inception


def images(count: int, side: int = 48) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_features_of_the_true_layout(tmp_path: Path) -> None:
    layers = Layers().eval()
    path = write_inception(tmp_path / "inception.pt", layers)
    got = Inception(path, "cpu")(images(1))
    assert got.shape == (1, 2048)
    pixels = torch.from_numpy(clean_resize(images(1)[0]))[None]
    with torch.no_grad():
        expected = layers((pixels - 128) / 128)
    assert got == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)
    assert got.std() > 0


def test_files_that_are_no_inception(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=r"which no package has\. Fetch it.*curl -O https"):
        check_inception(None)
    with pytest.raises(HipaError, match="is no file"):
        check_inception(tmp_path / "nope.pt")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(HipaError, match=r"weights\.pth cannot be loaded.*NVIDIA's TorchScript"):
        Inception(tmp_path / "weights.pth", "cpu")
    torch.jit.script(SmallLayers()).save(str(tmp_path / "bare.pt"))
    with pytest.raises(HipaError, match="has no part 'layers'"):
        Inception(tmp_path / "bare.pt", "cpu")
    write_inception(tmp_path / "other.pt", torch.nn.Conv2d(3, 5, 200))
    with pytest.raises(HipaError, match="Expected 2048 features"):
        Inception(tmp_path / "other.pt", "cpu")(images(1))


def test_the_score_is_the_cosine_of_the_embeddings(tmp_path: Path) -> None:
    """Against the model's two towers, with the peers' preprocessing written out."""
    folder = write_clip(tmp_path / "clip")
    pictures = images(3, side=64)
    captions = ["a red apple", "a boat", "long " * 100]
    got = ClipScore(folder, "cpu", "A photo depicts ")(pictures, captions)

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    for picture, caption, cosine in zip(pictures, captions, got, strict=True):
        small = Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = ((np.asarray(small) / 255 - mean) / deviation).transpose(2, 0, 1)
        ids = tokenizer.encode("A photo depicts " + caption)
        if len(ids) > 77:
            ids = [*ids[:76], tokenizer.eos_token_id]
        with torch.no_grad():
            vision = model.vision_model(torch.from_numpy(pixels)[None].float()).pooler_output
            text = model.text_model(torch.tensor([ids])).pooler_output
            a = model.visual_projection(vision)[0]
            b = model.text_projection(text)[0]
        assert cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)


def test_a_folder_of_clip(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    check_clip_folder(folder, "--clip", FETCH_PEERS_CLIP)
    assert clip_size(folder) == (16, 2, 8)
    before = clip_sha256(folder)
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"other")
    assert clip_sha256(folder) == before
    with pytest.raises(HipaError, match=r"hf download laion/CLIP-ViT-g-14"):
        check_clip_folder(tmp_path, "--clip", FETCH_PEERS_CLIP)
