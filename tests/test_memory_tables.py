"""The tables of memory in the documentation are what the plan says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from hipa_deploy.engines.build.memory_plan import TINY_BYTES_PER_PIXEL, TINY_WEIGHTS_MIB
from hipa_deploy.engines.targets.run_memory import engine_activations_mib

ROOT = Path(__file__).parents[1]


def memory_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_tables", ROOT / "docs/memory_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_plan() -> None:
    module = memory_tables()
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.with_tables(page) == page, "run: python docs/memory_tables.py"
    page = module.FAMILY_PAGE.read_text(encoding="utf-8")
    assert module.with_tables(page, family=True) == page, "run: python docs/memory_tables.py"


def test_every_model_and_every_way_to_hold_it() -> None:
    module = memory_tables()
    models = {**module.models(), **module.models(family=True)}
    assert len(models) == 12
    for title, sizes in models.items():
        run = module.plan(sizes, "orin-nano").run
        ways = [
            run.own_activations,
            run.shared_activations,
            run.text_encoder_apart,
            run.one_at_a_time,
        ]
        assert ways == sorted(ways, reverse=True), title
        assert run.text_encoder_apart < run.shared_activations < run.own_activations, title


def test_the_plans_tiny_decoder_is_the_measured_one() -> None:
    """At both sizes: its activations grow with the pixels."""
    for title, sizes in memory_tables().models().items():
        if title.endswith("tiny decoder"):
            pixels = (768 if "768" in title else 512) ** 2
            assert sizes[-1].weights == TINY_WEIGHTS_MIB
            expected = engine_activations_mib(TINY_BYTES_PER_PIXEL * pixels)
            assert sizes[-1].activations == expected, title
