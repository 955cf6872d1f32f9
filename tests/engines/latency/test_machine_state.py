"""The machine's state around a measurement, and its warnings."""

from __future__ import annotations

import pytest

from hipa_deploy.engines.device.sysfs import Clock
from hipa_deploy.engines.latency import machine_state as state_module
from hipa_deploy.engines.latency.machine_state import Machine, MachineState, Reading, state_warnings
from tests.engines.machine_samples import ORIN, plant


@pytest.fixture(autouse=True)
def no_smi(monkeypatch):
    monkeypatch.setattr(state_module, "ask_smi", lambda name, address: {})


def a_reading(**fields) -> Reading:
    """A reading of a machine that reports nothing but ``fields``."""
    values = {
        "clocks": {},
        "temperatures_c": {},
        "throttled_by": None,
        "overcurrent_events": None,
        "power_w": None,
        "fan_rpm": None,
        "load_average": None,
        "busy_seconds": None,
        "own_seconds": 0.0,
        "at_seconds": 0.0,
    }
    return Reading(**{**values, **fields})


def a_state(before: Reading, after: Reading, root) -> MachineState:
    return Machine(root).state(before, after)


def test_a_jetson(tmp_path):
    machine = Machine(plant(tmp_path, ORIN))
    state = machine.state(machine.read(), machine.read())
    assert MachineState.model_validate_json(state.model_dump_json()) == state
    assert state.power_mode == "MAXN_SUPER (mode 2)"
    assert state.jetpack == "6.2+b77"
    assert state.gpu_governor == "nvhost_podgov"
    assert state.after.power_w == 10.0
    assert state.after.temperatures_c["gpu-thermal"] == 54.5
    assert state_warnings(state, cores=6, on_gpu=True) == (
        "throttled before the runs: gpu-throttle-alert",
        "throttled after the runs: gpu-throttle-alert",
    )


def test_a_discrete_gpu_through_nvidia_smi(tmp_path, monkeypatch):
    smi = {
        "clocks.sm": "1500",
        "clocks.max.sm": "3120",
        "clocks.mem": "10501",
        "clocks.max.mem": "10501",
        "temperature.gpu": "71",
        "power.draw": "310.5",
        "power.limit": "450",
        "pstate": "P2",
        "persistence_mode": "Enabled",
        "reasons": "0x20",
    }
    monkeypatch.setattr(state_module, "ask_smi", lambda name, address: smi if name == "RTX" else {})
    machine = Machine(tmp_path, "RTX")
    state = machine.state(machine.read(), machine.read())
    assert state.power_limit_w == 450
    assert state.performance_state == "P2"
    assert state.persistence == "Enabled"
    assert state.after.power_w == 310.5
    assert state.after.temperatures_c == {"gpu": 71}
    warnings = state_warnings(state, cores=6, on_gpu=True)
    assert warnings[0] == "throttled before the runs: software thermal slowdown"
    assert warnings[2] == "the gpu clock was 1500 of 3120 MHz"
    assert len(warnings) == 3
    assert not any("gpu clock" in text for text in state_warnings(state, cores=6, on_gpu=False))


def test_the_lower_clock_counts_and_a_few_per_cent_do_not(tmp_path):
    def at(mhz: float) -> Reading:
        return a_reading(clocks={"cpu": Clock(now_mhz=mhz, max_mhz=2000)})

    def warned(before: float, after: float) -> tuple[str, ...]:
        return state_warnings(a_state(at(before), at(after), tmp_path), cores=2, on_gpu=False)

    assert warned(1990, 1960) == ()
    assert warned(1000, 2000) == warned(2000, 1000) == ("the cpu clock was 1000 of 2000 MHz",)


def test_only_over_current_during_the_runs_counts(tmp_path):
    def warned(before: int, after: int) -> tuple[str, ...]:
        first = a_reading(overcurrent_events=before)
        last = a_reading(overcurrent_events=after)
        return state_warnings(a_state(first, last, tmp_path), cores=2, on_gpu=True)

    assert warned(37, 37) == ()
    assert warned(37, 40) == (
        "3 throttling events by over-current or under-voltage during the runs",
    )


def test_the_time_of_other_processes_counts_if_it_is_a_tenth_of_the_cores(tmp_path):
    before = a_reading(busy_seconds=100.0, own_seconds=10.0)
    after = a_reading(busy_seconds=130.0, own_seconds=25.0, at_seconds=10.0)
    state = a_state(before, after, tmp_path)
    assert state.others_cores == 1.5
    assert state_warnings(state, cores=2, on_gpu=True) == (
        "other processes took 1.5 cores' time during the runs",
    )
    assert state_warnings(state, cores=16, on_gpu=True) == ()

    unknown = a_reading(busy_seconds=None, at_seconds=10.0)
    assert a_state(before, unknown, tmp_path).others_cores is None
