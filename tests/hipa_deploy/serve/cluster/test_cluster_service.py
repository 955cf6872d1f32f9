"""The service whose images replicas make: the same answers, retries, refusals. No Ray here."""

from __future__ import annotations

import asyncio
import io
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hipa_deploy import extras
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.commands.app import main
from hipa_deploy.errors import HipaError, RequestError
from hipa_deploy.generate.jobs.finite import NotFiniteError
from hipa_deploy.images.example_source import example_image
from hipa_deploy.serve.batcher import BackendFailedError, QueueFullError, StoppingError
from hipa_deploy.serve.cluster import ray_replicas
from hipa_deploy.serve.cluster.carried_order import CarriedOrder, Refusal, carried
from hipa_deploy.serve.cluster.cluster_service import ClusterService, ReplicaLostError
from hipa_deploy.serve.cluster.cluster_settings import ClusterSettings, replicas_from
from hipa_deploy.serve.cluster.replica import Replica, fingerprint
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import (
    Delivery,
    GoneError,
    ImageService,
    NotReadyError,
    Order,
    TimeLimitError,
)
from hipa_deploy.serve.settings import Limits
from tests.served import add_swaps, tiny_bundles

LIMITS = Limits(queue=8, images=8, seconds=60)
PROMPT = "3d emoji of a red apple"


class Here:
    """Replicas in this process. What travels is pickled, as between processes; some die."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.dying = 0
        self.calls: list[CarriedOrder] = []

    async def deliver(self, order: CarriedOrder) -> Delivery | Refusal:
        self.calls.append(pickle.loads(pickle.dumps(order)))
        if self.dying:
            self.dying -= 1
            raise ReplicaLostError("ActorDiedError")
        return pickle.loads(pickle.dumps(await self.replica.deliver(self.calls[-1])))

    def facts(self) -> dict[str, Any]:
        return self.replica.facts()

    def close(self) -> None:
        self.replica.close()


def replica_of(bundle: Bundle, limits: Limits = LIMITS) -> Replica:
    served = Models([f"m={bundle.root}"]).served[0]
    known = fingerprint(bundle.root, served.adaptors)
    return Replica("m", str(bundle.root), known, "onnxruntime", limits)


def service_of(
    bundle: Bundle, limits: Limits = LIMITS, within: Limits = LIMITS
) -> tuple[ClusterService, Here]:
    here = Here(replica_of(bundle, within))
    service = ClusterService(Models([f"m={bundle.root}"]), limits, lambda *_: {"m": here})
    service.load("onnxruntime")
    return service, here


async def never() -> None:
    await asyncio.Event().wait()


def deliver(service: ImageService, gone: Any = never, model: str = "m", **values: Any) -> Delivery:
    order = Order(model=service.models.by_name[model], prompt=PROMPT, **values)
    return asyncio.run(service.deliver(order, gone))


def test_the_bytes_are_the_single_machines(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["tiny"]
    alone = ImageService(Models([f"m={bundle.root}"]), LIMITS)
    alone.load("onnxruntime")
    service, _ = service_of(bundle)
    assert service.ready
    assert service.models.by_name["m"].served.backend == "onnxruntime"
    for model in ("m", "m:half"):
        made = deliver(service, model=model, seeds=range(3, 6))
        assert made.files == deliver(alone, model=model, seeds=range(3, 6)).files
        assert [facts["seed"] for facts in made.parameters] == [3, 4, 5]
    assert b'hipa_images_total{model="m"} 3.0' in service.metrics.text()
    service.close()
    alone.close()


def test_a_replica_imports_the_checker_by_its_name(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes a replica has allowed it: the answer of the user is not asked for again."""
    source = "def second(images):\n    return [n == 1 for n in range(len(images))]\n"
    (tmp_path / "checker_of_a_replica.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    bundle = bundles["tiny"]
    served = Models([f"m={bundle.root}"]).served[0]
    known = fingerprint(bundle.root, served.adaptors)
    given = ("m", str(bundle.root), known, "onnxruntime", LIMITS)
    here = Here(Replica(*given, checker="checker_of_a_replica:second"))
    service = ClusterService(Models([f"m={bundle.root}"]), LIMITS, lambda *_: {"m": here})
    service.load("onnxruntime")
    made = deliver(service, seeds=range(3, 6))
    assert [facts["seed"] for facts in made.parameters] == [3, 5]
    assert [(one.seed, one.reason) for one in made.flagged] == [(4, "the checker that was given")]
    service.close()
    with pytest.raises(HipaError, match="cannot be imported"):
        Replica(*given, checker="checker_of_a_replica:third")


def test_replicas_get_no_checker_that_is_not_allowed(bundles: dict[str, Bundle]) -> None:
    pytest.importorskip("ray")
    served = Models([f"m={bundles['tiny'].root}"]).served[0]
    with pytest.raises(HipaError, match="--allow-code"):
        ray_replicas.bundle_deployment(
            served, "onnxruntime", LIMITS, ClusterSettings(), checker="os:abort"
        )


def test_uploaded_images_travel(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["tiny-inpaint"]
    step = bundle.manifest.one_step
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (step.height, step.width, 4), np.uint8)
    pixels_HWC[..., 3] = 255
    pixels_HWC[: step.height // 2, :, 3] = 0
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    alone = ImageService(Models([f"m={bundle.root}"]), LIMITS)
    alone.load("onnxruntime")
    service, _ = service_of(bundle)
    values = {"image": file, "alpha_mask": True, "seeds": [7], "feather": 2}
    assert deliver(service, **values).files == deliver(alone, **values).files
    service.close()
    alone.close()


def test_control_images_travel_with_their_scale(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["tiny-control"]
    file = io.BytesIO()
    Image.fromarray(example_image(32, 32, number=1)).save(file, "PNG")
    alone = ImageService(Models([f"m={bundle.root}"]), LIMITS)
    alone.load("onnxruntime")
    service, here = service_of(bundle)
    made = []
    for scale in (0.25, 1.0):
        values = {"image": file, "seeds": [7], "scale": scale}
        made.append(deliver(service, **values))
        assert here.calls[-1].values["scale"] == made[-1].parameters[0]["scale"] == scale
        assert made[-1].files == deliver(alone, **values).files
    assert made[0].files != made[1].files
    with pytest.raises(HipaError, match="scale 3 is out of range"):
        deliver(service, image=file, seeds=[7], scale=3)
    service.close()
    alone.close()


def test_an_order_outlives_two_replicas_and_not_three(bundles: dict[str, Bundle]) -> None:
    service, here = service_of(bundles["tiny"])
    expected = deliver(service, seeds=[5]).files
    here.dying = 2
    assert deliver(service, seeds=[5]).files == expected
    # The same order each time: a seed is drawn before it travels.
    assert here.calls[1].values == here.calls[2].values == here.calls[3].values
    here.dying = 3
    with pytest.raises(ReplicaLostError):
        deliver(service, seeds=[5])
    assert here.dying == 0
    assert service._under_way == {"m": 0}
    service.close()


def test_refusals_are_those_of_the_single_machine(bundles: dict[str, Bundle]) -> None:
    service, here = service_of(bundles["tiny"], Limits(queue=100, seconds=60, images=100))
    with pytest.raises(RequestError, match=r"height 7 .* --dynamic") as caught:
        deliver(service, seeds=[1], height=7)
    assert caught.value.argument == "height"
    assert caught.value.told == "height 7 is not a size of this model. Expected 32."
    assert caught.value.owner == "export it for other sizes"
    with pytest.raises(QueueFullError):
        deliver(service, seeds=range(9))  # the replica's own queue has 8 places

    async def at_once() -> None:
        return None

    with pytest.raises(GoneError):
        deliver(service, gone=at_once, seeds=[1])
    here.replica.close()
    with pytest.raises(StoppingError):
        deliver(service, seeds=[1])
    with pytest.raises(RuntimeError, match="makes no images any more"):
        here.replica.check_health()


def test_faults_of_a_replica_are_not_the_orders(tmp_path: Path) -> None:
    bundle = tiny_bundles(tmp_path)["tiny"]
    add_swaps(bundle, huge=3e4, gone=0.5)
    service, _ = service_of(bundle)
    shutil.rmtree(bundle.root / "adaptors" / "gone")
    with pytest.raises(NotFiniteError, match="NaN"):
        deliver(service, model="m:huge", seeds=[1])
    with pytest.raises(BackendFailedError, match="gone"):
        deliver(service, model="m:gone", seeds=[1])
    assert deliver(service, seeds=[1]).files
    service.close()


def test_late_images_are_given_up(bundles: dict[str, Bundle]) -> None:
    eight = range(8)  # one might be ready by the time that somebody looks
    short = Limits(queue=8, images=8, seconds=0.0001)
    service, _ = service_of(bundles["tiny"], short)
    with pytest.raises(TimeLimitError):
        deliver(service, seeds=eight)
    service.close()
    service, _ = service_of(bundles["tiny"], within=short)
    with pytest.raises(TimeLimitError):
        deliver(service, seeds=eight)
    service.close()


def test_nothing_is_ready_before_it_is_loaded(bundles: dict[str, Bundle]) -> None:
    service = ClusterService(Models([f"m={bundles['tiny'].root}"]), LIMITS, lambda *_: {})
    assert not service.ready
    with pytest.raises(NotReadyError):
        deliver(service, seeds=[1])


def test_another_bundle_under_the_path_is_refused(bundles: dict[str, Bundle]) -> None:
    root = str(bundles["tiny"].root)
    with pytest.raises(HipaError, match="another bundle"):
        Replica("m", root, "0" * 64, "onnxruntime", LIMITS)
    with pytest.raises(HipaError, match="auto"):
        Replica("m", root, "0" * 64, "auto", LIMITS)


def test_a_file_that_cannot_be_read_is_not_the_orders_fault(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = replica_of(bundles["tiny"])
    root = str(bundles["tiny"].root)

    async def fail(*_: Any) -> Delivery:
        raise HipaError(f"{root}/unet.onnx cannot be read.")

    monkeypatch.setattr(replica._service, "deliver", fail)
    models = Models([f"m={root}"])
    order = carried(Order(model=models.by_name["m"], prompt=PROMPT, seeds=[1]))
    refused = asyncio.run(replica.deliver(order))
    assert refused == Refusal("failed", f"{root}/unet.onnx cannot be read.")
    assert isinstance(refused.error(), BackendFailedError)
    replica.close()


def test_an_unknown_adaptor_is_refused(bundles: dict[str, Bundle]) -> None:
    replica = replica_of(bundles["tiny"])
    models = Models([f"m={bundles['tiny'].root}"])
    order = carried(Order(model=models.by_name["m"], prompt=PROMPT, seeds=[1]))
    other = CarriedOrder("m:new", order.values, order.files)
    refused = asyncio.run(replica.deliver(other))
    assert isinstance(refused, Refusal)
    assert refused.kind == "order"
    replica.close()


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1:4", (1, 4))])
def test_replicas(text: str, expected: tuple[int, int]) -> None:
    assert replicas_from(text) == expected


@pytest.mark.parametrize(
    "numbers", [{"least": 0}, {"least": 3, "most": 2}, {"cpus": -1.0}, {"gpus": 1.5},
                {"waiting": 0.0}, {"gpus": float("nan")}],
)  # fmt: skip
def test_numbers_out_of_range(numbers: dict[str, Any]) -> None:
    with pytest.raises(HipaError, match="Expected"):
        ClusterSettings(**numbers)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replicas", "2"], "--replicas is for a Ray cluster"),
        (["--scale-at", "2"], "--scale-at is for a Ray cluster"),
    ],
)
def test_options_of_a_cluster_need_one(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "emoji", *arguments])
    assert stopped.value.code == 1
    assert words in capsys.readouterr().err


def test_an_address_that_is_taken_is_said_before_a_cluster_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may be missing here: nothing of it is imported before the address is checked."""
    joined: list[str] = []
    monkeypatch.setattr(extras, "missing", lambda extra: [])
    monkeypatch.setattr(ray_replicas, "join_ray", joined.append)
    options = ["--backend", "onnxruntime", "--ray", "local"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as stopped:
            main(["serve", "emoji", *options, "--port", port])
    assert stopped.value.code == 1
    assert "Choose another --host or --port" in capsys.readouterr().err
    assert joined == []
