"""Hostile model folders, adaptors, LoRAs, recipes and checkpoints: see test_hostile.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.hostile.harness import Format, Samples, Worker, check_mutations, check_refused
from tests.hostile.model_formats import FORMATS

CASES = int(os.environ.get("HIPA_FUZZ_CASES", "1"))

# Examples that once were tracebacks, hangs, crashes or wrong: format, edits.
KEPT = [
    ("model index", [("set", ("unet", 0), "os")]),
    ("model index", [("set", ("safety_checker", 0), "antigravity")]),
    ("model index", [("content", "deep table")]),
    ("unet config", [("set", ("block_out_channels", 0), 10**9)]),
    ("unet config", [("set", ("layers_per_block",), 10**6)]),
    ("unet config", [("set", ("sample_size",), 10**12)]),
    ("unet config", [("set", ("norm_num_groups",), 0)]),
    ("unet config", [("pipe",)]),
    ("vae config", [("set", ("latent_channels",), -1)]),
    ("text config", [("set", ("num_hidden_layers",), 10**9)]),
    ("text config", [("set", ("hidden_size",), "x")]),
    ("scheduler config", [("set", ("num_train_timesteps",), 10**12)]),
    ("early text config", [("set", ("max_position_embeddings",), 10**400)]),
    ("vocabulary", [("sparse", 40 * 10**9)]),
    ("fast tokenizer", [("content", "deep list")]),
    ("unet weights", [("length", 0, 10**12)]),
    ("unet weights", [("nan", 0, 0)]),
    ("shards", [("set", ("weight_map", "conv_in.weight"), "../../../x.safetensors")]),
    ("pickled unet", [("expand", 0, 0)]),
    ("pickled unet", [("deflate", 0, 0)]),
    ("pickled unet", [("code", 0, 0)]),
    ("adaptor", [("set", ("rank",), 10**18)]),
    ("adaptor", [("set", ("timestep",), -1)]),
    ("adaptor weights", [("device",)]),
    ("adaptor weights", [("sparse", 40 * 10**9)]),
    ("adaptor weights", [("drop", 1, 0)]),
    ("encoder weights", [("pipe",)]),
    ("kohya lora", [("scalar", 1, 0)]),
    ("kohya lora", [("grow", 1, 0)]),
    ("pickled lora", [("empty sparse", 0, 0)]),
    ("pickled lora", [("cycle", 0, 0)]),
    ("peft config", [("set", ("alpha_pattern",), {r"(\w|\w\w|\.)+(?<!.)": 2})]),
    ("peft config", [("set", ("alpha_pattern", "to_q"), "x")]),
    ("pickled lora", [("quantised", 0, 0)]),
    ("pickled embedding", [("code", 0, 0)]),
    ("dry run", [("set", ("cross_attention_dim",), 16_384)]),
    ("decoder", [("content", "digits")]),
    ("decoder config", [("set", ("num_decoder_blocks", 0), 10**9)]),
    ("one-step method", [("set", ("timestep",), 10**400)]),
    ("one-step method", [("set", ("scheduler",), "x" * 100_000)]),
    ("recipe", [("set", ("steps",), 10**400)]),
    ("recipe", [("set", ("adaptor", "rank"), 10**9)]),
    ("recipe", [("set", ("optimiser", "learning_rate"), float("nan"))]),
    ("recipe", [("device",)]),
    ("checkpoint's index", [("set", ("scheduler", 0), "os")]),
    ("run state", [("value", 4, 10**9)]),
    ("run state", [("drop", 5, 0)]),
    ("run state", [("content", "empty")]),
    ("teacher pairs", [("pipe",)]),
]
BY_NAME = {what.name: what for what in FORMATS}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(heavy=True)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("what", FORMATS, ids=lambda what: what.name)
def test_the_sample_is_valid(what: Format, worker: Worker, samples: Samples) -> None:
    outcome = worker.run(samples.changed(what, []), what.command)
    assert outcome.code == 0, outcome.printed


@pytest.mark.parametrize(("name", "edits"), KEPT)
def test_kept_examples(name: str, edits: list, worker: Worker, samples: Samples) -> None:
    check_refused(BY_NAME[name], edits, worker, samples)


@pytest.mark.parametrize("what", FORMATS, ids=lambda what: what.name)
def test_hostile_files(what: Format, worker: Worker, samples: Samples) -> None:
    check_mutations(what, worker, samples, CASES)
