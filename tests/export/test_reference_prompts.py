"""Prompts of the user judge every stage of an export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.reference import REFERENCE_PROMPTS, Reference, reference_prompt
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import choose_judging
from hipa_deploy.export.references import References
from tests.export.test_writer import Layers, writer_of

TINY_BD = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8) / 1000


class Sum(Layers):
    """y = second(first(x)) = 4 x."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight.copy_(2 * torch.eye(8))
        self.second.weight.copy_(2 * torch.eye(8))
        self.first.bias.zero_()
        self.second.bias.zero_()


def options_of(file: Path, lines: list[str], **more: object) -> ExportOptions:
    file.write_text("\n".join(lines) + "\n")
    return ExportOptions(model="emoji", out=Path("out"), reference_prompts=file, **more)


def test_the_largest_values_of_any_prompt_count(tmp_path: Path) -> None:
    writer, source = writer_of(tmp_path, Sum)
    own = References("small", (0,), {"x": TINY_BD, "y": 4 * TINY_BD}, {"unet.second": 1.0})
    other = replace(own, largest={"unet.second": 1e5})
    both = replace(writer, references=own, others=(other,))
    stage, _ = both.write_judged(source, [{"x": TINY_BD}, {"x": TINY_BD}])
    assert stage.fp32_islands == ("second",)


def test_a_wrong_image_of_any_prompt_stops_the_export(tmp_path: Path) -> None:
    writer, source = writer_of(tmp_path, Sum, "fp32")
    own = References("small", (0,), {"x": TINY_BD, "y": 4 * TINY_BD})
    wrong = References("a boat", (1,), {"x": TINY_BD, "y": -4 * TINY_BD})
    both = replace(writer, references=own, others=(wrong,))
    with pytest.raises(HipaError, match=r"unet of 'a boat' in fp32 is .* dB from PyTorch"):
        both.write_judged(source, [{"x": TINY_BD}, {"x": TINY_BD}])


@pytest.mark.thorough
def test_a_bundle_is_judged_by_the_prompts_of_a_file(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    options = options_of(file, ["a blue boat", "a red apple", "an old tree"])
    bundle = export_bundle(
        replace(options, model=str(model_dir), out=tmp_path / "bundle", dtype="fp32")
    )
    stored = json.loads((bundle.root / REFERENCE_PROMPTS).read_text())
    assert stored == {"prompts": ["a blue boat", "a red apple", "an old tree"], "seeds": [0]}
    assert reference_prompt(bundle) == "a blue boat"

    # The tensors are those of the first prompt: the bundle gives its image from its noise.
    tensors = Reference.read(bundle).tensors
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        image_BHWC = pipe("a blue boat", seed=0).images_BHWC
    assert np.abs(image_BHWC.astype(int) - tensors["images"]).max() <= 2


def test_of_many_prompts_eight_are_taken(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(1000)]
    chosen, warning = choose_judging(options_of(tmp_path / "many.txt", prompts))
    assert list(chosen) == [f"prompt {n}" for n in (0, 142, 285, 428, 570, 713, 856, 999)]
    assert "8 of the 1000 prompts" in str(warning)
    few, no_warning = choose_judging(options_of(tmp_path / "few.txt", prompts[:8]))
    assert (list(few), no_warning) == (prompts[:8], None)


def test_a_closed_set_is_judged_by_its_own_prompts(tmp_path: Path) -> None:
    closed = tmp_path / "closed.txt"
    closed.write_text("a boat\na tree\n")
    chosen, _ = choose_judging(options_of(tmp_path / "a.txt", ["a tree"], prompts=closed))
    assert list(chosen) == ["a tree"]
    with pytest.raises(HipaError, match=r"line 2: 'a house' is none of --prompts"):
        choose_judging(options_of(tmp_path / "b.txt", ["a tree", "a house"], prompts=closed))
