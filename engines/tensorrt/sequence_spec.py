"""Several stages that run one after the other, seen as one stage."""

from __future__ import annotations

from collections.abc import Sequence

from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.errors import HipaError


def sequence_spec(specs: Sequence[StageSpec]) -> StageSpec:
    """The stages in this order as one: inputs from outside, and outputs that no stage uses.

    Example:
        The text encoder (tokens -> context), the UNet (noise, context -> latents) and the decoder
        (latents -> images) are together a stage (tokens, noise -> images).

    Raises:
        HipaError: two stages have a tensor of one name with different dtypes or shapes.

    """
    computed: dict[str, TensorSpec] = {}
    inputs: dict[str, TensorSpec] = {}
    used: set[str] = set()
    for spec in specs:
        for tensor in spec.inputs:
            # Either an earlier stage computes it, or it comes from outside.
            known = computed.get(tensor.name) or inputs.setdefault(tensor.name, tensor)
            if known != tensor:
                raise HipaError(
                    f"{spec.name}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, "
                    f"before it {known.dtype} {list(known.shape)}. Export the bundle again."
                )
            used.add(tensor.name)
        for tensor in spec.outputs:
            computed[tensor.name] = tensor

    axes = {}
    for spec in specs:
        axes.update(spec.axes)
    return StageSpec(
        name="+".join(spec.name for spec in specs),
        inputs=tuple(inputs.values()),
        outputs=tuple(tensor for name, tensor in computed.items() if name not in used),
        axes=axes,
    )
