import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hipa_deploy import embedded
from hipa_deploy.errors import HipaError, HipaWarning
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.locate import (
    TAESD,
    TAESDXL,
    check_controlnet_name,
    check_model_name,
    model_folder,
    model_name,
    resolve_decoder,
    resolve_encoder,
)
from hipa_deploy.models.weights.weight_files import DIFFUSERS, find_weights
from tests.packaging import Weights, as_bin, as_fp16_variant, as_shards, hub_cache
from tests.small_hub import serve_repository
from tests.tiny_controlnet import make_controlnet
from tests.tiny_model import make_model


def test_emoji_is_the_embedded_model_unless_a_folder_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder("emoji") == embedded.MODEL
    assert embedded.resolve_bundle("emoji") == embedded.BUNDLE
    (tmp_path / "emoji").mkdir()
    assert model_folder("emoji") == Path("emoji")
    assert embedded.resolve_bundle("emoji") == Path("emoji")
    assert embedded.resolve_adaptor("elsewhere") == Path("elsewhere")


def test_a_folder_of_images_does_not_hide_what_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``hipa-generate emoji --out emoji`` makes such a folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("emoji", "emoji-edit"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "000-seed0.png").touch()
    assert model_folder("emoji") == embedded.MODEL
    assert embedded.resolve_bundle("emoji") == embedded.BUNDLE
    for name in ("emoji", "emoji-edit"):
        assert embedded.resolve_adaptor(name) == embedded.ADAPTORS[name]
    (tmp_path / "emoji" / "hipa.json").touch()
    assert embedded.resolve_bundle("emoji") == Path("emoji")


@pytest.mark.parametrize("name", ["nothing-here", "/no/such/folder", "./relative/folder"])
def test_a_folder_that_does_not_exist(name: str) -> None:
    with pytest.raises(HipaError, match="does not exist"):
        model_folder(name)


@pytest.mark.parametrize("ending", [".pth", ".ckpt", ".PT", ".bin", ".safetensors"])
def test_a_file_of_weights_that_does_not_exist_is_no_hub_id(ending: str) -> None:
    name = f"nets/v1.5{ending}"
    for check in (check_model_name, check_controlnet_name):
        with pytest.raises(HipaError, match=r"nets/v1\.5\.\w+ does not exist"):
            check(name)
        check("owner/v1.5")


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(name: str, _: str) -> str:
        raise OSError(f"cannot reach the hub for {name}\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    expected = "owner/name: no such folder, and the hub did not provide it: cannot reach"
    with pytest.raises(HipaError, match=expected):
        model_folder("owner/name")


FETCH = """
import sys
from hipa_deploy.errors import HipaError
from hipa_deploy.models.locate import model_folder, resolve_controlnet
try:
    if len(sys.argv) > 1:
        print(resolve_controlnet("owner/name", sys.argv[1]))
    else:
        print(model_folder("owner/name"))
except HipaError as error:
    print(error)
"""


def fetched_from_hub(
    repository: Path,
    home: Path,
    refusal: tuple[int, str] | None = None,
    *words: str,
    offline: bool = False,
) -> tuple[str, list[str]]:
    """What ``model_folder`` says of a repository that a hub serves, and the files it fetched.

    With a model in ``words``: what ``resolve_controlnet`` says.
    """
    with serve_repository(repository, "owner/name", refusal) as (address, fetched):
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        if offline:
            # Not by a hub that answers 503: the library would try again for a minute.
            settings["HF_HUB_OFFLINE"] = "1"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", FETCH, *words],
            env={**kept, **settings, "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout.strip(), fetched


def test_a_repository_of_one_precision_alone(tmp_path: Path) -> None:
    """diffusers fetches a variant only by its name; without it, no weights at all."""
    repository = make_model(tmp_path / "repository")
    for path in [*repository.rglob("*.safetensors")]:
        path.rename(path.with_suffix(".fp16.safetensors"))
    text, fetched = fetched_from_hub(repository, tmp_path / "home")
    for part, stem in (("unet", DIFFUSERS), ("vae", DIFFUSERS), ("text_encoder", "model")):
        assert find_weights(Path(text) / part)[0].name == f"{stem}.fp16.safetensors"
        assert fetched.count(f"{part}/{stem}.fp16.safetensors") == 1


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo"), "accept its terms on https://huggingface.co/owner/name, and run: hf"),
        ((401, "RepoNotFound"), "there is no public repository of this name. For a private one"),
    ],
)
def test_what_the_hub_refuses(tmp_path: Path, refusal: tuple[int, str], message: str) -> None:
    text, _ = fetched_from_hub(tmp_path, tmp_path / "home", refusal)
    assert text.startswith(f"owner/name: no such folder, and the hub did not provide it: {message}")


@pytest.mark.parametrize("kind", ["another architecture", "no pipeline"])
def test_what_is_not_supported_is_not_fetched(tmp_path: Path, kind: str) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "weights.safetensors").write_bytes(bytes(100))
    expected = "owner/name on the hub has no model_index.json, so it is no diffusers pipeline."
    if kind == "another architecture":
        index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer"]}
        (repository / "model_index.json").write_text(json.dumps(index))
        expected = "owner/name is FluxPipeline: its unet is None, expected UNet2DConditionModel"
    text, fetched = fetched_from_hub(repository, tmp_path / "home")
    assert text.startswith(expected)
    assert set(fetched) <= {"model_index.json"}


def as_both(folder: Path, stem: str, weights: Weights) -> None:
    as_bin(folder, stem, weights)
    as_fp16_variant(folder, stem, weights)
    save_file(weights, folder / f"{stem}.safetensors")
    save_file(weights, folder / f"{stem}.non_ema.safetensors")


def as_old_and_half(folder: Path, stem: str, weights: Weights) -> None:
    as_bin(folder, stem, weights)
    as_fp16_variant(folder, stem, weights)


SHARDS = {f"{DIFFUSERS}-0000{number}-of-00002.safetensors" for number in (1, 2)}


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (as_both, {f"{DIFFUSERS}.safetensors"}),
        (as_old_and_half, {f"{DIFFUSERS}.bin"}),
        (as_fp16_variant, {f"{DIFFUSERS}.fp16.safetensors"}),
        (as_shards, {f"{DIFFUSERS}.safetensors.index.json", *SHARDS}),
    ],
)
def test_a_controlnet_is_fetched_without_its_other_files(
    tmp_path: Path, write: Callable[[Path, str, Weights], None], expected: set[str]
) -> None:
    model = make_model(tmp_path / "sd")
    repository = make_controlnet(model, tmp_path / "repository")
    weights = load_file(repository / f"{DIFFUSERS}.safetensors")
    (repository / f"{DIFFUSERS}.safetensors").unlink()
    (repository / "edges.png").write_bytes(bytes(100))
    write(repository, DIFFUSERS, weights)
    text, fetched = fetched_from_hub(repository, tmp_path / "home", None, str(model))
    assert sorted(fetched) == sorted({"config.json"} | expected)
    assert {path.name for path in find_weights(Path(text))} == expected - {
        f"{DIFFUSERS}.safetensors.index.json"
    }
    assert model_name("owner/name", Path(text)) == "owner/name"
    # Without a network it is found in the cache.
    text_again, fetched = fetched_from_hub(
        repository, tmp_path / "home", None, str(model), offline=True
    )
    assert (text_again, fetched) == (text, [])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "owner/name on the hub has no config.json, so it is no ControlNetModel folder."),
        ("ControlNetUnionModel", "--controlnet owner/name is of the class 'ControlNetUnionModel'"),
        ("ControlNetModel", "owner/name on the hub has no weights of a ControlNet"),
    ],
)
def test_what_is_no_controlnet_is_not_fetched(
    tmp_path: Path, config: str | None, said: str
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    weights = DIFFUSERS if config == "ControlNetUnionModel" else "canny"
    (repository / f"{weights}.safetensors").write_bytes(bytes(100))
    if config is not None:
        (repository / "config.json").write_text(json.dumps({"_class_name": config}))
    text, fetched = fetched_from_hub(repository, tmp_path / "home", None, "emoji")
    assert text.startswith(said)
    assert set(fetched) <= {"config.json"}


def test_a_repository_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    snapshot = hub_cache(embedded.MODEL, tmp_path)
    home = tmp_path / "models--owner--name"
    assert model_folder(str(home)) == model_folder(str(snapshot)) == snapshot
    assert model_name(str(home), snapshot) == "owner/name"
    assert resolve_decoder(str(home), "emoji") == snapshot

    # The only snapshot is meant, whatever the branch says.
    (home / "refs/main").write_text("another commit")
    assert model_folder(str(home)) == snapshot
    (home / "snapshots/fedcba").mkdir()
    with pytest.raises(
        HipaError, match=r"has 2 snapshots, and refs/main.* Give .*0123456789abcdef"
    ):
        model_folder(str(home))
    (home / "refs/main").write_text(f"{snapshot.name}\n")
    assert model_folder(str(home)) == snapshot
    shutil.rmtree(home / "snapshots")
    (home / "snapshots").mkdir()
    with pytest.raises(HipaError, match=r"has 0 snapshots.* Download the model again"):
        model_folder(str(home))


@pytest.mark.parametrize(
    ("size", "repository"), [("sd15", TAESD), ("sdxl", TAESDXL), ("vega", TAESDXL)]
)
def test_the_tiny_decoder_is_the_one_for_the_models_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, repository: str
) -> None:
    """Both have four channels: the other one would decode a wrong image without a word."""
    import huggingface_hub

    asked = []

    def download(name: str) -> str:
        asked.append(name)
        if len(asked) > 2:
            raise OSError("no network")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = str(write_config(size, tmp_path / "model"))
    assert resolve_decoder("tiny", model) == tmp_path / repository
    assert resolve_encoder("tiny", model) == tmp_path / repository
    assert resolve_decoder("full", model) is None
    assert asked == [repository] * 2
    name = repository.rpartition("/")[2]
    with pytest.raises(HipaError, match=f"hf download {repository} --local-dir {name}. Then"):
        resolve_encoder("tiny", model)


def test_what_a_manifest_calls_a_model(tmp_path: Path) -> None:
    assert model_name("owner/name", Path("elsewhere/folder")) == "owner/name"
    assert model_name("emoji", embedded.MODEL) == "emoji"
    assert model_name(str(tmp_path), tmp_path) == tmp_path.name


def test_a_folder_around_one_checkpoint(tmp_path: Path) -> None:
    """As a clone of a repository of checkpoints is."""
    (tmp_path / "v1-5.CKPT").touch()
    with pytest.raises(HipaError, match=r"has no model_index.json.* such as .*v1-5.CKPT"):
        model_folder(str(tmp_path))


def test_a_lora_beside_or_in_place_of_a_model(tmp_path: Path) -> None:
    """It is never left out in silence."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(HipaError, match=r"holds a LoRA, not a model.* as --lora .*mine/pytorch"):
        model_folder(str(folder))
    (folder / "model_index.json").write_text("{}")
    with pytest.warns(HipaWarning, match=r"is not loaded with the model: only --lora"):
        assert model_folder(str(folder)) == folder
