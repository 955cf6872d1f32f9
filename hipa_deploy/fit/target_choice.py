"""What ``--for TARGET`` sets, and which options of the user it leaves as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hipa_deploy.engines.targets.target import TargetProfile, load_target_profile, target_names
from hipa_deploy.errors import HipaError, brief


@dataclass(frozen=True)
class TargetChoice:
    """The options of a command for one target.

    Attributes:
        target: the name that was given to ``--for``.
        title: what the target is.
        values: what is in force, by option.
        overridden: what the target would have taken in place of an option of the user, by option.

    """

    target: str
    title: str
    values: Mapping[str, Any]
    overridden: Mapping[str, Any]

    def lines(self) -> list[str]:
        """What was chosen, for the user to read.

        Example:
            >>> choose("orin-nano", {"--decoder": "tiny", "--batch": 1}, {"--batch": 2}).lines()
            ['for Jetson Orin Nano 8 GB: --decoder tiny', 'yours: --batch 2, where … has 1']

        """
        taken = []
        for option, value in self.values.items():
            if option not in self.overridden:
                taken.append(f"{option} {value}")
        lines = [f"for {self.title}: {' '.join(taken) or 'nothing but what you named'}"]
        for option, value in self.overridden.items():
            lines.append(f"yours: {option} {self.values[option]}, where {self.target} has {value}")
        return lines


def profile_for(target: str) -> TargetProfile:
    """The data of a target of ``--for``.

    Raises:
        HipaError: there is no such target.

    """
    if target not in target_names():
        names = ", ".join(target_names())
        raise HipaError(f"--for {brief(target)} is no target. Expected one of: {names}.")
    return load_target_profile(target)


def choose(target: str, wishes: Mapping[str, Any], given: Mapping[str, Any]) -> TargetChoice:
    """Join what suits a target with what the user named: an option of the user wins.

    Args:
        target: a name in ``engines/targets``.
        wishes: what suits the target, by option; None where nothing does.
        given: what the user named, by option.

    Raises:
        HipaError: there is no such target.

    """
    profile = profile_for(target)
    values = {}
    overridden = {}
    for option, wish in wishes.items():
        if wish is None:
            continue
        values[option] = given.get(option, wish)
        if values[option] != wish:
            overridden[option] = wish
    return TargetChoice(target, profile.title, values, overridden)


def export_choice(target: str, given: Mapping[str, Any]) -> TargetChoice:
    """What ``hipa-export --for TARGET`` takes.

    Args:
        target: a name in ``engines/targets``.
        given: what the user named, by option.

    Raises:
        HipaError: there is no such target.

    """
    suits = profile_for(target).suits
    wishes = {"--dtype": suits.dtype, "--decoder": suits.decoder, "--batch": suits.batch}
    return choose(target, wishes, given)


def check_build(target: str, given: Mapping[str, Any]) -> None:
    """Refuse what contradicts ``hipa-build --for TARGET``, before this machine is looked at.

    Args:
        target: a name in ``engines/targets``.
        given: what the user named, by option.

    Raises:
        HipaError: there is no such target; or ``given`` has another target, or a library that
            does not build for this one.

    """
    profile = profile_for(target)
    if given.get("--target", target) != target:
        raise HipaError(
            f"--target {given['--target']} is another device than --for {target}. "
            "Leave one of the two out."
        )
    if given.get("--backend") == "rtx" and profile.memory_shared:
        raise HipaError(
            f"--backend rtx: TensorRT-RTX does not support {profile.title}. Leave out --backend."
        )


def build_choice(target: str, given: Mapping[str, Any], *, here: bool) -> TargetChoice:
    """What ``hipa-build --for TARGET`` takes.

    Args:
        target: a name in ``engines/targets``.
        given: what the user named, by option.
        here: this machine is the target. Then its swap is counted, and not what it should have.

    Raises:
        HipaError: as ``check_build``.

    """
    check_build(target, given)
    profile = profile_for(target)
    wishes: dict[str, Any] = {"--backend": profile.suits.backend, "--target": target}
    # TensorRT-RTX measures nothing while it builds, and has no use for limits.
    if given.get("--backend", profile.suits.backend) == "tensorrt":
        wishes["--workspace"] = profile.build.workspace_mib
        wishes["--tactic-dram"] = profile.build.tactic_dram_mib
        wishes["--optimization-level"] = profile.build.optimization_level
    if not here:
        wishes["--swap"] = profile.suits.swap_gib
    return choose(target, wishes, given)
