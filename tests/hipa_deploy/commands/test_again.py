"""``--again`` makes an image once more, or says why not; and how image files are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from hipa_deploy.bundle.adaptor_swap import stage_sha256
from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.commands.app import main
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.generate.parts.image_guard import payload_of
from hipa_deploy.images.png import save_image
from hipa_deploy.images.read import read_image
from hipa_deploy.marks.read_marks import read_marks, read_parameters
from tests.swap_samples import INFO, scaled_weights, write_swap

PROMPT = "3d emoji of a red apple"
PIXELS = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command in a folder of its own; what it wrote to stderr. It must end well."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        said = capsys.readouterr().err
        assert (stopped.value.code or 0) == code, said
        return said

    return command


def test_from_format_to_format(run: Callable[..., str]) -> None:
    said = run("generate", "emoji", PROMPT, "--seed", "random", "--out", "a.png")
    seed = read_parameters(Path("a.png"))["seed"]
    assert f"seed {seed}\n" in said
    for source, target in (("a.png", "b.webp"), ("b.webp", "c.jpg"), ("c.jpg", "d.png")):
        said = run("generate", "--again", source, "--out", target)
        assert "the same image, pixel for pixel" in said
        assert "differs" not in said
    assert Path("d.png").read_bytes() == Path("a.png").read_bytes()
    assert (read_image(Path("b.webp")) == read_image(Path("a.png"))).all()
    assert run("doctor", "c.jpg") == ""


def test_what_differs_is_said(run: Callable[..., str], tmp_path: Path) -> None:
    run("generate", "emoji", PROMPT, "--out", "a.png")
    parameters = read_parameters(Path("a.png"))
    image_HWC = read_image(Path("a.png")).copy()
    save_image(Path("old.png"), image_HWC, {**parameters, "bundle": "0" * 64})
    said = run("generate", "--again", "old.png", "--out", "1.png")
    assert "differs: the bundle's manifest is another one, with the same UNet" in said
    assert "pixel for pixel" in said

    image_HWC[3, 4] = 255 - image_HWC[3, 4]
    save_image(Path("touched.png"), image_HWC, parameters)
    said = run("generate", "--again", "touched.png", "--out", "2.png")
    assert "not the same pixels: 0.0 % differ, by at most" in said

    save_image(Path("other.png"), image_HWC, {**parameters, "unet": "0" * 64})
    said = run("generate", "--again", "other.png", "--out", "3.png", code=1)
    assert "UNet 000000000000, here" in said
    assert "--adaptor" in said
    assert not Path("3.png").exists()


def with_weights_beside(root: Path, factor: float) -> Bundle:
    """The embedded bundle as large ones are, its UNet's weights beside the graph; some are scaled.

    Whatever the factor, the graph's file has the same bytes.
    """
    bundle = Bundle.open(Path(shutil.copytree(BUNDLE, root)))
    path = bundle.stage_path("unet")
    graph = onnx.load(path)
    for name, values in scaled_weights(bundle, factor).items():
        (tensor,) = (each for each in graph.graph.initializer if each.name == name)
        tensor.raw_data = values.tobytes()
    onnx.save(
        graph, path, save_as_external_data=True, location="model.onnx.data", size_threshold=640
    )
    manifest = json.loads((root / MANIFEST).read_text())
    for name in ("unet/model.onnx", "unet/model.onnx.data"):
        manifest["files"][name] = file_sha256(root / name)
    (root / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(root)


def test_weights_beside_the_graph_are_told_apart(run: Callable[..., str], tmp_path: Path) -> None:
    day = with_weights_beside(tmp_path / "day", 1.0)
    dusk = with_weights_beside(tmp_path / "dusk", 1.3)
    graph = "unet/model.onnx"
    assert day.manifest.files[graph] == dusk.manifest.files[graph]
    assert payload_of(day, watermark=True) != payload_of(dusk, watermark=True)

    run("generate", "day", PROMPT, "--out", "day.png")
    said = run("generate", "dusk", "--again", "day.png", "--out", "1.png", code=1)
    assert "was made with other weights than dusk has" in said

    # With the swap in, it is the bundle that was exported with the same weights.
    weights = scaled_weights(day, 1.3)
    write_swap(day, tmp_path / "day/adaptors/x", weights, onnx_sha256=stage_sha256(dusk, "unet"))
    run("generate", "day", PROMPT, "--adaptor", "x", "--out", "x.png")
    for bundle in ("day", "dusk"):
        said = run("generate", bundle, "--again", "x.png", "--out", f"again-{bundle}.png")
        assert "the same image, pixel for pixel" in said


def test_records_of_earlier_versions_name_the_graph_alone(
    run: Callable[..., str], tmp_path: Path
) -> None:
    day = with_weights_beside(tmp_path / "day", 1.0)
    dusk = with_weights_beside(tmp_path / "dusk", 1.3)
    graph = day.manifest.files["unet/model.onnx"]
    for name, factor in (("x", 1.3), ("y", 1.6)):
        folder = tmp_path / "day/adaptors" / name
        adaptor = INFO.model_copy(update={"sha256": name.encode().hex() * 32})
        weights = scaled_weights(day, factor)
        write_swap(day, folder, weights, onnx_sha256=graph, adaptor=adaptor)
        run("generate", "day", PROMPT, "--adaptor", name, "--out", f"{name}.png")
        save_image(
            Path(f"old-{name}.png"),
            read_image(Path(f"{name}.png")),
            {**read_parameters(Path(f"{name}.png")), "unet": graph},
        )
    new = [read_parameters(Path(f"{name}.png"))["unet"] for name in "xy"]
    assert len({*new, graph, stage_sha256(day, "unet")}) == 4
    for name in ("x", "old-x", "y", "old-y"):
        said = run("generate", "day", "--again", f"{name}.png", "--out", f"again-{name}.png")
        assert "the same image, pixel for pixel" in said
    assert dusk.sha256 != day.sha256
    run("generate", "dusk", "--again", "old-x.png", "--out", "1.png", code=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "7"}, "seed='7'"),
        ({"seed": True}, "seed=True"),
        ({"prompt": None}, "prompt=None"),
        ({"backend": "vulkan"}, "the backend 'vulkan'"),
        ({"bundle_name": "../emoji"}, "Run: hipa-generate BUNDLE --again IMAGE"),
        ({"bundle_name": 7}, "bundle_name=7, no text"),
        ({"task": "edit"}, "Run hipa-edit with that image"),
        ({"watermark": "red"}, "its watermark is 'red'"),
    ],
)
def test_a_record_that_cannot_be_used(
    run: Callable[..., str], change: dict[str, object], message: str
) -> None:
    parameters = {
        "prompt": PROMPT, "seed": 7, "height": 128, "width": 128, "backend": "onnxruntime",
        "unet": "0" * 64, "bundle_name": "emoji",
    }  # fmt: skip
    save_image(Path("a.png"), PIXELS, {**parameters, **change})
    assert message in run("generate", "--again", "a.png", "--out", "b.png", code=1)
    assert not Path("b.png").exists()


def test_an_image_without_a_record(run: Callable[..., str]) -> None:
    from PIL import Image

    Image.fromarray(PIXELS).save("plain.png")
    said = run("generate", "--again", "plain.png", code=1)
    assert "plain.png carries no generation parameters" in said


def test_a_folder_of_webp(run: Callable[..., str]) -> None:
    run("generate", "emoji", PROMPT, "--count", "2", "--format", "webp", "--quality", "80")
    paths = sorted(Path("images").iterdir())
    assert [path.name for path in paths] == ["000-seed0.webp", "000-seed1.webp"]
    assert read_marks(paths[1]).fields["Seed"] == "1"


def test_the_usual_name_has_the_format(run: Callable[..., str]) -> None:
    for _ in range(2):
        run("generate", "emoji", PROMPT, "--format", "jpeg")
    assert Path("image.jpg").exists()
    assert Path("image-2.jpg").exists()


def test_the_doctor_gives_json(run: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    run("generate", "emoji", PROMPT, "--out", "a.webp")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "a.webp", "--json"])
    assert not stopped.value.code
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"]["prompt"] == PROMPT
    assert report["provenance"].endswith("/trainedAlgorithmicMedia")
    assert report["pixels"] == "as they were made"
    assert report["watermark"].startswith("none found (score ")


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ({"task": "edit", "strength": 0.6}, "--height 64 --width 64 --seed 3 --strength 0.6"),
        (
            {"task": "inpaint", "feather": 8, "match": True},
            "--height 64 --width 64 --seed 3 --feather 8",
        ),
        (
            {"task": "inpaint", "feather": 8},
            "--height 64 --width 64 --seed 3 --feather 8 --no-match",
        ),
        ({"task": "upscale", "overlap": 16, "truncate": True}, "--overlap 16 --truncate"),
    ],
)
def test_an_image_of_another_image_says_with_which_options(
    run: Callable[..., str], made: dict, options: str
) -> None:
    parameters = {"prompt": PROMPT, "seed": 3, "height": 64, "width": 64, "unet": "0" * 64}
    save_image("a.png", PIXELS, {**parameters, "backend": "onnxruntime", **made})
    said = run("generate", "emoji", "--again", "a.png", code=1)
    assert f"Run hipa-{made['task']} with that image" in said
    assert said.endswith(f"and the options {options}\n")
