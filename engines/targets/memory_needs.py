"""Where work runs and what memory is there, and what work needs of it. All sizes are in MiB."""

from __future__ import annotations

from typing import Literal

from hipa_deploy.engines.backends.available import Device
from hipa_deploy.engines.device.machine import available_memory_mib, free_swap_mib
from hipa_deploy.engines.targets.target import TargetProfile
from hipa_deploy.record import Record

# Our allowance, not measured: for the operating system beside us on a Jetson.
SYSTEM_MIB = 1024
# The share of its memory that a device shows: firmware and drivers keep the other part. An Orin
# Nano shows 7,620 of 8,192 MiB.
USABLE = 0.93

Verdict = Literal["fits", "fits with swap", "fits with --low-memory", "does not fit", "unknown"]


class Place(Record):
    """A device with its memory, in MiB; None where a size is not known.

    Attributes:
        name: 'this machine', or the title of a target.
        shared: GPU and host share one memory, which is then counted as the host's.
        host: host memory that is available.
        swap: free swap space.
        gpu: GPU memory.

    """

    name: str
    shared: bool
    host: int | None
    swap: int = 0
    gpu: int | None = None

    @property
    def for_engines(self) -> int | None:
        """What engines can take from."""
        return self.host if self.shared else self.gpu


class Need(Record):
    """One requirement of a build or a run, in MiB.

    Attributes:
        what: the work and the kind of memory, such as 'building: GPU memory'.
        where: the device or the folder.
        need: how much is needed.
        have: how much is available; None where it is not known.
        swap: free swap space.
        pageable: the part of ``need`` that swap can hold. GPU memory cannot be swapped.
        low_memory: what is needed with ``--low-memory``; None where that changes nothing.

    """

    what: str
    where: str
    need: int
    have: int | None
    swap: int = 0
    pageable: int = 0
    low_memory: int | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether it fits."""
        if self.have is None:
            return "unknown"
        over = self.need - self.have
        if over <= 0:
            return "fits"
        if over <= min(self.swap, self.pageable):
            return "fits with swap"
        if self.low_memory is not None and self.low_memory <= self.have:
            return "fits with --low-memory"
        return "does not fit"

    def __str__(self) -> str:
        have = "unknown" if self.have is None else f"{self.have:,} MiB"
        swap = f" and {self.swap:,} MiB of swap" if self.swap else ""
        return (
            f"{self.what} on {self.where} takes about {self.need:,} MiB (available: {have}{swap})"
        )


def this_machine(device: Device) -> Place:
    """Where we are, with what is free now."""
    gpu = device.gpu
    shared = gpu is not None and (gpu.integrated or device.jetson is not None)
    return Place(
        name="this machine",
        shared=shared,
        host=available_memory_mib(),
        swap=free_swap_mib(),
        gpu=None if gpu is None or shared else gpu.memory_mib,
    )


def elsewhere(profile: TargetProfile) -> Place:
    """A target that is not this machine, as its data file describes it."""
    memory = None if profile.memory_gib is None else round(profile.memory_gib * 1024 * USABLE)
    if not profile.memory_shared:
        return Place(name=profile.title, shared=False, host=None, gpu=memory)
    if memory:
        memory -= SYSTEM_MIB
    return Place(name=profile.title, shared=True, host=memory)
