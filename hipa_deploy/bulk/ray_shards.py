"""Shards on a Ray cluster: Ray Data hands their numbers to actors, each with a loaded bundle."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hipa_deploy.bulk.bulk_job import BulkJob
from hipa_deploy.bulk.shard_maker import ShardMaker, ShardReport
from hipa_deploy.bulk.tries import MOST, Tries
from hipa_deploy.errors import HipaError
from hipa_deploy.marks.own_checker import check_checker_name
from hipa_deploy.serve.cluster.cluster_settings import ClusterSettings
from hipa_deploy.serve.cluster.ray_replicas import keep_off_the_console, reason_of
from hipa_deploy.user_code import code_allowed

_TRIES = ".tries"  # a folder beside the shards, while Ray makes them


class ShardActor:
    """A ``ShardMaker`` as Ray Data calls it: a row with a shard's number in, its report out.

    Ray starts an actor that dies again without end, also one that dies at every start, and gives
    it the same shard. So both are counted here.
    """

    def __init__(
        self, bundle: str, prompts: str, out: str, job: dict[str, Any], c2pa: str | None
    ) -> None:
        import ray

        self._tries = Tries(Path(out) / _TRIES)
        # An actor that was started again has the same name.
        name = f"start-{ray.get_runtime_context().get_actor_id()}"
        if self._tries.begin(name) >= MOST:
            raise HipaError(
                f"a process that makes shards has died {MOST} times while it loaded {bundle}. "
                "Look for what kills it: often too little memory. The finished shards are kept."
            )
        record = BulkJob.model_validate(job)
        signer = None if c2pa is None else Path(c2pa)
        # ``make_on_ray`` has asked, in another process.
        with code_allowed():
            self._maker = ShardMaker(Path(bundle), Path(prompts), Path(out), record, signer)
        self._tries.end(name)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make the shard ``row['item']``.

        Raises:
            HipaError: as ``ShardMaker.make``, or the shard has killed its process too often.

        """
        shard = int(row["item"])
        name = f"shard-{shard}"
        if self._tries.begin(name) >= MOST:
            raise HipaError(
                f"shard {shard} has killed the process that made it {MOST} times. Look for what "
                "kills it: often too little memory. The finished shards are kept. Run the command "
                "again to try once more."
            )
        report = self._maker.make(shard)
        self._tries.end(name)
        return {"shard": report.shard, "images": report.images, "failures": report.failures}


def make_on_ray(
    bundle: Path,
    prompts: Path,
    out: Path,
    job: BulkJob,
    shards: Sequence[int],
    settings: ClusterSettings,
    c2pa: Path | None = None,
) -> Iterator[ShardReport]:
    """Make shards on the cluster that ``join_ray`` has joined, in any order.

    An actor that dies is started again, and its shard made again, three times at most. The paths
    must lead to the same files on every machine.

    Args:
        bundle: the bundle's folder.
        prompts: the table.
        out: the folder of the shards.
        job: what to make.
        shards: that are missing.
        settings: how many actors, and on what.
        c2pa: a file of key and certificates, under this path on every machine.

    Raises:
        HipaError: as ``ShardMaker``; the job has a checker, and code is not allowed; or a shard
            has killed its process three times.

    """
    if job.checker is not None:
        check_checker_name(job.checker)
    import ray.data

    keep_off_the_console("ray.data")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A block a shard: the unit that an actor gets, and that is done again.
    numbers = ray.data.from_items(list(shards), override_num_blocks=len(shards))
    maker: Any = ShardActor  # made once in each actor
    reports = numbers.map(
        maker,
        fn_constructor_args=(
            str(bundle.resolve()),
            str(prompts.resolve()),
            str(out.resolve()),
            job.model_dump(mode="json"),
            None if c2pa is None else str(c2pa.resolve()),
        ),
        compute=ray.data.ActorPoolStrategy(
            min_size=min(settings.least, len(shards)),
            max_size=min(settings.most, len(shards)),
        ),
        num_cpus=settings.cpus,
        num_gpus=settings.gpus,
    )
    with _counting(out / _TRIES):
        try:
            for report in reports.iter_rows():
                yield ShardReport(report["shard"], report["images"], report["failures"])
        except ray.exceptions.RayError as error:
            raise HipaError(f"Ray cannot make the shards: {reason_of(error)}") from None


@contextmanager
def _counting(folder: Path) -> Iterator[None]:
    """A folder for ``Tries`` that begin at 0 in every run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
