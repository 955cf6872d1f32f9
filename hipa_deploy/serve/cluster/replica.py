"""One replica: a bundle, loaded in a process of its own, that answers orders. It knows no Ray."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hipa_deploy.bundle.adaptor_swap import FOLDER
from hipa_deploy.bundle.folder import MANIFEST
from hipa_deploy.errors import HipaError, RequestError
from hipa_deploy.generate.jobs.finite import NotFiniteError
from hipa_deploy.marks.content_credentials import ContentSigner
from hipa_deploy.marks.own_checker import chosen_checker
from hipa_deploy.serve.batcher import QueueFullError, StoppingError
from hipa_deploy.serve.cluster.carried_order import CarriedOrder, Refusal
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import Delivery, ImageService, Order, TimeLimitError
from hipa_deploy.serve.settings import Limits


def fingerprint(root: Path, adaptors: Sequence[str]) -> str:
    """A hash of a bundle's manifest and of its adaptors' manifests, which hash all other files."""
    digest = hashlib.sha256((root / MANIFEST).read_bytes())
    for name in adaptors:
        digest.update(name.encode())
        digest.update((root / FOLDER / name / "swap.json").read_bytes())
    return digest.hexdigest()


class Replica:
    """A bundle that is loaded and warm.

    Args:
        name: of the model.
        root: the bundle's folder, on this machine.
        known: the ``fingerprint`` of the bundle that is to be served. Another bundle under the same
            path would make other images without a word.
        backend: that runs the bundle; 'auto' could differ from machine to machine, and is refused.
        limits: of this replica.
        c2pa: the file of key and certificates on this machine that signs the images.
        checker: 'module:function' that sees every image. It is imported here: whoever makes a
            replica has allowed it.

    Raises:
        HipaError: another bundle, 'auto', a checker that cannot be imported, or as
            ``ImageService.load``.

    Example:
        >>> replica = Replica("emoji", root, fingerprint(root, ()), "onnxruntime", Limits())
        >>> delivery = await replica.deliver(carried(order))

    """

    def __init__(
        self,
        name: str,
        root: str,
        known: str,
        backend: str,
        limits: Limits,
        c2pa: str | None = None,
        checker: str | None = None,
    ) -> None:
        if backend == "auto":
            raise HipaError("a replica's backend is auto. Expected the name of one.")
        models = Models([f"{name}={root}"])
        (served,) = models.served
        if fingerprint(served.bundle.root, served.adaptors) != known:
            raise HipaError(
                f"{root} on this machine is another bundle than where the service was started. "
                "Copy the same folder to every machine, or use a shared disk."
            )
        signer = None if c2pa is None else ContentSigner.read(Path(c2pa))
        own = chosen_checker(checker, allow_code=True)
        self._service = ImageService(models, limits, signer, own)
        try:
            self._service.load(backend)
        except BaseException:
            self._service.close()
            raise

    async def deliver(self, order: CarriedOrder) -> Delivery | Refusal:
        """Make the images of an order. A call that is cancelled makes no more of them."""
        values = dict(order.values)
        for name, content in order.files.items():
            values[name] = io.BytesIO(content)
        model = self._service.models.by_name.get(order.model)
        if model is None:
            # Its adaptors are part of the fingerprint, so this is an update that is under way.
            problem = f"the model {order.model} is not here. Try again."
            return Refusal.of_order(RequestError(problem, argument="adaptor"))
        try:
            return await self._service.deliver(Order(model=model, **values), _never)
        except NotFiniteError as error:
            return Refusal("not finite", str(error))
        except RequestError as error:
            return Refusal.of_order(error)
        except HipaError as error:
            # The door writes it to its log: the request is not at fault.
            return Refusal("failed", str(error))
        except QueueFullError as error:
            return Refusal("full", retry_after=error.retry_after)
        except StoppingError:
            return Refusal("stopping")
        except TimeLimitError:
            return Refusal("late")

    def facts(self) -> dict[str, Any]:
        """What runs here: the backend, batch sizes, why adaptors are not swapped, the process."""
        (served,) = self._service.models.served
        return {
            "backend": served.backend,
            "batch_sizes": served.batch_sizes,
            "swap_problem": served.swap_problem,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def check_health(self) -> None:
        """Do nothing while the replica can answer.

        Raises:
            RuntimeError: it makes no images any more; Ray then starts another replica.

        """
        if not self._service.ready:
            raise RuntimeError("the replica makes no images any more")

    def close(self) -> None:
        """Make what was accepted, and release the bundle."""
        self._service.close()


async def _never() -> None:
    """Whoever asked goes away by cancelling the call."""
    await asyncio.Event().wait()
