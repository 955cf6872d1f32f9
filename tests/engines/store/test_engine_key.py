"""Keys of engines: what makes two of them equal, and what a difference reads like."""

from __future__ import annotations

from pathlib import Path

from hipa_deploy.engines.store.engine_key import differences, key_for
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import Target


def test_equal_keys_have_no_difference_and_one_short_name(make_bundle):
    bundle = make_bundle(stages=("unet",))
    target = Target(name="t", compute_capabilities=(89,))
    plain = key_for(bundle, "unet", "rtx", "1.7", target, BuildOptions())
    cached = key_for(bundle, "unet", "rtx", "1.7", target, BuildOptions(timing_cache=Path("cache")))
    assert differences(plain, cached) == []
    assert plain.short == cached.short


def test_other_options_are_a_difference_and_another_short_name(make_bundle):
    bundle = make_bundle(stages=("unet",))
    target = Target(name="t", compute_capabilities=(89,))
    plain = key_for(bundle, "unet", "rtx", "1.7", target, BuildOptions())
    other = key_for(bundle, "unet", "rtx", "1.7", target, BuildOptions(optimization_level=0))
    assert [str(difference) for difference in differences(plain, other)] == [
        'options was {}, is {"optimization_level":0}'
    ]
    assert other.short != plain.short
