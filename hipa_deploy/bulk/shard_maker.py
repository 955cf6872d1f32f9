"""Make one shard: a tar file of images, as WebDataset reads it.

Equal rows give equal bytes, unless images are signed: a signature has its time. Names, order,
owners and times in the tar are fixed.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hipa_deploy.bulk.bulk_job import BulkJob, failures_path, read_rows, shard_path
from hipa_deploy.bundle.folder import MANIFEST
from hipa_deploy.disk.files import write_file
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.remembered import file_marks
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.jobs.batch_sizes import cut
from hipa_deploy.generate.jobs.finite import NotFiniteError
from hipa_deploy.generate.jobs.image_job import ImageJob
from hipa_deploy.generate.jobs.result import finished_result
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.prompt_files import MAX_CHARACTERS, one_line
from hipa_deploy.images.source import require_task
from hipa_deploy.marks.content_credentials import ContentSigner
from hipa_deploy.marks.marker import encode_marked, require_signer
from hipa_deploy.marks.own_checker import import_checker

_AHEAD = 64  # rows whose jobs are in memory


@dataclass(frozen=True)
class ShardReport:
    """A shard that was made.

    Attributes:
        shard: its number.
        images: in it.
        failures: rows without an image.

    """

    shard: int
    images: int
    failures: int

    def __str__(self) -> str:
        return f"shard {self.shard}: {self.images} images, {self.failures} failures"


class ShardMaker:
    """A loaded bundle that makes shards of a job.

    Args:
        bundle: the bundle's folder, on this machine.
        prompts: the table, on this machine.
        out: the folder of the shards.
        job: what to make.
        c2pa: a file of key and certificates that signs the images; None signs nothing.

    Raises:
        HipaError: another bundle, table or signer than the job's, a checker that cannot be imported
            or is not allowed, or as ``OneStepPipeline.load``.

    Example:
        >>> maker = ShardMaker(root, Path("prompts.parquet"), Path("images"), job)
        >>> maker.make(0)
        ShardReport(shard=0, images=1000, failures=0)

    """

    def __init__(
        self, bundle: Path, prompts: Path, out: Path, job: BulkJob, c2pa: Path | None = None
    ) -> None:
        # Before the hash: a change while the file is read changes the marks too.
        self._marks = file_marks(prompts)
        # On another machine of a cluster, the same path may hold something else.
        for path, known in ((bundle / MANIFEST, job.bundle), (prompts, job.prompts)):
            if file_sha256(path) != known:
                raise HipaError(f"{path} is not the job's: another file, or it was changed.")
        self._signer = None if c2pa is None else ContentSigner.read(c2pa)
        if (self._signer and self._signer.certificates_sha256) != job.signer:
            raise HipaError(
                f"--c2pa is {c2pa}, which is not the job's signer. Give the file of the first run."
            )
        self._prompts = prompts
        self._out = out
        self._job = job
        checker = None if job.checker is None else import_checker(job.checker)
        self._pipe = OneStepPipeline.load(bundle, job.backend, checker=checker)
        try:
            require_task(self._pipe.bundle, "generate")
            require_signer(self._pipe.bundle.manifest.marks, self._signer)
            self._pipe.warmup()
        except BaseException:
            self._pipe.close()
            raise

    def make(self, shard: int) -> ShardReport:
        """Make a shard. Its file appears when it is whole.

        Raises:
            HipaError: the table was changed since the start, or the table or the backend fails. A
                row that fails alone is listed.

        """
        self._check_table()
        failures: list[dict[str, object]] = []
        target = shard_path(self._out, shard)
        part = target.with_name(f".{target.name}.part")
        images = 0
        try:
            with (
                part.open("wb") as file,
                tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for row, prompt, content in self._images(shard, failures):
                    _add(tar, f"{row:09d}.png", content)
                    _add(tar, f"{row:09d}.txt", prompt.encode())
                    images += 1
            self._check_table()
            self._check_count(shard, images + len(failures))
            with part.open("rb") as written:
                os.fsync(written.fileno())
            listed = failures_path(self._out, shard)
            if failures:
                lines = [json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures]
                write_file(listed, "".join(lines).encode())
            else:
                listed.unlink(missing_ok=True)
            # Last: a shard that is there is never made again.
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return ShardReport(shard, images, len(failures))

    def _check_table(self) -> None:
        """Raise HipaError where the table does not hold the job's rows any more."""
        marks = file_marks(self._prompts)
        if marks == self._marks:
            return
        # A backup may link to the file, and that changes its marks: only the content counts.
        if marks is None or file_sha256(self._prompts) != self._job.prompts:
            raise HipaError(
                f"prompts {self._prompts} was changed or removed during the run. The finished "
                "shards are right, and are kept. Bring the file of the start back and run the "
                "command again, or choose another --out for the changed file."
            )
        self._marks = marks

    def _check_count(self, shard: int, count: int) -> None:
        """Raise HipaError where a shard has not as many images and failures as rows."""
        expected = len(self._job.rows_of(shard))
        if count != expected:
            raise HipaError(
                f"shard {shard} has {count} rows. Expected {expected}. prompts {self._prompts} is "
                "damaged, or was changed. The finished shards are kept. Write the file again as it "
                "was at the start, and run the command again."
            )

    def _images(
        self, shard: int, failures: list[dict[str, object]]
    ) -> Iterator[tuple[int, str, bytes]]:
        """Row, prompt and file of each image of a shard, in order, a few in memory."""
        jobs = self._jobs(shard, failures)
        while True:
            ahead = list(islice(jobs, _AHEAD))
            if not ahead:
                return
            rows = iter([row for row, _ in ahead])
            for batch in cut([job for _, job in ahead], self._pipe.sizes_for(ahead[0][1])):
                for job, made in zip(batch, self._made(batch), strict=True):
                    row = next(rows)
                    if isinstance(made, str):
                        failures.append({"row": row, "error": made})
                        continue
                    yield row, job.prompt, self._file(*made)

    def _made(self, batch: list[ImageJob]) -> Iterator[tuple[np.ndarray, dict[str, Any]] | str]:
        """An image with its parameters for each job, or why there is none."""
        try:
            result = self._pipe.guard(finished_result(self._pipe.make(batch)))
        except NotFiniteError as error:
            if len(batch) == 1:
                yield str(error)
                return
            # One of them is at fault, and the others are images.
            for job in batch:
                yield from self._made([job])
            return
        withheld = {one.index: one.reason for one in result.flagged}
        shown = iter(zip(result.images_BHWC, result.parameters, strict=True))
        for place in range(len(batch)):
            if place in withheld:
                yield f"withheld: flagged by {withheld[place]}"
            else:
                yield next(shown)

    def _file(self, image_HWC: np.ndarray, parameters: dict[str, Any]) -> bytes:
        """An image as PNG, with what the bundle's owner wants in it."""
        marks = self._pipe.bundle.manifest.marks
        return encode_marked(image_HWC, parameters, "png", marks=marks, signer=self._signer)

    def _jobs(
        self, shard: int, failures: list[dict[str, object]]
    ) -> Iterator[tuple[int, ImageJob]]:
        rows = self._job.rows_of(shard)
        for row, text in read_rows(self._prompts, self._job.column, rows):
            prompt = one_line(text or "")
            try:
                if not prompt:
                    raise HipaError("the prompt is empty.")
                if len(prompt) > MAX_CHARACTERS:
                    raise HipaError(f"the prompt has more than {MAX_CHARACTERS} characters.")
                pairs = [(prompt, self._job.seed + row)]
                (job,) = self._pipe.jobs(pairs, truncate=self._job.truncate)
            except HipaError as error:
                failures.append({"row": row, "error": str(error)})
                continue
            yield row, job

    def close(self) -> None:
        """Release the bundle."""
        self._pipe.close()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # of time 0, and owned by nobody
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
