import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.bundle.manifest import Axis, OneStep
from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.axes import example_sizes, parse_axes, stage_axes

STEP = OneStep(
    prediction_type="epsilon", timestep=999, alpha_bar=0.0047, scaling_factor=0.18215,
    latent_shape=(4, 64, 64), height=512, width=512,
)  # fmt: skip


def test_pixels_and_latents_go_together() -> None:
    axes = stage_axes(parse_axes("batch=1:1:4, height=384:512:768"), STEP, 64)
    assert axes.keys() == {"batch", "height", "latent_height"}
    assert axes["latent_height"] == Axis(min=48, opt=64, max=96, multiple=8)
    assert [size for size in (383, 384, 448, 449, 832) if size in axes["height"]] == [384, 448]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("height", "expected batch, height, width"),
        ("depth=1:2:3", "expected batch, height, width"),
        ("batch=1:1:4,batch=1:1:4", "each once"),
        ("batch=4:1:1", "expected min <= opt <= max"),
        ("batch=0:1:4", "from 1 on"),
        ("height=512:512:512", "Use --height 512"),
        ("batch=1:1:1000", "Expected at most 64"),
    ],
)
def test_bad_axes(text: str, message: str) -> None:
    with pytest.raises(HipaError, match=message):
        parse_axes(text)


def test_a_size_the_model_does_not_allow() -> None:
    with pytest.raises(HipaError, match="multiples of 64"):
        stage_axes(parse_axes("width=500:512:768"), STEP, 64)


@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 8), st.integers(1, 3))
def test_examples_are_allowed_and_differ(first: int, more: int, most: int, multiple: int) -> None:
    """Where an axis has no size but 1 and those of other axes, it gets its usual one."""
    smallest, usual, largest = (n * multiple for n in (first, first + more, first + more + most))
    axis = Axis(min=smallest, opt=usual, max=largest, multiple=multiple)
    sizes = example_sizes({"latent_height": axis, "latent_width": axis})
    assert all(size in axis for size in sizes.values())
    choices = [size for size in range(axis.min, axis.max + 1, multiple) if size > 1]
    assert len(set(sizes.values())) >= min(2, len(choices))
