"""Shards on a Ray cluster: Ray Data hands their numbers to actors, each with a loaded bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hipa_deploy.bulk.bulk_job import BulkJob
from hipa_deploy.bulk.shard_maker import ShardMaker, ShardReport
from hipa_deploy.marks.own_checker import check_checker_name
from hipa_deploy.serve.cluster.cluster_settings import ClusterSettings
from hipa_deploy.user_code import code_allowed


class ShardActor:
    """A ``ShardMaker`` as Ray Data calls it: a row with a shard's number in, its report out."""

    def __init__(
        self, bundle: str, prompts: str, out: str, job: dict[str, Any], c2pa: str | None
    ) -> None:
        record = BulkJob.model_validate(job)
        signer = None if c2pa is None else Path(c2pa)
        # ``make_on_ray`` has asked, in another process.
        with code_allowed():
            self._maker = ShardMaker(Path(bundle), Path(prompts), Path(out), record, signer)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make the shard ``row['item']``."""
        report = self._maker.make(int(row["item"]))
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

    An actor that dies is started again, and its shard made again. The paths must lead to the
    same files on every machine.

    Args:
        bundle: the bundle's folder.
        prompts: the table.
        out: the folder of the shards.
        job: what to make.
        shards: that are missing.
        settings: how many actors, and on what.
        c2pa: a file of key and certificates, under this path on every machine.

    Raises:
        HipaError: the job has a checker, and code is not allowed.

    """
    if job.checker is not None:
        check_checker_name(job.checker)
    import ray.data

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
        concurrency=(settings.least, settings.most),
        num_cpus=settings.cpus,
        num_gpus=settings.gpus,
    )
    for report in reports.iter_rows():
        yield ShardReport(report["shard"], report["images"], report["failures"])
