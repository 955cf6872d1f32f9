"""``hipa-generate``: mistakes are refused before a bundle is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.commands.app import main
from hipa_deploy.images.png import read_parameters
from tests.served import tiny_bundles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji"], "Missing argument"),
        (["emoji", "apple", "--count", "many"], "--count"),
        (["emoji", "(red:1.2.3)", "--prompt-weights"], "is no weight. Expected a number"),
        (["emoji", "apple", "--nope"], "--nope"),
        (["/no/such", "apple"], "does not exist"),
        (["emoji", "apple", "--backend", "vulkan"], "vulkan"),
        (["emoji", "apple", "--out", "x.gif"], ".png"),
        (["emoji", "apple", "--out", "x.jpg", "--quality", "0"], "quality is 0"),
        (["emoji", "apple", "--quality", "90"], "a PNG is lossless"),
        (["emoji", "apple", "--out", "x.jpg", "--format", "webp"], "Leave --format out"),
        (["emoji", "apple", "--seed", "banana"], "not 'random'"),
        (["emoji", "apple", "--watermark"], "too small for the watermark"),
        (["emoji", "apple", "--c2pa", "/no/such.pem"], "/no/such.pem is missing"),
        (["--again", "/no/such.png"], "/no/such.png is missing"),
        (["emoji", "apple", "--again", "x.png"], "Leave out the prompt"),
        (["emoji", "apple", "--out", "x.png", "--count", "2"], "one file"),
        (["emoji", "apple", "--adaptor", "night"], "no adaptor 'night' to swap in"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("generate", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["apple " * 100], "the prompt has 102 tokens, the model reads 77"),
        (["(red:5000) apple", "--prompt-weights"], "has the weight 5e+03. Expected at most 1000"),
    ],
)
def test_a_prompt_is_checked_before_anything_is_loaded(
    arguments: list[str],
    message: str,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(OneStepPipeline, "load")
    assert message in refused("generate", "emoji", *arguments)


def test_what_looks_like_a_weight_is_said_to_be_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def note(name: str, *options: str) -> str:
        # With 'auto' there may be a note on another backend.
        common = ["--backend", "onnxruntime", "--out", str(tmp_path / name)]
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "emoji", "a (red:1.3) apple", *common, *options])
        assert not stopped.value.code
        return capsys.readouterr().err

    assert "note: '(red:1.3)' is read as text. --prompt-weights reads it" in note("text.png")
    assert "note" not in note("weights.png", "--prompt-weights")
    assert "note" not in note("asked.png", "--no-prompt-weights")
    text, weights, asked = (tmp_path / f"{name}.png" for name in ("text", "weights", "asked"))
    assert text.read_bytes() == asked.read_bytes() != weights.read_bytes()
    assert read_parameters(weights)["prompt_weights"] is True


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("an apple <lora:fur:0.8>", "note: '<lora:fur:0.8>' is read as text. hipa-export --lora"),
        ("an apple BREAK a pear", "note: 'BREAK' is read as text. AUTOMATIC1111's web UI obeys it"),
    ],
)
def test_words_of_another_program_are_said_to_be_text(
    prompt: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--prompt-weights", "--no-prompt-weights"):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "emoji", prompt, option, "--out", str(tmp_path / f"{option}.png")])
        assert not stopped.value.code
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "is_told"),
    [
        (["a", "red", "pear"], True),
        (["pear", "apple"], False),
        (["pear", "apple", "a boat"], False),
    ],
)
def test_words_that_lack_their_quotation_marks(
    prompts: list[str], is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny_bundles(tmp_path)["tiny"]
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(bundle.root), *prompts, "--out", str(tmp_path / "images")])
    assert not stopped.value.code
    told = 'note: 3 prompts of one word each. As one prompt: "a red pear"'
    assert (told in capsys.readouterr().err) == is_told
    assert len(list((tmp_path / "images").iterdir())) == len(prompts)


@pytest.mark.parametrize(("prompt", "is_told"), [("a pear, DIM", True), ("a pear, Dim", False)])
def test_an_embeddings_word_in_other_capitals(
    prompt: str, is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny_bundles(tmp_path)["tiny"]
    manifest = json.loads((bundle.root / "hipa.json").read_text(encoding="utf-8"))
    manifest["embeddings"] = [{"name": "dim.pt", "sha256": "0", "token": "Dim", "vectors": 1}]
    (bundle.root / "hipa.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(bundle.root), prompt, "--out", str(tmp_path / "image.png")])
    assert not stopped.value.code
    told = "note: 'DIM' is read as text. The word of the embedding is 'Dim'."
    assert (told in capsys.readouterr().err) is is_told


def test_auto_names_a_faster_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def notes(*options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "emoji", "an apple", "--out", str(tmp_path / "a.png"), *options])
        assert not stopped.value.code
        return capsys.readouterr().err

    faster = "hipa_deploy.engines.backends.available.faster_on_cpu"
    monkeypatch.setattr(faster, lambda: "openvino-bf16")
    assert "note" not in notes(), "of a small bundle nothing was measured"
    monkeypatch.setattr("hipa_deploy.commands.make_images._LARGE_BUNDLE", 0)
    expected = "note: auto took onnxruntime. --backend openvino-bf16 is faster on this processor."
    assert expected in notes("--force")
    assert "note" not in notes("--backend", "onnxruntime", "--force")
    monkeypatch.setattr(faster, lambda: None)
    assert "note" not in notes("--force")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into Linux's cache")
@pytest.mark.parametrize("chosen", ["", "0"])
def test_onnx_runtime_sends_nothing(tmp_path: Path, chosen: str) -> None:
    """With telemetry it keeps an identifier of the machine, before anything is sent."""
    environment = {**os.environ, "HOME": str(tmp_path), "HIPA_CACHE": str(tmp_path / "ours")}
    # ONNX Runtime sends nothing from its own tests and from a continuous integration either.
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI", "GITHUB_ACTIONS"):
        environment.pop(name, None)
    if chosen:
        environment["ORT_DISABLE_TELEMETRY"] = chosen
    code = "import hipa_deploy, os, onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == (chosen or "1")
    if not chosen:
        assert list(tmp_path.rglob("*")) == []


def test_verify_and_no_cache_give_the_same_image(tmp_path: Path) -> None:
    images = []
    for name, options in {"plain": [], "verified": ["--verify"], "anew": ["--no-cache"]}.items():
        path = tmp_path / f"{name}.png"
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "emoji", "an apple", "--out", str(path), *options])
        assert not stopped.value.code
        images.append(path.read_bytes())
    assert images[0] == images[1] == images[2]


def test_low_memory_gives_the_same_file_and_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"": tmp_path / "usual.png", "--low-memory": tmp_path / "low.png"}
    for option, path in paths.items():
        options = ["--backend", "onnxruntime", "--out", str(path), *filter(None, [option])]
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "emoji", "3d emoji of a red apple", *options])
        assert not stopped.value.code
    usual, low = paths.values()
    assert usual.read_bytes() == low.read_bytes()
    line = "low memory: text_encoder, then unet, then vae_decoder\n"
    assert capsys.readouterr().err.count(line) == 1


@pytest.mark.parametrize(("seed", "reason"), [("-1", "is below 0"), ("1.5", "is no whole number")])
def test_what_is_no_seed(seed: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "emoji", "an apple", "--seed", seed])
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert reason in told
    assert "'random'" in told
    assert told.count("\n") == 1
