"""What an order may cost before its images are made: tiles, and time."""

from __future__ import annotations

import asyncio
import io
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.jobs import batch_sizes
from hipa_deploy.images.example_source import example_image
from hipa_deploy.serve import service as service_module
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import Delivery, ImageService, Order, TimeLimitError
from hipa_deploy.serve.settings import Limits

WAIT = 60.0  # seconds, far more than anything here takes


@contextmanager
def serving(bundle: Bundle, limits: Limits) -> Iterator[ImageService]:
    service = ImageService(Models([f"m={bundle.root}"]), limits)
    service.load("onnxruntime")
    try:
        yield service
    finally:
        service.close()


def upload(height: int, width: int) -> io.BytesIO:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file


def deliver(service: ImageService, **values: Any) -> Delivery:
    order = Order(service.models.by_name["m"], "a green pear", **{"seeds": [0], **values})

    async def stays() -> None:
        await asyncio.Event().wait()

    return asyncio.run(service.deliver(order, stays))


def waiting(service: ImageService) -> int:
    batcher = service.models.served[0].batcher
    assert batcher is not None
    return batcher.waiting


def test_an_image_of_too_many_tiles_is_never_enlarged(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*_: Any) -> None:
        raise AssertionError("it was enlarged")

    with serving(bundles["tiny-upscale"], Limits(queue=10)) as service:
        assert len(deliver(service, image=upload(20, 20)).batches) > 1
        monkeypatch.setattr("hipa_deploy.images.source.enlarge", must_not_run)
        words = r"the image takes \d+ tiles of this model. Expected at most 10. Make it smaller"
        with pytest.raises(HipaError, match=words):
            deliver(service, image=upload(200, 400))
        assert waiting(service) == 0


def test_control_images_of_several_scales_share_batches(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is an input of each image: none depends on whose images are beside it."""
    # Whether a size saves time is another matter, and changes with the machine's load.
    monkeypatch.setattr(batch_sizes, "LEAST_GAIN", -math.inf)
    scales = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)

    def picture(number: int) -> io.BytesIO:
        file = io.BytesIO()
        Image.fromarray(example_image(32, 32, number)).save(file, "PNG")
        return file

    async def stays() -> None:
        await asyncio.Event().wait()

    async def all_at_once(service: ImageService) -> list[Delivery]:
        orders = [
            Order(
                service.models.by_name["m"],
                "a green pear",
                seeds=[7, 8],
                image=picture(number % 3),
                scale=scale,
            )
            for number, scale in enumerate(scales)
        ]
        return await asyncio.gather(*(service.deliver(order, stays) for order in orders))

    with serving(bundles["tiny-control"], Limits(batch=1)) as service:
        alone = asyncio.run(all_at_once(service))
        assert {size for made in alone for size in made.batches} == {1}
    with serving(bundles["tiny-control"], Limits(wait=0.5)) as service:
        together = asyncio.run(all_at_once(service))
        # Of fewer images than two orders have, none would have had another's company.
        assert max(size for made in together for size in made.batches) > 2
    assert [made.files for made in together] == [made.files for made in alone]
    assert len({file for made in alone for file in made.files}) == 2 * len(scales)


@pytest.mark.parametrize("slow", ["_jobs_from_image", "_encoded"])
def test_slow_work_in_a_thread_is_answered_within_the_time_limit(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    go_on = threading.Event()

    def wait(*_: Any, **__: Any) -> None:
        go_on.wait(WAIT)
        raise HipaError("nobody waits for this any more")

    monkeypatch.setattr(service_module, slow, wait)
    with serving(bundles["tiny-edit"], Limits(seconds=1.0)) as service:
        started = time.perf_counter()
        try:
            with pytest.raises(TimeLimitError):
                deliver(service, image=upload(32, 32))
            assert time.perf_counter() - started < WAIT / 2
            assert waiting(service) == 0
        finally:
            go_on.set()


def test_a_system_that_starts_no_thread_is_answered_at_once(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with serving(bundles["tiny"], Limits(seconds=WAIT)) as service:
        monkeypatch.setattr(service._threads, "submit", submit)
        started = time.perf_counter()
        with pytest.raises(RuntimeError, match="can't start new thread"):
            deliver(service)
        assert time.perf_counter() - started < WAIT / 2
        assert waiting(service) == 0


def test_uploads_that_take_long_keep_no_other_files_back(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each upload that is decoded has a thread; the files of images are encoded in other ones."""
    go_on = threading.Event()
    read = service_module.open_upload

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(WAIT)
        return read(*arguments)

    monkeypatch.setattr(service_module, "open_upload", slow)
    names = [f"m={bundles['tiny'].root}", f"e={bundles['tiny-edit'].root}"]
    service = ImageService(Models(names), Limits())
    service.load("onnxruntime")
    edits = threading.Thread(target=lambda: asyncio.run(many_edits(service)))
    try:
        edits.start()
        started = time.perf_counter()
        deliver(service)
        assert time.perf_counter() - started < WAIT / 2
    finally:
        go_on.set()
        edits.join()
        service.close()


async def many_edits(service: ImageService) -> None:
    """As many at once as there can be threads."""
    model = service.models.by_name["e"]

    async def stays() -> None:
        await asyncio.Event().wait()

    orders = [Order(model, "a", seeds=[0], image=upload(32, 32)) for _ in range(8)]
    await asyncio.gather(*[service.deliver(order, stays) for order in orders])
