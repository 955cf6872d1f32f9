"""Loading a bundle to serve: what is looked at, in which order, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.serve.serve_metrics import ServeMetrics
from hipa_deploy.serve.served import Models, ServedBundle
from hipa_deploy.serve.settings import Limits


@pytest.fixture
def served(bundles: dict[str, Bundle]) -> ServedBundle:
    """It has adaptors."""
    return ServedBundle("m", bundles["tiny"].root)


def test_swaps_are_checked_before_the_first_images(
    served: ServedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first images left ready, such as CUDA graphs, is not looked at any more."""
    done = []

    def check(pipe: OneStepPipeline) -> None:
        done.append("check")
        raise HipaError("it takes none")

    warmup = OneStepPipeline.warmup

    def warm(pipe: OneStepPipeline, largest: int | None = None) -> object:
        done.append("warm-up")
        return warmup(pipe, largest)

    monkeypatch.setattr(OneStepPipeline, "check_swaps", check)
    monkeypatch.setattr(OneStepPipeline, "warmup", warm)
    served.load("onnxruntime", Limits(batch=1), ServeMetrics())
    try:
        assert done == ["check", "warm-up"]
        assert served.swap_problem == "it takes none"
        assert served.ready
    finally:
        served.close()


@pytest.mark.parametrize("method", ["check_swaps", "warmup"])
def test_a_failure_of_any_kind_closes_the_pipeline(
    method: str, served: ServedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close = OneStepPipeline.close

    def note(pipe: OneStepPipeline) -> None:
        closed.append(pipe)
        close(pipe)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA is gone")

    monkeypatch.setattr(OneStepPipeline, "close", note)
    monkeypatch.setattr(OneStepPipeline, method, fail)
    with pytest.raises(RuntimeError, match="CUDA is gone"):
        served.load("onnxruntime", Limits(batch=1), ServeMetrics())
    assert len(closed) == 1
    assert not served.ready


def test_a_link_serves_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prod").symlink_to(BUNDLE)
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for given in ("../prod", str(tmp_path / "prod"), "../prod/"):
        assert list(Models([given]).by_name) == ["prod"]
    monkeypatch.chdir(BUNDLE)
    assert list(Models(["."]).by_name) == ["bundle"]
