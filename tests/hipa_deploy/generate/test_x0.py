import numpy as np
import pytest
import torch

from hipa_deploy.bundle.manifest import StepMethod
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.x0 import predict_x0, predict_x0_in_a_graph

ALPHA_BAR = 0.0046601


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predict_x0_inverts_the_forward_process(prediction_type: str) -> None:
    x0, eps = initial_noise([1, 2], (4, 8, 8))[:, None]
    a, s = ALPHA_BAR**0.5, (1 - ALPHA_BAR) ** 0.5
    noisy = np.float32(a) * x0 + np.float32(s) * eps
    output = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[prediction_type]
    got = predict_x0(noisy, output.astype(np.float32), ALPHA_BAR, prediction_type)
    np.testing.assert_allclose(got, x0, atol=2e-5)


def test_unknown_prediction_type() -> None:
    with pytest.raises(HipaError, match="flow"):
        predict_x0(np.zeros(1, np.float32), np.zeros(1, np.float32), ALPHA_BAR, "flow")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_tensors_arrays_and_graphs_agree(prediction_type: str) -> None:
    z, output = np.random.default_rng(0).standard_normal((2, 3, 4, 8, 8)).astype(np.float32)
    expected = predict_x0(z, output, ALPHA_BAR, prediction_type)
    for function in (predict_x0, predict_x0_in_a_graph):
        got = function(torch.from_numpy(z), torch.from_numpy(output), ALPHA_BAR, prediction_type)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_combined_in_float32() -> None:
    z, output = torch.randn(2, 1, 4, 8, 8).half()
    assert predict_x0(z, output, ALPHA_BAR, "epsilon").dtype == torch.float32
    assert predict_x0(z.numpy(), output.numpy(), ALPHA_BAR, "epsilon").dtype == np.float32


def test_a_graph_refuses_an_unknown_prediction_type() -> None:
    with pytest.raises(HipaError, match="flow"):
        predict_x0_in_a_graph(torch.zeros(1), torch.zeros(1), 0.5, "flow")


def test_a_method_has_its_own_factors() -> None:
    """In arrays, tensors and graphs alike, whatever the model predicts."""
    method = StepMethod(
        name="m", scheduler="s", noise_scale=1.0, sample_factor=3.0, output_factor=-2.0
    )
    z, output = np.random.default_rng(0).standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
    for kind in ("epsilon", "v_prediction"):
        for function in (predict_x0, predict_x0_in_a_graph):
            got = function(torch.from_numpy(z), torch.from_numpy(output), ALPHA_BAR, kind, method)
            np.testing.assert_allclose(got.numpy(), 3 * z - 2 * output, rtol=1e-5, atol=1e-6)
        arrays = predict_x0(z.astype(np.float16), output, ALPHA_BAR, kind, method)
        assert arrays.dtype == np.float32
