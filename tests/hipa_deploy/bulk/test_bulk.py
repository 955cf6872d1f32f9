"""Bulk runs of a tiny bundle: shards, what is resumed, what fails."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.bulk.bulk_job import (
    BulkJob,
    begin,
    missing_shards,
    new_job,
    read_rows,
    shard_path,
)
from hipa_deploy.bulk.shard_maker import ShardMaker
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.commands.app import main
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.parts import batch_maker
from hipa_deploy.generate.pipeline import OneStepPipeline
from tests.served import tiny_bundles

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PROMPTS = ["a red apple", "a boat", None, "a house", "a red apple " * 100, "a cat", "a dog"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    return tiny_bundles(tmp_path_factory.mktemp("bundles"))


def write_prompts(path: Path, prompts: list[str | None], group: int = 2) -> Path:
    table = pyarrow.table({"number": list(range(len(prompts))), "caption": prompts})
    parquet.write_table(table, path, row_group_size=group)
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["bulk", *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def content(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_text(kind: str, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    cells = pyarrow.array(["a boat", None, "a boat"])
    if kind == "dictionary":
        cells = cells.dictionary_encode()
    elif hasattr(pyarrow, kind):
        cells = cells.cast(getattr(pyarrow, kind)())
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"caption": cells}), path)
    assert new_job(bundles["tiny"].root, path, backend="onnxruntime").rows == 3
    expected = [(0, "a boat"), (1, None), (2, "a boat")]
    assert list(read_rows(path, "caption", range(3))) == expected


@pytest.mark.parametrize("rows", [range(7), range(2, 5), range(6, 7), range(3, 4)])
def test_rows_of_any_group(rows: range, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.parquet", PROMPTS)
    assert list(read_rows(path, "caption", rows)) == [(row, PROMPTS[row]) for row in rows]


def test_every_row_is_in_one_shard() -> None:
    job = BulkJob(
        bundle="b", backend="onnxruntime", prompts="p", rows=7, column="c", seed=0, shard_size=3,
        truncate=False,
    )  # fmt: skip
    assert [job.rows_of(shard) for shard in range(job.shards)] == [
        range(3), range(3, 6), range(6, 7)
    ]  # fmt: skip


def test_shards_hold_the_images_of_the_pipeline_and_are_made_once(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    out = tmp_path / "out"
    arguments = (bundles["tiny"].root, prompts, "--out", out, "--seed", 40, "--shard-size", 3)
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    assert "3 shards, 3 to make" in captured.out
    assert "2 shards have rows without an image" in captured.err

    made = {}
    for shard in range(3):
        made |= content(shard_path(out, shard))
    with OneStepPipeline.load(bundles["tiny"].root, "onnxruntime") as pipe:
        good = [0, 1, 3, 5, 6]
        assert sorted(made) == sorted(f"{row:09d}.{end}" for row in good for end in ("png", "txt"))
        for row in good:
            expected = pipe.generate([(PROMPTS[row], 40 + row)])
            image = Image.open(io.BytesIO(made[f"{row:09d}.png"]))
            np.testing.assert_array_equal(np.asarray(image), expected.images_BHWC[0])
            assert made[f"{row:09d}.txt"].decode() == PROMPTS[row]
            assert json.loads(image.info["hipa"])["seed"] == 40 + row

    failed = [json.loads(line) for line in (out / "shard-000001.failures.jsonl").open()]
    assert [failure["row"] for failure in failed] == [4]
    assert "tokens" in failed[0]["error"]
    assert "empty" in (out / "shard-000000.failures.jsonl").read_text()

    # A shard that is lost is made again, to the byte; the others are not touched.
    before = {shard: shard_path(out, shard).read_bytes() for shard in range(3)}
    stamps = {shard: shard_path(out, shard).stat().st_mtime_ns for shard in (0, 2)}
    shard_path(out, 1).unlink()
    (out / ".shard-000001.tar.part").write_bytes(b"half")
    assert run(*arguments) == 0
    assert "3 shards, 1 to make" in capsys.readouterr().out
    assert {shard: shard_path(out, shard).read_bytes() for shard in range(3)} == before
    assert {shard: shard_path(out, shard).stat().st_mtime_ns for shard in (0, 2)} == stamps
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []


def test_a_checker_of_ones_own(
    bundles: dict[str, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = "def some(images):\n    return ['odd' if x.sum() % 2 else False for x in images]\n"
    (tmp_path / "checker_of_bulk.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    root = bundles["tiny"].root
    texts = [f"{letter} boat" for letter in "abcdefgh"]
    prompts = write_prompts(tmp_path / "p.parquet", texts)
    with OneStepPipeline.load(root, "onnxruntime") as pipe:
        images = [pipe(text, seed=row).images_BHWC[0] for row, text in enumerate(texts)]
    odd = [row for row, image_HWC in enumerate(images) if image_HWC.sum() % 2]
    assert 0 < len(odd) < len(texts)

    arguments = (root, prompts, "--out", tmp_path / "out", "--shard-size", 8)
    checker = ("--checker", "checker_of_bulk:some")
    assert run(*arguments, *checker) == 1
    assert "pass --allow-code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*arguments, *checker, "--allow-code") == 0
    lines = (tmp_path / "out/shard-000000.failures.jsonl").read_text(encoding="utf-8")
    failures = [json.loads(line) for line in lines.splitlines()]
    assert [failure["row"] for failure in failures] == odd
    assert {failure["error"] for failure in failures} == {"withheld: flagged by odd"}

    # The images of one folder have all been seen by the same checker.
    capsys.readouterr()
    assert run(*arguments) == 1
    assert "checker was checker_of_bulk:some, now it is None" in capsys.readouterr().err
    job = BulkJob.model_validate_json((tmp_path / "out/job.json").read_text(encoding="utf-8"))
    with pytest.raises(HipaError, match="--allow-code"):
        ShardMaker(root, prompts, tmp_path / "out", job)


def test_a_table_without_one_image_is_an_error(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a column that is empty. A part of the rows that fails is a warning."""
    prompts = tmp_path / "p.parquet"
    cells = pyarrow.array([None, None, None], pyarrow.string())
    parquet.write_table(pyarrow.table({"caption": cells}), prompts)
    out = tmp_path / "out"
    for _ in range(2):  # made, and found there
        assert run(bundles["tiny"].root, prompts, "--out", out, "--shard-size", 2) == 1
        assert "no row of" in capsys.readouterr().err
    assert "empty" in (out / "shard-000001.failures.jsonl").read_text()


def test_columns_that_could_be_mixed_up(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table([["x"], ["y"]], names=["caption", "caption"]), path)
    with pytest.raises(HipaError, match="has 2 columns 'caption'"):
        new_job(bundles["tiny"].root, path, backend="onnxruntime")
    # Parquet calls the part b of the column a 'a.b', too.
    parquet.write_table(pyarrow.table({"a": [{"b": "not this"}], "a.b": ["this"]}), path)
    assert list(read_rows(path, "a.b", range(1))) == [(0, "this")]


@pytest.mark.parametrize("kind", ["string", "dictionary"])
def test_a_row_that_is_no_utf_8_fails_alone(
    kind: str, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    """Tables of the web have such rows, and pyarrow writes them and reads them."""
    texts = pyarrow.array([b"a pear", b"caf\xe9 au lait", None, b"a boat"])
    cells = pyarrow.StringArray.from_buffers(4, *texts.buffers()[1:], texts.buffers()[0])
    if kind == "dictionary":
        cells = cells.dictionary_encode()
    prompts = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"caption": cells}), prompts)
    out = tmp_path / "out"
    assert run(bundles["tiny"].root, prompts, "--out", out) == 0
    made = content(shard_path(out, 0))
    assert made["000000000.txt"] == b"a pear"
    assert made["000000003.txt"] == b"a boat"
    failed = [json.loads(line) for line in (out / "shard-000000.failures.jsonl").open()]
    assert [failure["row"] for failure in failed] == [1, 2]
    assert "no UTF-8" in failed[0]["error"]


def test_a_row_that_overflows_fails_alone(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", ["a pear", "a boat", "a house"])
    out = tmp_path / "out"
    check = batch_maker.check_finite

    def overflowing(values_BCHW: np.ndarray, jobs: Any, *others: Any) -> None:
        boats_B = np.array([job.prompt == "a boat" for job in jobs])
        check(np.where(boats_B[:, None, None, None], np.nan, values_BCHW), jobs, *others)

    monkeypatch.setattr(batch_maker, "check_finite", overflowing)
    assert run(bundles["tiny"].root, prompts, "--out", out) == 0
    assert {name for name in content(shard_path(out, 0)) if name.endswith("png")} == {
        "000000000.png",
        "000000002.png",
    }
    (failed,) = [json.loads(line) for line in (out / "shard-000000.failures.jsonl").open()]
    assert failed["row"] == 1
    assert "NaN or infinity" in failed["error"]


def test_a_shard_that_stops_half_way_leaves_no_file(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", ["a boat"] * 5)
    job = new_job(bundles["tiny"].root, prompts, backend="onnxruntime", shard_size=5)
    maker = ShardMaker(bundles["tiny"].root, prompts, tmp_path, job)

    def fails(*_: object) -> None:
        raise HipaError("the device is gone.")

    monkeypatch.setattr(maker._pipe, "make", fails)
    with pytest.raises(HipaError, match="device is gone"):
        maker.make(0)
    maker.close()
    assert missing_shards(job, tmp_path) == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


@pytest.mark.parametrize("prompts", [["a house"] * 4, ["a boat"], ["a boat"] * 6])
def test_a_table_that_is_changed_between_two_shards_stops_the_run(
    prompts: list[str | None], bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    path = write_prompts(tmp_path / "p.parquet", ["a boat"] * 4)
    job = new_job(bundles["tiny"].root, path, backend="onnxruntime", shard_size=2)
    maker = ShardMaker(bundles["tiny"].root, path, tmp_path, job)
    assert maker.make(0).images == 2
    before = shard_path(tmp_path, 0).read_bytes()
    write_prompts(path, prompts)
    with pytest.raises(HipaError, match=r"changed or removed during the run.* are kept"):
        maker.make(1)
    assert missing_shards(job, tmp_path) == [1]
    assert shard_path(tmp_path, 0).read_bytes() == before
    path.unlink()
    with pytest.raises(HipaError, match="changed or removed"):
        maker.make(1)
    # The same content in another file is the job's.
    write_prompts(path, ["a boat"] * 4)
    assert maker.make(1).images == 2
    maker.close()
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "p.parquet", "shard-000000.tar", "shard-000001.tar"
    ]  # fmt: skip


def test_a_table_that_is_changed_within_a_shard_stops_the_run(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_prompts(tmp_path / "p.parquet", ["a boat", None])
    job = new_job(bundles["tiny"].root, path, backend="onnxruntime")
    maker = ShardMaker(bundles["tiny"].root, path, tmp_path, job)
    make = maker._pipe.make

    def changes(*arguments: Any) -> Any:
        write_prompts(path, ["a house", None])
        return make(*arguments)

    monkeypatch.setattr(maker._pipe, "make", changes)
    with pytest.raises(HipaError, match="changed or removed during the run"):
        maker.make(0)
    maker.close()
    assert [one.name for one in tmp_path.iterdir()] == ["p.parquet"]


def test_a_shard_without_all_of_its_rows_is_not_kept(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    path = write_prompts(tmp_path / "p.parquet", ["a boat"] * 3)
    job = new_job(bundles["tiny"].root, path, backend="onnxruntime", shard_size=3)
    longer = job.model_copy(update={"rows": 5})
    maker = ShardMaker(bundles["tiny"].root, path, tmp_path, longer)
    assert maker.make(0).images == 3
    with pytest.raises(HipaError, match=r"shard 1 has 0 rows\. Expected 2\."):
        maker.make(1)
    maker.close()
    assert missing_shards(longer, tmp_path) == [1]


def test_a_table_that_is_changed_before_it_is_hashed_is_no_job(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_prompts(tmp_path / "p.parquet", ["a boat"] * 3)

    def changes(seed: int, rows: int) -> None:
        write_prompts(path, ["a boat"] * 5)

    monkeypatch.setattr("hipa_deploy.bulk.bulk_job.check_seeds", changes)
    with pytest.raises(HipaError, match="was changed while it was read"):
        new_job(bundles["tiny"].root, path, backend="onnxruntime")


def test_a_table_that_is_missing_is_said_before_a_library(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(HipaError, match=r"none\.parquet does not exist. Expected a \.parquet file"):
        new_job(bundles["tiny"].root, tmp_path / "none.parquet", backend="onnxruntime")
    with pytest.raises(HipaError, match="is no file"):
        new_job(bundles["tiny"].root, tmp_path, backend="onnxruntime")


def test_another_job_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    out = tmp_path / "out"
    out.mkdir()
    root = bundles["tiny"].root
    begin(new_job(root, prompts, backend="onnxruntime"), out)
    begin(new_job(root, prompts, backend="onnxruntime"), out)
    with pytest.raises(HipaError, match="its seed was 0, now it is 1"):
        begin(new_job(root, prompts, backend="onnxruntime", seed=1), out)
    job = new_job(root, prompts, backend="onnxruntime")
    write_prompts(prompts, [*PROMPTS[:-1], "a bird"])
    with pytest.raises(HipaError, match="its prompts was"):
        begin(new_job(root, prompts, backend="onnxruntime"), out)
    with pytest.raises(HipaError, match="not the job's"):
        ShardMaker(root, prompts, out, job)


def test_a_run_goes_on_with_the_same_signer_alone(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("c2pa")
    from tests.certificates import write_chain

    prompts = write_prompts(tmp_path / "p.parquet", ["a boat", "a house"])
    out = tmp_path / "out"
    first = write_chain(tmp_path / "first.pem")
    arguments = (bundles["tiny"].root, prompts, "--out", out, "--shard-size", 1)
    assert run(*arguments, "--c2pa", first) == 0
    shard_path(out, 1).unlink()
    capsys.readouterr()
    assert run(*arguments) == 1
    message = capsys.readouterr().err
    assert "they are signed (certificates" in message
    assert "now they would be unsigned. Use --c2pa" in message
    assert message.count("\n") == 1
    assert run(*arguments, "--c2pa", write_chain(tmp_path / "second.pem")) == 1
    assert "of another job" in capsys.readouterr().err
    assert missing_shards(BulkJob.model_validate_json((out / "job.json").read_text()), out) == [1]
    assert run(*arguments, "--c2pa", first) == 0


def test_a_signer_that_another_machine_has_is_refused(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    pytest.importorskip("c2pa")
    from tests.certificates import write_chain

    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    root = bundles["tiny"].root
    job = new_job(root, prompts, backend="onnxruntime", signer="0" * 64)
    for c2pa in (None, write_chain(tmp_path / "other.pem")):
        with pytest.raises(HipaError, match="is not the job's signer"):
            ShardMaker(root, prompts, tmp_path, job, c2pa)


def test_a_record_without_a_signer_is_one_of_unsigned_images(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    root = bundles["tiny"].root
    out = tmp_path / "out"
    out.mkdir()
    job = new_job(root, prompts, backend="onnxruntime")
    (out / "job.json").write_text(job.model_dump_json(exclude={"signer"}))
    begin(job, out)
    with pytest.raises(HipaError, match=r"they are unsigned, now .* signed \(certificates 000"):
        begin(new_job(root, prompts, backend="onnxruntime", signer="0" * 64), out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--column", "title"], "no column 'title'"),
        (["--column", "number"], "is int64. Expected text"),
        (["--column", "several"], ": string>. Expected text, one in each row"),
        (["--column", "parts"], "is struct<text: string>. Expected text"),
        (["--shard-size", "0"], "--shard-size is 0"),
        (["--seed", "-1"], "seed -1"),
        (["--backend", "magic"], "is unknown"),
        (["--replicas", "2"], "Give --ray"),
        (["--replicas", "two"], "FEWEST:MOST"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str],
    words: str,
    bundles: dict[str, Bundle],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "p.parquet"
    columns = {"caption": ["a boat"], "number": [1], "several": [["a", "b"]]}
    parquet.write_table(pyarrow.table({**columns, "parts": [{"text": "a"}]}), prompts)
    assert run(bundles["tiny"].root, prompts, "--out", tmp_path / "out", *arguments) == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_job_are_left_alone(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "p.parquet", PROMPTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert run(bundles["tiny"].root, prompts, "--out", tmp_path / "out") == 1
    assert "no bulk job" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "text.parquet").write_text("a boat")
    assert run(bundles["tiny"].root, tmp_path / "text.parquet", "--out", tmp_path / "o") == 1
    assert run(bundles["tiny-edit"].root, prompts, "--out", tmp_path / "o") == 1
    assert not (tmp_path / "o").exists()
