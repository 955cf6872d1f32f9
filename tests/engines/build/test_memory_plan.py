"""The memory plan, for invented machines and for bundles whose large files are sparse."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Cost
from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.build.memory_plan import (
    HOST_BASE_MIB,
    HOST_PER_WEIGHT,
    RUNTIME_MIB,
    TINY_BYTES_PER_PIXEL,
    TINY_WEIGHTS_MIB,
    plan_memory,
    plan_stages,
    render_memory_plan,
)
from hipa_deploy.engines.targets import memory_needs
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.memory_needs import Need
from hipa_deploy.engines.targets.run_memory import StageSize, engine_activations_mib
from hipa_deploy.engines.targets.target import load_target_profile
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import ORIN, RTX_4090

MIB = 1 << 20
ACTIVATIONS = 73  # of the UNet's engine: 1.45 times the 50 MiB of its graph


@pytest.fixture
def bundle(make_bundle, monkeypatch) -> Bundle:
    """A bundle of two stages, on a machine with 4000 MiB of memory and 500 MiB of swap.

    'unet' has 1000 MiB of weights and 50 MiB of activations. 'vae_decoder' has 100 MiB of weights,
    and its activations are not known.
    """
    made = make_bundle()
    for stage, mib in (("unet", 1000), ("vae_decoder", 100)):
        files = list(made.stage_path(stage).parent.glob("*"))
        # The first file grows, without any blocks on disk, until all files together have the size.
        os.truncate(files[0], mib * MIB - sum(path.stat().st_size for path in files[1:]))

    cost = Cost(flops=0, weight_bytes=0, io_bytes=0, activation_bytes=50 * MIB)
    costs = {"unet": cost, "vae_decoder": None}
    stages = []
    for stage in made.manifest.stages:
        stages.append(stage.model_copy(update={"cost": costs[stage.spec.name]}))

    monkeypatch.setattr(memory_needs, "available_memory_mib", lambda: 4000)
    monkeypatch.setattr(memory_needs, "free_swap_mib", lambda: 500)
    return Bundle(made.root, made.manifest.model_copy(update={"stages": tuple(stages)}))


def machine(gpu=None, jetson=None) -> Device:
    return Device(
        cpu="c",
        cores=2,
        memory_mib=8000,
        os="o",
        arch="a",
        python="3",
        l4t=None,
        gpu=gpu,
        jetson=jetson,
        backends=(),
    )


def plan(bundle, library, target="auto", device=None, stages=("unet", "vae_decoder"), **options):
    device = device or machine()
    return plan_memory(bundle, stages, library, target, BuildOptions(**options), device)


def test_tensorrt_rtx_compiles_on_the_host_and_the_largest_stage_counts(bundle):
    planned = plan(bundle, "rtx")
    unet, decoder = planned.stages
    assert (unet.weights, unet.activations, unet.build_gpu) == (1000, ACTIVATIONS, None)
    assert (decoder.weights, decoder.activations) == (100, None)
    building, disk = planned.needs
    assert building.need == unet.build_host == round(HOST_BASE_MIB + HOST_PER_WEIGHT * 1000)
    assert (building.where, building.have, building.verdict) == ("this machine", 4000, "fits")
    assert disk.need == pytest.approx(1100 * 1.1 + 16, abs=1)
    planned.refuse_misfits()


@pytest.mark.parametrize(("graph_mib", "engine_mib"), [(0, 32), (22, 32), (23, 34), (512, 743)])
def test_an_engine_takes_more_than_its_graph(graph_mib, engine_mib):
    assert engine_activations_mib(graph_mib * MIB) == engine_mib


def test_attention_that_is_fused_counts_where_it_is_known():
    """A bundle of an older version has the sum with all scores alone."""
    cost = Cost(flops=0, weight_bytes=0, io_bytes=0, activation_bytes=500)
    assert cost.engine_activation_bytes == 500
    fused = cost.model_copy(update={"fused_activation_bytes": 50})
    assert fused.engine_activation_bytes == 50


def test_only_the_stages_to_build_count(bundle):
    planned = plan(bundle, "rtx", stages=())
    assert planned.stages == ()
    assert [need.what for need in planned.needs] == ["engines: disk"]


def test_a_named_target_says_whether_the_whole_pipeline_runs_there(bundle):
    running = plan(bundle, "rtx", "rtx4090").needs[-1]
    assert running.where == "GeForce RTX 4090"
    assert running.need == RUNTIME_MIB + 1000 + ACTIVATIONS + 100
    assert running.verdict == "fits"
    assert plan(bundle, "rtx", "rtx40").needs[-1].verdict == "unknown"  # a family: cards differ


def test_on_a_jetson_host_and_gpu_share_one_memory(bundle):
    planned = plan(bundle, "tensorrt", device=machine(ORIN), workspace_mib=300)
    building, _, running = planned.needs
    gpu = 1000 + ACTIVATIONS + 300
    assert planned.stages[0].build_gpu == gpu
    assert building.what == "building: shared memory"
    assert building.need == planned.stages[0].build_host + gpu + RUNTIME_MIB
    assert building.verdict == "does not fit"
    assert running.where == "this machine"
    numbers = (
        r"on this machine takes about 5,\d+ MiB \(available: 4,000 MiB and 500 MiB of swap\)\. "
        r"What would fit: .*Close other programs"
    )
    with pytest.raises(HipaError, match=numbers):
        planned.refuse_misfits()


def test_swap_can_hold_the_part_of_the_host(bundle, monkeypatch):
    monkeypatch.setattr(memory_needs, "free_swap_mib", lambda: 3000)
    planned = plan(bundle, "tensorrt", device=machine(ORIN))
    assert planned.needs[0].verdict == "fits with swap"
    planned.refuse_misfits()


def test_a_discrete_gpu_has_its_own_memory(bundle):
    host, gpu, _, running = plan(bundle, "tensorrt", device=machine(RTX_4090)).needs
    assert (host.what, gpu.what, running.what) == (
        "building: memory",
        "building: GPU memory",
        "running: GPU memory",
    )
    assert gpu.have == RTX_4090.memory_mib


def test_the_memory_of_another_jetson_comes_from_its_data_file(bundle):
    building, _, running = plan(bundle, "tensorrt", "orin-nano").needs
    assert building.where == running.where == "Jetson Orin Nano 8 GB"
    assert building.have == running.have == round(8192 * 0.93) - 1024
    assert building.verdict == "fits"


def test_one_jetson_is_not_another(bundle):
    agx = machine(ORIN, "NVIDIA Jetson AGX Orin Developer Kit")
    assert plan(bundle, "tensorrt", "agx-orin", agx).needs[0].where == "this machine"
    assert plan(bundle, "tensorrt", "orin-nano", agx).needs[0].where == "Jetson Orin Nano 8 GB"


def test_a_full_disk_is_refused_with_numbers(bundle, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=MIB))
    message = r"engines: disk on .* about 1,2\d\d MiB \(available: 1 MiB\)\. Free some disk"
    with pytest.raises(HipaError, match=message):
        plan(bundle, "rtx").refuse_misfits()


@pytest.mark.parametrize(
    ("weights", "fits"), [(1414, True), (2540, True), (4897, False)], ids=["vega", "ssd-1b", "sdxl"]
)
def test_sdxl_is_refused_with_numbers_where_its_relatives_build(monkeypatch, weights, fits):
    """The UNets' true sizes, and a machine with 15 GiB that are free."""
    monkeypatch.setattr(memory_needs, "available_memory_mib", lambda: 15 * 1024)
    monkeypatch.setattr(memory_needs, "free_swap_mib", lambda: 0)
    sizes = (StageSize(stage="unet", weights=weights, activations=290),)
    planned = plan_stages(sizes, ("unet",), "rtx", None, BuildOptions(), machine())
    if fits:
        planned.refuse_misfits()
        return
    numbers = r"building: memory on this machine takes about 16,490 MiB \(available: 15,360 MiB\)"
    with pytest.raises(HipaError, match=numbers):
        planned.refuse_misfits()


def test_too_little_to_run_has_its_own_remedy(bundle, monkeypatch):
    small = RTX_4090.model_copy(update={"memory_mib": 1000})
    message = r"running: GPU memory .* takes about 1,873 MiB \(available: 1,000 MiB\)\. Close other"
    with pytest.raises(HipaError, match=message):
        plan(bundle, "rtx", device=machine(small)).refuse_misfits()


SD15 = (
    StageSize(stage="text_encoder", weights=235, activations=2),
    StageSize(stage="unet", weights=1640, activations=150),
    StageSize(stage="vae_decoder", weights=95, activations=700),
)
TINY = StageSize(stage="vae_decoder", weights=3, activations=96)
NAMES = tuple(size.stage for size in SD15)


def plan_sd15(library="tensorrt", target="orin-nano", sizes=SD15, swap_mib=None, **options):
    """The plan of another device than this machine."""
    profile = load_target_profile(target)
    if "memory_gib" in options:
        profile = profile.model_copy(update={"memory_gib": options.pop("memory_gib")})
    return plan_stages(
        sizes,
        NAMES,
        library,
        profile,
        BuildOptions(**options),
        machine(),
        tiny=TINY,
        swap_mib=swap_mib,
    )


def test_a_run_counts_the_largest_activations_once():
    run = plan_sd15().run
    assert run.own_activations == 235 + 1640 + 95 + 2 + 150 + 700
    assert run.shared_activations == 235 + 1640 + 95 + 700
    assert run.text_encoder_apart == 1640 + 95 + 700
    assert run.one_at_a_time == 1640 + 150
    assert plan_sd15().needs[-1].need == RUNTIME_MIB + run.shared_activations


@pytest.mark.parametrize(
    ("memory_gib", "need", "verdict"),
    [(6, 2435, "fits"), (4, 1790, "fits with --low-memory"), (3, 1790, "does not fit")],
)
def test_a_run_may_fit_in_low_memory_mode_alone(memory_gib, need, verdict):
    """At 4 GiB 2,785 MiB are left beside the system: too few for UNet and decoder together."""
    running = plan_sd15(memory_gib=memory_gib).needs[-1]
    assert (running.low_memory, running.verdict) == (RUNTIME_MIB + need, verdict)


def test_what_would_fit_is_listed_with_its_figure():
    planned = plan_sd15(memory_gib=6, workspace_mib=1024)
    (building,) = planned.misfits
    assert building.what == "building: shared memory"
    host = round(HOST_BASE_MIB + HOST_PER_WEIGHT * 1640)
    assert building.need == host + 1640 + 150 + 1024 + RUNTIME_MIB
    over = building.need - building.have
    ways = {way.change: way.need for way in planned.ways}
    # Neither the decoder nor the text encoder is the largest stage to build.
    assert list(ways) == ["--workspace 256", f"{-(-over // 1024)} GiB of swap"]
    assert ways["--workspace 256"].need == building.need - 1024 + 256
    assert ways[f"{-(-over // 1024)} GiB of swap"].verdict == "fits with swap"
    with pytest.raises(
        HipaError, match=r"What would fit: \d GiB of swap \(9,\d\d\d MiB, fits with"
    ):
        planned.refuse_misfits()


def with_decoder(activations: int) -> tuple[StageSize, ...]:
    """SD 1.5 with another decoder, as at a larger batch."""
    return (*SD15[:-1], StageSize(stage="vae_decoder", weights=95, activations=activations))


def test_each_of_two_memories_has_its_largest_stage():
    """The UNet takes the most of the host, and the decoder of the GPU."""
    planned = plan_stages(
        with_decoder(4000), NAMES, "tensorrt", None, BuildOptions(), machine(RTX_4090)
    )
    host, gpu = planned.needs[:2]
    assert host.need == round(HOST_BASE_MIB + HOST_PER_WEIGHT * 1640)
    assert gpu.need == 95 + 4000 + RUNTIME_MIB


def test_in_one_memory_the_stage_counts_that_swap_can_hold_least_of():
    """The UNet takes more, and swap holds most of that."""
    planned = plan_sd15(sizes=with_decoder(6000), swap_mib=4096)
    (building,) = planned.misfits[:1]
    host = round(HOST_BASE_MIB + HOST_PER_WEIGHT * 95)
    assert (building.need, building.pageable) == (host + 95 + 6000 + RUNTIME_MIB, host)
    ways = {way.change: way.need for way in planned.ways if way.need.what == building.what}
    assert list(ways) == ["hipa-export --decoder tiny"]
    # Then the UNet counts.
    assert ways["hipa-export --decoder tiny"].need > building.need
    assert ways["hipa-export --decoder tiny"].verdict == "fits with swap"


def test_swap_is_no_remedy_where_another_stage_still_does_not_fit():
    planned = plan_sd15(sizes=with_decoder(6000), swap_mib=0)
    assert planned.needs[0].need == plan_sd15().needs[0].need, "the UNet takes the most"
    ways = {way.change: way.need.verdict for way in planned.ways}
    assert ways["2 GiB of swap"] == "does not fit"


def test_a_change_may_leave_nothing_to_build(monkeypatch):
    monkeypatch.setattr(memory_needs, "available_memory_mib", lambda: 500)
    monkeypatch.setattr(memory_needs, "free_swap_mib", lambda: 0)
    planned = plan_stages(SD15, ("text_encoder",), "rtx", None, BuildOptions(), machine())
    message = r"building: memory .*What would fit: hipa-export --prompts \(0 MiB, fits\)"
    with pytest.raises(HipaError, match=message):
        planned.refuse_misfits()


def test_swap_that_will_be_there_counts():
    assert plan_sd15(memory_gib=6, swap_mib=8 * 1024).needs[0].verdict == "fits with swap"
    assert plan_sd15(memory_gib=6, swap_mib=1).needs[0].verdict == "does not fit"


def test_what_would_make_a_run_smaller():
    planned = plan_sd15("rtx", "rtx4090", memory_gib=2)
    ways = {way.change: way.need for way in planned.ways}
    assert {change: need.need - RUNTIME_MIB for change, need in ways.items()} == {
        "hipa-export --decoder tiny": 235 + 1640 + 3 + 150,
        "hipa-export --prompts": 1640 + 95 + 700,
        "--low-memory": 1640 + 150,
        "all of these": 1640 + 150,
    }
    assert {need.verdict for need in ways.values()} == {"does not fit"}


def test_the_base_unet_counts_beside_the_stages():
    """It is no stage of the one step: a run without refining never loads it."""
    teacher = StageSize(stage="teacher", weights=1700, activations=160)
    with_it = plan_sd15("rtx", "rtx4090", memory_gib=4, sizes=(*SD15, teacher))
    without = plan_sd15("rtx", "rtx4090", memory_gib=4)
    assert with_it.run == without.run
    assert [need.what for need in with_it.needs[-2:]] == [
        "running: GPU memory",
        "refining: GPU memory",
    ]
    assert with_it.needs[-2] == without.needs[-1]
    refining = with_it.needs[-1]
    assert refining.need == without.needs[-1].need + 1700 + 160
    # In low-memory mode nothing is beside it.
    assert refining.low_memory == RUNTIME_MIB + max(1700 + 160, 1640 + 95 + 700)
    assert refining.verdict == "fits with --low-memory"
    assert not with_it.misfits


def test_a_base_unet_that_does_not_fit_can_be_left_out():
    teacher = StageSize(stage="teacher", weights=2600, activations=160)
    with_it = plan_sd15("rtx", "rtx4090", memory_gib=3, sizes=(*SD15, teacher))
    without = plan_sd15("rtx", "rtx4090", memory_gib=3)
    refining = with_it.misfits[-1]
    assert refining.what == "refining: GPU memory"
    ways = {way.change: way.need for way in with_it.ways if way.need.what == refining.what}
    assert ways["hipa-export without --with-teacher"].need == without.needs[-1].need
    assert ways["--low-memory"].need == RUNTIME_MIB + 2600 + 160
    with pytest.raises(HipaError, match="refining: GPU memory"):
        with_it.refuse_misfits()


def test_the_tiny_decoder_of_a_bundle_is_known_by_its_pixels(bundle):
    planned = plan(bundle, "rtx", device=machine(RTX_4090.model_copy(update={"memory_mib": 100})))
    tiny = {way.change: way.need.need for way in planned.ways}["hipa-export --decoder tiny"]
    assert tiny == RUNTIME_MIB + 1000 + ACTIVATIONS + TINY_WEIGHTS_MIB
    assert TINY_BYTES_PER_PIXEL * 512 * 512 == 96 * MIB


@given(*[st.integers(0, 10_000)] * 4)
def test_a_need_that_fits_never_stops_fitting_with_more(need, have, swap, pageable):
    order = ["does not fit", "fits with swap", "fits"]
    pageable = min(pageable, need)
    one = Need(what="w", where="x", need=need, have=have, swap=swap, pageable=pageable)
    more = one.model_copy(update={"have": have + 1, "swap": swap + 1})
    assert order.index(more.verdict) >= order.index(one.verdict)
    assert (one.verdict == "does not fit") == (need > have + min(swap, pageable))


def test_the_tables_show_every_number(bundle):
    console = Console(record=True, width=140)
    tables = render_memory_plan(plan(bundle, "tensorrt", device=machine(ORIN)))
    console.print(*tables, sep="\n")
    text = console.export_text()
    for part in ("unet", "1,000", "3,630", "does not fit", "this machine", "500"):
        assert part in text
