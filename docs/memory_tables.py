"""Write the tables of memory in the documentation, from the plan's own arithmetic.

    python docs/memory_tables.py

``docs/memory.json`` has the sizes of the stages, by benchmarks/stage_memory.py. What a build and a
run take of a device follows from them as in ``hipa-build --dry-run``: no number is written by hand.
docs/explanation/sdxl.md has the tables of SDXL's family, and a lower bound of its UNets' latency.
tests/test_memory_tables.py checks that the pages are up to date.
"""

from __future__ import annotations

import json
from pathlib import Path

from hipa_deploy.engines.backends.available import ANOTHER_MACHINE
from hipa_deploy.engines.build.memory_plan import MemoryPlan, plan_stages
from hipa_deploy.engines.latency.roofline import peak_of
from hipa_deploy.engines.targets.memory_needs import Need
from hipa_deploy.engines.targets.run_memory import StageSize, engine_activations_mib
from hipa_deploy.engines.targets.target import default_options, load_target_profile, target_names

SIZES = Path(__file__).parent / "memory.json"
PAGE = Path(__file__).parent / "reference/engines.md"
FAMILY_PAGE = Path(__file__).parent / "explanation/sdxl.md"
FAMILY = ("Segmind-Vega", "SSD-1B", "SDXL")  # those of the second page
BEGIN = "<!-- made by docs/memory_tables.py -->\n"
END = "<!-- end -->\n"

SWAP_GIB = 16  # as on the page for Jetson
STAGES = ("text_encoder", "unet", "vae_decoder")


def models(*, family: bool = False) -> dict[str, tuple[StageSize, ...]]:
    """The sizes of the stages of each model, with the full and with the tiny decoder.

    With ``family`` those of SDXL's, without it those of SD 1.x and 2.x.
    """
    found = {}
    for title, stages in json.loads(SIZES.read_text(encoding="utf-8")).items():
        if (title in FAMILY) != family:
            continue
        for decoder, name in (("full", "vae_decoder"), ("tiny", "vae_decoder tiny")):
            sizes = []
            for stage, measured in zip(STAGES, (*STAGES[:2], name), strict=True):
                sizes.append(_size(stage, stages[measured]))
            found[f"{title}, {decoder} decoder"] = tuple(sizes)
    return found


def _size(stage: str, measured: dict[str, int]) -> StageSize:
    return StageSize(
        stage=stage,
        weights=-(-measured["weight_bytes"] >> 20),
        activations=engine_activations_mib(measured["activation_bytes"]),
    )


def plan(sizes: tuple[StageSize, ...], target: str) -> MemoryPlan:
    """What TensorRT takes of a target that is another machine than this one."""
    options = default_options(target, "tensorrt", ANOTHER_MACHINE)
    profile = load_target_profile(target)
    return plan_stages(
        sizes, STAGES, "tensorrt", profile, options, ANOTHER_MACHINE, swap_mib=SWAP_GIB * 1024
    )


def tables(*, family: bool = False) -> str:
    """Both tables, in Markdown."""
    sizes_of = models(family=family)
    lines = [
        "| MiB | own activations | shared | low memory | one at a time |",
        "|---|---|---|---|---|",
    ]
    for title, sizes in sizes_of.items():
        run = plan(sizes, "orin-nano").run
        ways = (
            run.own_activations,
            run.shared_activations,
            run.text_encoder_apart,
            run.one_at_a_time,
        )
        lines.append(_row(title, [f"{mib:,}" for mib in ways]))

    # Families of cards have no memory of their own, and what fits is not known there.
    targets = [name for name in target_names() if load_target_profile(name).memory_gib]
    targets.sort(key=lambda name: load_target_profile(name).memory_gib or 0)
    lines += ["", _row("MiB: build / run", targets), "|---" * (len(targets) + 1) + "|"]
    for title, sizes in sizes_of.items():
        lines.append(_row(title, [_cell(plan(sizes, target)) for target in targets]))
    has = ["" if have is None else f"{have:,}" for have in map(_available, targets)]
    lines.append(_row("available", has))
    return "\n".join(lines) + "\n"


def _row(first: str, cells: list[str] | list[int]) -> str:
    return f"| {first} | {' | '.join(map(str, cells))} |"


def _cell(found: MemoryPlan) -> str:
    """What a build takes of the GPU's memory, and a run."""
    running = found.needs[-1]
    building = found.needs[-2]
    return f"{_figure(building)} / {_figure(running)}"


def _figure(need: Need) -> str:
    marks = {
        "does not fit": " (no)",
        "fits with swap": " (swap)",
        "fits with --low-memory": " (low memory)",
    }
    return f"{need.need:,}{marks.get(need.verdict, '')}"


def _available(target: str) -> int | None:
    (sizes, *_) = models().values()
    return plan(sizes, target).needs[-1].have


def bounds() -> str:
    """The least milliseconds of one call of each UNet of SDXL's family in FP16, in Markdown."""
    stored = json.loads(SIZES.read_text(encoding="utf-8"))
    rows = []
    targets = []
    for name in target_names():
        peak = peak_of(load_target_profile(name), "fp16")
        if peak is None:
            continue
        targets.append(name)
        cells = []
        for title in FAMILY:
            unet = stored[title]["unet"]
            arithmetic = unet["flops"] / (peak.tflops * 1e9)
            memory = unet["weight_bytes"] / (peak.bandwidth_gb_s * 1e6)
            cells.append(f"{max(arithmetic, memory):,.1f}")
        rows.append(_row(name, cells))
    head = [_row("ms: UNet at 1024 px", list(FAMILY)), "|---" * (len(FAMILY) + 1) + "|"]
    return "\n".join([*head, *rows]) + "\n"


def with_tables(page: str, *, family: bool = False) -> str:
    """The page with the tables of today."""
    start = page.index(BEGIN) + len(BEGIN)
    made = tables(family=family)
    if family:
        made += "\n" + bounds()
    return page[:start] + made + page[page.index(END, start) :]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    own = with_tables(FAMILY_PAGE.read_text(encoding="utf-8"), family=True)
    FAMILY_PAGE.write_text(own, encoding="utf-8")
