"""What a service allows, as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hipa_deploy.disk.quiet_pillow import MAX_PIXELS
from hipa_deploy.disk.reading import MIB
from hipa_deploy.errors import HipaError


@dataclass(frozen=True)
class Limits:
    """The limits of a service.

    Attributes:
        queue: images of a bundle that may wait; more are refused.
        images: of one request.
        prompt: characters.
        body: bytes of a request with images; one without may have ``JSON_BODY``.
        pixels: of an uploaded image.
        steps: of a refining.
        seconds: from the arrival of a request to its encoded images.
        wait: seconds that a busy service waits for company of a batch.
        batch: images of a batch; None is the bundle's largest.

    """

    queue: int = 64
    images: int = 10
    prompt: int = 4000
    body: int = 32 * MIB
    pixels: int = 1 << 24
    steps: int = 100
    seconds: float = 60.0
    wait: float = 0.004
    batch: int | None = None

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            HipaError: one is out of range.

        """
        at_least_1 = {
            "--queue": self.queue,
            "--images": self.images,
            "--prompt-limit": self.prompt,
            "--body-limit": self.body,
            "--pixel-limit": self.pixels,
            "--steps-limit": self.steps,
            "--batch": 1 if self.batch is None else self.batch,
        }
        for option, number in at_least_1.items():
            if number < 1:
                raise HipaError(f"{option} is {number}. Expected 1 or more.")
        if self.pixels > MAX_PIXELS:
            raise HipaError(
                f"--pixel-limit is {self.pixels / 1e6:g} million. Expected at most "
                f"{MAX_PIXELS // 1_000_000}: larger images are not read."
            )
        if self.images > self.queue:
            raise HipaError(
                f"--images {self.images} is more than --queue {self.queue}: such a request would "
                "never be accepted. Raise --queue, or lower --images."
            )
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise HipaError(f"--time-limit is {self.seconds}. Expected seconds, above 0.")
        if not 0 <= self.wait <= 1:
            raise HipaError(f"--wait is {self.wait * 1000:g}. Expected 0 to 1000 milliseconds.")


JSON_BODY = MIB  # bytes
BODY_SECONDS = 30.0  # for the body of a request to arrive, and longer as it arrives:
# Bytes of a body for which a client has another second. 32 MiB in 30 s would need 9 Mbit/s, which
# many have not; a byte now and then still ends at ``BODY_SECONDS``.
BODY_RATE = 64 * 1024
LEAST_UPLOADS = 16  # bodies on their way at once that a service takes, however short its queues are
UPLOAD_WAIT = 5  # seconds after which one more may try again
HEAD_SECONDS = 10.0  # for the head of a request to arrive
ANSWER_SECONDS = 60.0  # for a client to take a part of the answer
# For the next request on a connection. A proxy that keeps its connections for longer sends a
# request now and then on one that is just being closed, and answers 502. nginx and AWS's load
# balancer keep them for 60 seconds, Caddy for 120.
KEEP_SECONDS = 125
"""Limits that nobody has asked to change."""
