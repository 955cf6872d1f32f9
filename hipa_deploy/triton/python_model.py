"""What Triton's Python backend calls. Every repository's model.py imports the class from here.

Source: https://github.com/triton-inference-server/python_backend, "Business Logic Scripting".
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from hipa_deploy.errors import HipaError
from hipa_deploy.triton.bundle_model import BundleModel

_DRAWN_SEEDS = 2**53  # as hipa-serve draws them
_INPUTS = ("prompt", "seed", "image", "mask", "strength", "scale")


class TritonPythonModel:
    """Answers requests one by one; the schedulers of the stages join those of several instances."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle's text files. Triton loads the stages."""
        parameters = json.loads(args["model_config"])["parameters"]
        models = {stage: value["string_value"] for stage, value in parameters.items()}
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._model = BundleModel(folder, models, _infer)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request, in order."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:
        try:
            given = _arrays(request)
            seed = _number(given, "seed")
            seed = secrets.randbelow(_DRAWN_SEEDS) if seed is None else int(seed)
            result = self._model.image(
                given["prompt"].reshape(-1)[0].decode(),
                seed,
                given.get("image"),
                given.get("mask"),
                _number(given, "strength"),
                _number(given, "scale"),
            )
        except (HipaError, UnicodeDecodeError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        parameters = json.dumps(result.parameters[0], sort_keys=True)
        outputs = [
            pb_utils.Tensor("image", np.ascontiguousarray(result.images_BHWC[0])),
            pb_utils.Tensor("parameters", np.asarray([parameters.encode()], object)),
        ]
        return pb_utils.InferenceResponse(output_tensors=outputs)


def _arrays(request: Any) -> dict[str, np.ndarray]:
    """The inputs that a request has, by name."""
    found = {}
    for name in _INPUTS:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            found[name] = tensor.as_numpy()
    return found


def _number(given: Mapping[str, np.ndarray], name: str) -> Any:
    """An input of one number; None where the request has none."""
    if name not in given:
        return None
    value = given[name].reshape(-1)[0]
    # 0.8 as float32 is 0.800000011920929. The image's parameters have the number that was sent.
    return float(str(value)) if isinstance(value, np.floating) else value.item()


def _infer(
    model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    """Run a stage in this server, with its outputs in host memory."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    response = request.exec()
    if response.has_error():
        raise HipaError(f"Triton cannot run {model}: {response.error().message()}")
    found = {}
    for name in outputs:
        found[name] = pb_utils.get_output_tensor_by_name(response, name).as_numpy()
    return found
