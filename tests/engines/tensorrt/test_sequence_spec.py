"""Several stages as one: what goes in from outside, and what comes out."""

from __future__ import annotations

import pytest

from hipa_deploy.bundle.manifest import Axis, StageSpec, TensorSpec
from hipa_deploy.engines.tensorrt.sequence_spec import sequence_spec
from hipa_deploy.errors import HipaError


def tensor(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


TOKENS = tensor("tokens", "int64", 1, 3)
CONTEXT = tensor("context", "float16", 1, 3)
NOISE = tensor("noise", "float32", 1, 3)
LATENTS = tensor("latents", "float32", 1, 3)
TEXT = StageSpec(name="text_encoder", inputs=(TOKENS,), outputs=(CONTEXT,))
UNET = StageSpec(name="unet", inputs=(NOISE, CONTEXT), outputs=(LATENTS,))


def test_a_tensor_between_two_stages_is_neither_input_nor_output():
    whole = sequence_spec([TEXT, UNET])
    assert whole.name == "text_encoder+unet"
    assert whole.inputs == (TOKENS, NOISE)
    assert whole.outputs == (LATENTS,)


def test_axes_of_all_stages_are_kept():
    batch = Axis(min=1, opt=1, max=2)
    open_context = tensor("context", "float16", "batch", 3)
    text = TEXT.model_copy(update={"outputs": (open_context,), "axes": {"batch": batch}})
    assert sequence_spec([text]).axes == {"batch": batch}


def test_stages_that_do_not_agree_on_a_tensor_are_refused():
    other = UNET.model_copy(update={"inputs": (NOISE, tensor("context", "float32", 1, 3))})
    with pytest.raises(
        HipaError, match=r"unet: context is float32 \[1, 3\], before it float16 \[1, 3\]"
    ):
        sequence_spec([TEXT, other])
