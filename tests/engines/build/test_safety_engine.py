"""A real TensorRT-RTX engine of a tiny safety checker, without a GPU."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.bundle.manifest import SafetyStage
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.engines.build.build_bundle import build_bundle, dry_run
from hipa_deploy.export.builders import safety_source
from hipa_deploy.export.graph.safety_module import (
    load_safety_checker,
    reference_cosines,
    safety_settings,
    safety_spec,
)
from hipa_deploy.export.references import References
from hipa_deploy.export.writer import StageWriter
from hipa_deploy.marks.safety import SAFETY_STAGE, prepare_pixels
from tests.safety_model import add_safety_checker, pictures

trt = pytest.importorskip("tensorrt_rtx")


def with_checker(bundle: Bundle, model: Path) -> Bundle:
    """Export a model's checker into a bundle, as ``hipa-export`` does."""
    checker = load_safety_checker(model / "safety_checker")
    settings = safety_settings(checker, model / "safety_checker", model / "feature_extractor")
    pixels = prepare_pixels(pictures(1), settings)
    cosines = reference_cosines(checker, torch.from_numpy(pixels)).numpy()
    references = References("", (0,), {"pixels": pixels, "cosines": cosines})
    specs = {SAFETY_STAGE: safety_spec(settings)}
    writer = StageWriter(bundle.root, "fp16", specs, references)
    stage = writer.write(safety_source(model), references.tensors).stage
    files = dict(bundle.manifest.files)
    for path in (bundle.root / SAFETY_STAGE).iterdir():
        files[f"{SAFETY_STAGE}/{path.name}"] = file_sha256(path)
    changed = {"safety": SafetyStage(stage=stage, settings=settings), "files": files}
    manifest = bundle.manifest.model_copy(update=changed)
    (bundle.root / MANIFEST).write_text(manifest.model_dump_json())
    return Bundle.open(bundle.root)


def test_the_safety_checker_has_an_engine_of_its_own(
    make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = with_checker(make_bundle(stages=("unet",)), add_safety_checker(tmp_path / "model"))
    plan = dry_run(bundle, backend="rtx", target="rtx40")
    assert [stage.stage for stage in plan.stages] == ["unet", SAFETY_STAGE]

    quiet = Console(file=io.StringIO())
    _, built = build_bundle(bundle, backend="rtx", target="rtx40", console=quiet)
    assert (built.stage, built.up_to_date) == (SAFETY_STAGE, False)
    assert built.path.stat().st_size == built.sidecar.engine_bytes > 10_000
    # Its products are FP16; what follows them, to the cosines, is FP32.
    assert built.sidecar.precision_check.float16 > 0

    again = build_bundle(bundle, backend="rtx", target="rtx40", console=quiet)
    assert [engine.up_to_date for engine in again] == [True, True]
