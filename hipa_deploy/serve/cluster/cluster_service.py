"""The service as the web sees it, where replicas in other processes make the images.

Everything that HTTP asks for is checked here, by the same routes. Seeds are drawn here too, so an
order means the same images wherever it is made, and however often.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from hipa_deploy.marks.content_credentials import ContentSigner
from hipa_deploy.serve.cluster.carried_order import CarriedOrder, Refusal, carried
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

ATTEMPTS = 3
"""Replicas that an order may lose. One that loses more is probably what kills them."""


class ReplicaLostError(Exception):
    """A replica died before it answered. Another can make the same images."""


class Replicas(Protocol):
    """The replicas of one bundle."""

    async def deliver(self, order: CarriedOrder) -> Delivery | Refusal:
        """Let one of them make an order.

        Raises:
            ReplicaLostError: it died meanwhile.
            QueueFullError: as many orders wait as may.
            NotReadyError: none of them could be started.

        """

    def facts(self) -> dict[str, Any]:
        """What one of them says of itself; waits until one is ready.

        Raises:
            HipaError: none of them could be started.

        """

    def close(self) -> None:
        """Let them end what they began, and stop."""


Start = Callable[[Models, str, Limits], Mapping[str, Replicas]]
"""Starts the replicas of every bundle, by the bundle's name: models, backend, limits."""


class ClusterService(ImageService):
    """An ``ImageService`` whose bundles are loaded by replicas.

    An order whose replica dies goes to another one. That is safe, because an image depends on its
    prompt, seed and source alone, and none was sent.

    Args:
        models: what is served; only the manifests are read here.
        limits: of each replica, and of the whole way of a request.
        start: starts the replicas.
        signer: that the replicas have too, each on its machine; None signs nothing.

    """

    def __init__(
        self, models: Models, limits: Limits, start: Start, signer: ContentSigner | None = None
    ) -> None:
        super().__init__(models, limits, signer)
        self._start = start
        self._replicas: Mapping[str, Replicas] = {}
        self._under_way = dict.fromkeys((served.name for served in models.served), 0)

    def load(self, backend: str) -> None:
        """Start the replicas, and wait until each bundle has one that has made an image.

        Raises:
            HipaError: a bundle's replicas cannot be started.

        """
        self._replicas = self._start(self.models, backend, self.limits)
        for served in self.models.served:
            facts = self._replicas[served.name].facts()
            sizes = tuple(facts["batch_sizes"])
            served.loaded_elsewhere(facts["backend"], sizes, facts["swap_problem"])
            self.metrics.queue_length(
                served.name,
                lambda name=served.name: self._under_way[name],  # type: ignore[misc]
            )

    def close(self) -> None:
        """Stop the replicas."""
        super().close()
        for replicas in self._replicas.values():
            replicas.close()

    async def deliver(self, order: Order, gone: Callable[[], Awaitable[None]]) -> Delivery:
        """Let a replica make the images of an order.

        Args:
            order: what to make.
            gone: returns when whoever asked has gone away.

        Raises:
            ReplicaLostError: it has killed as many replicas as it may.
            Exception: what ``ImageService.deliver`` raises.

        """
        name = order.model.served.name
        if name not in self._replicas or not order.model.served.ready:
            raise NotReadyError
        self._under_way[name] += len(order.seeds)
        try:
            delivery = await self._unless_gone(order, gone)
        finally:
            self._under_way[name] -= len(order.seeds)
        self.metrics.encode_seconds.labels(order.format).observe(delivery.encode_ms / 1000)
        self.metrics.images.labels(order.model.name).inc(len(delivery.files))
        return delivery

    async def _unless_gone(self, order: Order, gone: Callable[[], Awaitable[None]]) -> Delivery:
        """The images; a call that nobody waits for any more is cancelled."""
        made = asyncio.ensure_future(self._made(order))
        leaving = asyncio.ensure_future(gone())
        either: set[asyncio.Future[Any]] = {made, leaving}
        try:
            limit = self.limits.seconds
            await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if made.done():
                return made.result()
            raise GoneError if leaving.done() else TimeLimitError
        finally:
            leaving.cancel()
            made.cancel()

    async def _made(self, order: Order) -> Delivery:
        """The images, from the first replica that lives long enough."""
        replicas = self._replicas[order.model.served.name]
        plain = carried(order)
        for attempt in range(ATTEMPTS):
            try:
                outcome = await replicas.deliver(plain)
            except ReplicaLostError:
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            if isinstance(outcome, Refusal):
                raise outcome.error()
            return outcome
        raise AssertionError("the last attempt returns or raises")
