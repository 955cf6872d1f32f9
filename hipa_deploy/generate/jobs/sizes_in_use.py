"""The batch sizes that one pipeline uses: all that its bundle takes, until a warm-up proves some.

How they are proven, and why that must be measured: ``batch_sizes``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hipa_deploy.bundle.folder import Bundle, latent_shape
from hipa_deploy.bundle.manifest import Axis
from hipa_deploy.errors import HipaError, whole_number
from hipa_deploy.generate.jobs.batch_sizes import Run, WarmUp, prove, sizes_to_try
from hipa_deploy.generate.jobs.image_job import ImageJob


class SizesInUse:
    """How many jobs the batches of one pipeline may have.

    Attributes:
        axis: the smallest and the largest batch that the bundle's stages take.
        sizes: jobs a batch, ascending: all up to the largest, until ``warmup`` finds some.

    """

    def __init__(self, bundle: Bundle) -> None:
        self.axis = batch_axis(bundle)
        self.sizes: tuple[int, ...] = tuple(range(1, self.axis.max + 1))
        self._bundle = bundle
        self._proven = False  # whether the sizes are those that a warm-up found

    def of(self, job: ImageJob) -> tuple[int, ...]:
        """How many jobs like this one a batch may have; see ``OneStepPipeline.sizes_for``."""
        if job.refine is not None:
            return (self.axis.min,)
        own = job.latent_CHW == latent_shape(self._bundle, None, None)
        return self.sizes if own or not self._proven else self.sizes[:1]

    def warmup(
        self,
        run: Run[ImageJob],
        trial_jobs: Callable[[int], Sequence[ImageJob]],
        largest: int | None,
    ) -> WarmUp:
        """Try sizes and use those that are worth it; see ``OneStepPipeline.warmup``.

        Args:
            run: makes a batch.
            trial_jobs: gives so many different jobs of the bundle's own size.
            largest: the most jobs that a batch should have; None is the bundle's largest.

        Raises:
            HipaError: ``largest`` is below 1, or as ``run`` does.

        """
        if largest is not None:
            largest = whole_number(largest, "largest")
        if largest is not None and largest < 1:
            raise HipaError(f"largest is {largest}. Expected 1 or more images in a batch.")
        sizes = sizes_to_try(self.axis, largest)
        found = prove(run, trial_jobs(sizes[-1]), sizes)
        self.sizes = found.sizes
        self._proven = True
        return found


def batch_axis(bundle: Bundle) -> Axis:
    """The smallest and the largest batch that the stages of ``bundle`` take."""
    batch = bundle.manifest.batch
    return bundle.axes.get("batch", Axis(min=batch, opt=batch, max=batch))
