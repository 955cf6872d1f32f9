"""What a GPU machine without a network is given."""

from __future__ import annotations

from benchmarks.gpu import run
from benchmarks.gpu.wheels import EXTRAS, packages, pinned


def names(wanted: list[str]) -> set[str]:
    return {line.replace("<=", "==").partition("==")[0] for line in wanted}


def test_everything_is_there_but_torch():
    wanted = names(packages(EXTRAS, "3.12"))
    needed = {*run.NEEDED.values(), *run.OPTIONAL.values()} - {"torch"}
    assert needed <= wanted
    assert "torch" not in wanted
    assert "onnxruntime" not in wanted  # onnxruntime-gpu installs the same module
    assert not any(name.startswith("nvidia-") for name in wanted)
    # Of pydantic's own requirements: the closure is followed.
    assert {"pydantic-core", "huggingface-hub", "markupsafe"} <= wanted


def test_tensorrt_comes_where_it_is_asked_for():
    assert "tensorrt-rtx" not in names(packages(["train"], "3.12"))
    assert {"tensorrt-rtx", "cuda-python"} <= names(packages(["rtx"], "3.12"))


def test_the_versions_are_those_of_the_constraints():
    wanted = packages(["train", "export"], "3.12")
    assert f"diffusers=={pinned('3.12')['diffusers']}" in wanted
    assert f"onnxruntime-gpu<={pinned('3.12')['onnxruntime']}" in wanted
    assert all("=" in line for line in wanted)


def test_a_pin_for_another_python_does_not_count():
    assert "click" in pinned("3.12")
    assert pinned("3.10").get("matplotlib") != pinned("3.12")["matplotlib"]
