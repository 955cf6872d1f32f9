"""Hostile model folders, adaptors, LoRAs, recipes and checkpoints: see test_hostile.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.hostile.harness import Format, Samples, Worker
from tests.hostile.model_formats import FORMATS

CASES = int(os.environ.get("HIPA_FUZZ_CASES", "3"))

# Examples that once were tracebacks, hangs, crashes or wrong: format, edits.
KEPT = [
    ("model index", [("set", ("unet", 0), "os")]),
    ("unet config", [("set", ("block_out_channels", 0), 10**9)]),
    ("unet config", [("set", ("layers_per_block",), 10**6)]),
    ("text config", [("set", ("num_hidden_layers",), 10**9)]),
    ("scheduler config", [("set", ("num_train_timesteps",), 10**12)]),
    ("run state", [("value", 4, 10**9)]),
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
    what = BY_NAME[name]
    outcome = worker.run(samples.changed(what, edits), what.command)
    assert outcome.fault is None
    assert outcome.code == 1, "it was accepted"


@pytest.mark.parametrize("what", FORMATS, ids=lambda what: what.name)
def test_hostile_files(what: Format, worker: Worker, samples: Samples) -> None:
    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize="HIPA_FUZZ_CASES" not in os.environ,
        phases=tuple(Phase) if "HIPA_FUZZ_CASES" in os.environ else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        edits = data.draw(samples.edits(what))
        outcome = worker.run(samples.changed(what, edits), what.command)
        assert outcome.fault is None

    check()
