"""What hipa-doctor reports of this machine, of a bundle, and of what is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from hipa_deploy import OneStepPipeline, embedded
from hipa_deploy.bundle.parity import MIN_PSNR_DB
from hipa_deploy.commands.app import main
from hipa_deploy.doctor.examine import check_request, examine, render
from hipa_deploy.errors import HipaError


def test_the_report_says_where_the_embedded_folders_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0
    assert (Path(report["embedded"]["model"]) / "model_index.json").is_file()
    assert (Path(report["embedded"]["adaptor"]) / "pytorch_lora_weights.safetensors").is_file()
    OneStepPipeline.load(report["embedded"]["bundle"]).close()


def test_a_backend_that_is_missing_comes_with_a_remedy() -> None:
    backends = examine()["device"]["backends"]
    assert any(backend["usable"] for backend in backends)
    for backend in backends:
        assert backend["usable"] or backend["remedy"]


def test_a_bundle_is_checked() -> None:
    report = examine("emoji")
    assert report["problems"] == []
    assert report["bundle"]["size"] == [128, 128]


def test_a_corrupt_bundle_is_a_problem_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(embedded.BUNDLE, tmp_path / "bundle"))
    (root / "unet/model.onnx").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(root), "--json"])
    assert stopped.value.code == 1
    assert "corrupt" in json.loads(capsys.readouterr().out)["problems"][0]


def test_a_missing_embedded_folder_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "MODEL", tmp_path / "gone")
    assert "model is missing" in examine()["problems"][0]


def test_the_table_shows_device_backends_and_embedded_folders(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        console = Console(record=True, width=200, file=file)
        console.print(render(examine("emoji")))
    text = console.export_text()
    assert "embedded.model" in text
    assert "onnxruntime" in text


@pytest.mark.parametrize(
    ("backend", "remedy"),
    [("onnxruntime", "Export the bundle again"), ("openvino-bf16", "Use --backend openvino.")],
)
def test_a_failed_gate_comes_with_the_backends_remedy(
    monkeypatch: pytest.MonkeyPatch, backend: str, remedy: str
) -> None:
    usable = {found["name"]: found["usable"] for found in examine()["device"]["backends"]}
    if not usable[backend]:
        pytest.skip(f"{backend} does not run here")
    monkeypatch.setitem(MIN_PSNR_DB, "fp16", 200.0)
    problems = examine("emoji", backend)["problems"]
    assert problems
    assert all(remedy in problem for problem in problems)


def test_a_file_that_it_does_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    Image.new("L", (4, 4)).save(path)
    with pytest.raises(HipaError, match=r"x\.gif is a file of another kind\. .* an image as PNG"):
        check_request(str(path), "auto")
    path.with_suffix(".png").write_bytes(b"\x89PNG\r\n\x1a\n")
    check_request(str(path.with_suffix(".png")), "auto")
