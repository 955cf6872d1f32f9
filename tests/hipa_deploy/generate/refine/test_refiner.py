"""Drafts of a tiny bundle, refined: reproducible, one by one, and refused where they must be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import LoraInfo, Manifest, RefineSettings
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.refine.drafts import recorded_settings, refine_facts
from hipa_deploy.generate.refine.refiner import read_tables, refine_settings
from hipa_deploy.images.png import save_image
from hipa_deploy.marks.a1111 import infotext, parse_infotext
from tests.refine_samples import GUIDANCE, SAMPLER, STEPS, refine_bundle
from tests.swap_samples import INFO, scaled_weights, write_swap

PROMPTS = ["a green pear", "a red apple"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return refine_bundle(tmp_path_factory.mktemp("refine"))


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Iterator[OneStepPipeline]:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as loaded:
        yield loaded


def test_the_teacher_of_the_adaptor_is_the_default(bundle: Bundle) -> None:
    own = RefineSettings(sampler=SAMPLER, steps=STEPS, guidance=GUIDANCE)
    assert refine_settings(bundle) == own
    assert refine_settings(bundle, steps=9).steps == 9


def test_a_final_image_depends_on_its_own_draft_alone(pipe: OneStepPipeline) -> None:
    together = pipe.refine(pipe(PROMPTS, seed=3, count=2))
    alone = pipe.refine(pipe(PROMPTS[1], seed=4))
    np.testing.assert_array_equal(together.images_BHWC[3], alone.images_BHWC[0])
    assert (together.prompts[3], together.seeds[3]) == (PROMPTS[1], 4)
    assert together.parameters[3] == alone.parameters[0]


def test_the_parameters_reproduce_it(pipe: OneStepPipeline, bundle: Bundle) -> None:
    draft = pipe(PROMPTS[0], seed=5)
    final = pipe.refine(draft, 4, guidance=2.0, sampler="dpmsolver++")
    wanted = final.parameters[0]["refine"]
    assert wanted.pop("unet") == bundle.manifest.files["teacher/model.onnx"]
    assert wanted == {"steps": 4, "guidance": 2.0, "sampler": "dpmsolver++"}
    assert {**final.parameters[0], "refine": 0} == {**draft.parameters[0], "refine": 0}

    # From a final image as from its draft.
    again = pipe.refine(final, wanted["steps"], guidance=2.0, sampler="dpmsolver++")
    np.testing.assert_array_equal(again.images_BHWC, final.images_BHWC)
    assert np.any(pipe.refine(draft).images_BHWC != final.images_BHWC)


def test_other_programs_read_how_it_was_refined(pipe: OneStepPipeline, tmp_path: Path) -> None:
    final = pipe.refine(pipe(PROMPTS[0], seed=5), 4, guidance=2.0, sampler="dpmsolver++")
    path = tmp_path / "final.png"
    save_image(path, final.images_BHWC[0], final.parameters[0])
    fields = parse_infotext(Image.open(path).text["parameters"])
    assert (fields["Steps"], fields["Sampler"], fields["CFG scale"]) == ("4", "DPM++ 2M", "2.0")
    assert fields["Model hash"] == final.parameters[0]["refine"]["unet"][:10]
    # A stranger's file may say anything.
    for odd in ({}, {"steps": None, "sampler": ["x"]}, 7, "ddim"):
        assert infotext({"prompt": "a cat", "refine": odd}).startswith("a cat\n")


def test_progress_and_calls_of_the_unet(pipe: OneStepPipeline) -> None:
    draft = pipe(PROMPTS, seed=0)
    shown: list[tuple[int, int]] = []
    calls: Counter[str] = Counter()

    def timer(stage: str) -> Any:
        calls[stage] += 1
        return nullcontext()

    pipe.refine(draft, 3, timer=timer, progress=lambda done, steps: shown.append((done, steps)))
    assert shown == [(0, 6), (1, 6), (2, 6), (3, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    assert calls == {"teacher": 12, "vae_decoder": 2}

    # Without guidance the empty prompt is not asked.
    calls.clear()
    pipe.refine(draft, 3, guidance=1, timer=timer)
    assert calls["teacher"] == 6


def test_a_swapped_adaptor_changes_the_draft_alone(pipe: OneStepPipeline, bundle: Bundle) -> None:
    write_swap(bundle, bundle.root / "adaptors/half", scaled_weights(bundle, 0.5))
    before = pipe(PROMPTS[0], seed=1)
    final = pipe.refine(before, 3)
    pipe.swap_adaptor("half")
    try:
        draft = pipe(PROMPTS[0], seed=1)
        assert np.any(draft.images_BHWC != before.images_BHWC)
        np.testing.assert_array_equal(pipe.refine(draft, 3).images_BHWC, final.images_BHWC)
    finally:
        pipe.swap_adaptor(None)


def test_an_adaptor_on_another_base_model_is_refused(pipe: OneStepPipeline, bundle: Bundle) -> None:
    draft = pipe(PROMPTS[0])
    lora = LoraInfo(name="night", sha256="3" * 64, scale=1.0)
    weights = scaled_weights(bundle, 0.5)
    write_swap(bundle, bundle.root / "adaptors/lora", weights, adaptor=INFO, loras=(lora,))
    pipe.swap_adaptor("lora")
    try:
        with pytest.raises(HipaError, match="has other LoRAs than the base model"):
            pipe.refine(draft, 3)
    finally:
        pipe.swap_adaptor(None)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"steps": 1}, "steps is 1. Expected a whole number of 2 to 1000"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"guidance": 0.5}, "guidance is 0.5. Expected 1 to 30"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": "much"}, "guidance is 'much'"),
        ({"sampler": "euler"}, "sampler 'euler' is unknown"),
    ],
)
def test_wishes_out_of_range(bundle: Bundle, wish: dict[str, Any], words: str) -> None:
    with pytest.raises(HipaError, match=words):
        refine_settings(bundle, **wish)


def test_a_checker_sees_final_images(bundle: Bundle) -> None:
    def checker(images_BHWC: np.ndarray) -> list[bool]:
        return [True] * len(images_BHWC)

    with OneStepPipeline.load(bundle.root, "onnxruntime") as unchecked:
        draft = unchecked(PROMPTS[0], seed=2)
    with OneStepPipeline.load(bundle.root, "onnxruntime", checker=checker) as checked:
        final = checked.refine(draft, 2)
    assert not len(final.images_BHWC)
    assert [flagged.seed for flagged in final.flagged] == [2]


def test_a_record_of_another_base_model(bundle: Bundle) -> None:
    record = refine_facts(bundle, RefineSettings())
    assert recorded_settings(bundle, record, "a.png") == RefineSettings()
    with pytest.raises(HipaError, match="another base UNet"):
        recorded_settings(bundle, {**record, "unet": "0" * 64}, "a.png")
    with pytest.raises(HipaError, match="steps is 'x'"):
        recorded_settings(bundle, {**record, "steps": "x"}, "a.png")
    with pytest.raises(HipaError, match="its parameters have refine=3"):
        recorded_settings(bundle, 3, "a.png")


def test_what_is_no_draft(pipe: OneStepPipeline) -> None:
    with pytest.raises(HipaError, match="the drafts are None"):
        pipe.refine(None)  # type: ignore[arg-type]


def test_guidance_of_numpy(pipe: OneStepPipeline) -> None:
    final = pipe.refine(pipe("3d emoji of a red apple"), steps=2, guidance=np.float32(2))
    assert final.parameters[0]["refine"]["guidance"] == 2.0


def test_what_cannot_be_refined(bundle: Bundle, pipe: OneStepPipeline) -> None:
    with pytest.raises(HipaError, match="has no rtx engine of the base model"):
        refine_settings(bundle, backend="rtx")
    without = replace(bundle, manifest=bundle.manifest.model_copy(update={"refine": None}))
    with pytest.raises(HipaError, match="Export it with --with-teacher"):
        refine_settings(without)
    edits = replace(bundle, manifest=bundle.manifest.model_copy(update={"task": "edit"}))
    with pytest.raises(HipaError, match="the task edit, which is not refined"):
        refine_settings(edits)

    draft = pipe(PROMPTS[0])
    other = {**draft.parameters[0], "base_model": "another"}
    with pytest.raises(HipaError, match="made with another base model"):
        pipe.refine(replace(draft, parameters=(other,)))
    styled = {**draft.parameters[0], "loras": [{"name": "ink"}]}
    with pytest.raises(HipaError, match="made with other LoRAs"):
        pipe.refine(replace(draft, parameters=(styled,)))
    edited = {**draft.parameters[0], "task": "edit", "source": "0" * 64}
    with pytest.raises(HipaError, match=r"made from another image \(task edit\)"):
        pipe.refine(replace(draft, parameters=(edited,)))


def test_a_pipeline_that_is_closed(bundle: Bundle) -> None:
    pipe = OneStepPipeline.load(bundle.root, "onnxruntime")
    draft = pipe(PROMPTS[0])
    pipe.close()
    with pytest.raises(HipaError, match="is closed"):
        pipe.refine(draft, 2)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("alpha_bars", lambda values: values[::-1].copy()),
        ("alpha_bars", lambda values: values.astype(np.float64)),
        ("empty_context", lambda values: values[:, :-1]),
        ("empty_context", lambda values: values * values.dtype.type(np.nan)),
        ("more", lambda _: np.zeros(1, np.float32)),
    ],
)
def test_damaged_tables(tmp_path: Path, name: str, change: Any) -> None:
    bundle = refine_bundle(tmp_path)
    refinement = bundle.manifest.refine
    assert refinement
    path = bundle.path(refinement.tables)
    arrays = dict(np.load(path))
    arrays[name] = change(arrays.get(name))
    np.savez(path, **arrays)
    with pytest.raises(HipaError, match=r"tables\.npz"):
        read_tables(bundle, refinement)


def test_a_changed_teacher_is_found_at_loading(tmp_path: Path) -> None:
    bundle = refine_bundle(tmp_path)
    path = bundle.root / "teacher/model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(HipaError, match="is corrupt"):
        OneStepPipeline.load(bundle.root, "onnxruntime")
    assert file_sha256(path) != bundle.manifest.files["teacher/model.onnx"]


def test_the_manifest(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
    assert list(bundle.stages) == ["text_encoder", "unet", "vae_decoder"]
    assert list(bundle.all_stages)[-1] == "teacher"

    # Without the base model there is no field of it, as before.
    data = json.loads(manifest.model_copy(update={"refine": None}).to_json())
    assert "refine" not in data
    assert Manifest.model_validate(data).refine is None

    fields = json.loads(manifest.to_json())
    with pytest.raises(ValidationError, match="layout generic is not refined"):
        Manifest.model_validate({**fields, "layout": "generic"})
    stages = [*fields["stages"], fields["refine"]["stage"]]
    with pytest.raises(ValidationError, match="among those of the one step"):
        Manifest.model_validate({**fields, "stages": stages})
    refine = {**fields["refine"], "stage": fields["stages"][1]}
    with pytest.raises(ValidationError, match="stage unet refines"):
        Manifest.model_validate({**fields, "refine": refine})
    stage = fields["refine"]["stage"]
    spec = {**stage["spec"], "inputs": stage["spec"]["inputs"][:2]}
    refine = {**fields["refine"], "stage": {**stage, "spec": spec}}
    with pytest.raises(ValidationError, match="teacher takes sample, timestep, expected"):
        Manifest.model_validate({**fields, "refine": refine})
