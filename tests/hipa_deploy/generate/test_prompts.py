from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompts import (
    CACHED_BATCHES,
    BakedPrompts,
    EncodedPrompts,
    read_closed_set,
)


def bake(folder: Path, prompts: list[str], contexts: int) -> BakedPrompts:
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    np.save(
        folder / "contexts.npy", np.arange(contexts * 6, dtype=np.float16).reshape(contexts, 2, 3)
    )
    return BakedPrompts(folder / "prompts.txt", folder / "contexts.npy")


def test_baked_contexts_are_looked_up(tmp_path: Path) -> None:
    source = bake(tmp_path, ["a cat", "a dog"], 2)
    context_BLD = source.contexts(
        source.prepare(["a dog", "a cat", "a dog"], truncate=False), nullcontext
    )
    assert context_BLD.dtype == np.float16
    assert context_BLD[:, 0, 0].tolist() == [6, 0, 6]


def test_another_prompt_is_refused_with_the_nearest(tmp_path: Path) -> None:
    source = bake(tmp_path, ["3d emoji of a cat", "3d emoji of a dog"], 2)
    with pytest.raises(
        HipaError,
        match=r"'3d emoji of a dig' is not one of this bundle's 2 baked prompts.*'3d emoji of a dog'",
    ):
        source.prepare(["3d emoji of a dig"], truncate=False)


def test_contexts_that_do_not_match(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="2 prompts, 3 contexts"):
        bake(tmp_path, ["a", "b"], 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\na\n", "line 3 repeats line 1 \\('a'\\)"),
        (b"\xff\n", "cannot be read"),
    ],
)
def test_bad_sets(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(HipaError, match=message):
        read_closed_set(tmp_path / "prompts.txt")


def test_a_missing_set(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="cannot be read"):
        read_closed_set(tmp_path / "none.txt")


def test_contexts_are_remembered_and_forgotten() -> None:
    runs: list[np.ndarray] = []

    def run(tokens_BL: np.ndarray) -> np.ndarray:
        runs.append(tokens_BL)
        return tokens_BL.astype(np.float32)

    source = EncodedPrompts(None, run)  # type: ignore[arg-type]  # contexts() needs no tokenizer
    for number in (*range(CACHED_BATCHES), 0):
        source.contexts([np.asarray([number])], nullcontext)
    assert len(runs) == CACHED_BATCHES
    source.contexts([np.asarray([-1])], nullcontext)  # pushes out 0
    source.contexts([np.asarray([0])], nullcontext)
    assert len(runs) == CACHED_BATCHES + 2
