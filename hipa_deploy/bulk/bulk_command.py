"""``hipa-bulk``: images of every row of a table, in shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipa_deploy.checker_options import AllowCodeOption, CheckerOption
from hipa_deploy.errors import HipaError, HipaWarning

if TYPE_CHECKING:
    from hipa_deploy.bulk.bulk_job import BulkJob
    from hipa_deploy.bulk.shard_maker import ShardReport


def bulk(
    bundle: Annotated[
        str, typer.Argument(help="Folder that hipa-export wrote, or 'emoji' for the included one.")
    ],
    prompts: Annotated[Path, typer.Argument(help="Parquet file with a column of prompts.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the shards. A run that was stopped goes on there.")
    ],
    column: Annotated[
        str | None, typer.Option(help="Column of the prompts; caption or text by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of row 0; row N has this seed plus N.")] = 0,
    shard_size: Annotated[int, typer.Option(help="Images of a shard.")] = 1000,
    backend: Annotated[
        str,
        typer.Option(
            help="What runs the models: onnxruntime | openvino | openvino-bf16 | onnxruntime-cuda "
            "| onnxruntime-tensorrt | onnxruntime-rtx | tensorrt | rtx."
        ),
    ] = "onnxruntime",
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Cut prompts that are too long; by default they fail."),
    ] = False,
    c2pa: Annotated[
        Path | None,
        typer.Option(
            metavar="PEM",
            envvar="HIPA_C2PA",
            help="Sign content credentials (C2PA) into every image: a file with the private key "
            "and the certificates.",
        ),
    ] = None,
    checker: CheckerOption = None,
    allow_code: AllowCodeOption = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Make the shards on a Ray cluster: local starts one on this machine, auto joins "
            "the one that runs here, HOST:PORT another one. By default this process makes them.",
        ),
    ] = None,
    replicas: Annotated[
        str,
        typer.Option(help="With --ray: processes that make shards, as N or FEWEST:MOST."),
    ] = "1",
    replica_cpus: Annotated[
        float, typer.Option(help="With --ray: CPU cores to set aside for a process.")
    ] = 1.0,
    replica_gpus: Annotated[
        float, typer.Option(help="With --ray: GPUs of a process, or the part of one.")
    ] = 0.0,
) -> None:
    """Make an image of every row of a Parquet file, in shards: tar files for WebDataset.

    A finished shard is never made again. Rows that fail are listed beside their shard.
    """
    from hipa_deploy.bulk.bulk_job import begin, missing_shards, new_job
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.disk.files import check_writable
    from hipa_deploy.disk.locks import locked
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.extras import require
    from hipa_deploy.generate.open_stages import resolve_backend
    from hipa_deploy.generate.runner import check_backend
    from hipa_deploy.images.source import require_task
    from hipa_deploy.marks.content_credentials import ContentSigner
    from hipa_deploy.marks.marker import require_signer
    from hipa_deploy.marks.own_checker import chosen_checker
    from hipa_deploy.serve.cluster.cluster_settings import ClusterSettings, replicas_from
    from hipa_deploy.user_code import code_allowed

    root = resolve_bundle(bundle)
    opened = Bundle.open(root)
    check_backend(backend)
    settings = ClusterSettings(*replicas_from(replicas), replica_cpus, replica_gpus)
    if ray is not None:
        require("ray")
        settings.check_backend(backend)
    elif (replicas, replica_cpus, replica_gpus) != ("1", 1.0, 0.0):
        raise HipaError("--replicas and its kin are for a Ray cluster. Give --ray too.")
    require_task(opened, "generate")
    signer = None if c2pa is None else ContentSigner.read(c2pa)
    require_signer(opened.manifest.marks, signer)
    job = new_job(
        root,
        prompts,
        backend=resolve_backend(backend, opened),
        column=column,
        seed=seed,
        shard_size=shard_size,
        truncate=truncate,
        signer=None if signer is None else signer.certificates_sha256,
        checker=checker,
    )
    # Only to find mistakes here: whoever makes the shards imports it.
    chosen_checker(checker, allow_code)
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise HipaError(f"{out} is no folder. Choose another name.")
    out.mkdir(parents=True, exist_ok=True)
    with code_allowed(allow_code), locked(out / ".lock", f"folder {out}"):
        begin(job, out)
        missing = missing_shards(job, out)
        typer.echo(f"{job.shards} shards, {len(missing)} to make")
        if ray is None or not missing:
            reports = _make_here(root, prompts, out, job, missing, c2pa)
        else:
            from hipa_deploy.bulk.ray_shards import make_on_ray
            from hipa_deploy.serve.cluster.ray_replicas import join_ray

            join_ray(ray)
            reports = make_on_ray(root, prompts, out, job, missing, settings, c2pa)
        for report in reports:
            typer.echo(str(report))
    failing = list(out.glob("shard-*.failures.jsonl"))
    # A part that fails is a warning. All of a table is a mistake: another column, another bundle.
    if _count_lines(failing) == job.rows:
        raise HipaError(
            f"no row of {prompts} has an image. {out}/shard-*.failures.jsonl say why. "
            "Mend it, and choose another --out or move the folder away."
        )
    if failing:
        warnings.warn(
            f"{len(failing)} shards have rows without an image. {out}/shard-*.failures.jsonl say "
            "why.",
            HipaWarning,
            stacklevel=1,
        )
    typer.echo(out)


def _count_lines(paths: list[Path]) -> int:
    """How many rows are listed as failures."""
    count = 0
    for path in paths:
        with path.open("rb") as file:
            count += sum(1 for _ in file)
    return count


def _make_here(
    bundle: Path, prompts: Path, out: Path, job: BulkJob, shards: list[int], c2pa: Path | None
) -> Iterator[ShardReport]:
    """Make shards one after the other in this process."""
    from hipa_deploy.bulk.shard_maker import ShardMaker

    if not shards:
        return
    maker = ShardMaker(bundle, prompts, out, job, c2pa)
    try:
        for shard in shards:
            yield maker.make(shard)
    finally:
        maker.close()
