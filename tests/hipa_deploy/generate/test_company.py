"""Images of many requests in one call: each is the one that it is alone, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.errors import HipaError
from hipa_deploy.images.example_source import example_image, example_mask
from hipa_deploy.images.source import control_source
from tests.served import LARGEST, tiny_bundles

BACKENDS = ("onnxruntime", "openvino")
PROMPTS = ("a red pear", "an apple", "a boat on the sea")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tiny_bundles(tmp_path_factory.mktemp("bundles"))
    return {name: bundle.root for name, bundle in made.items()}


def load(root: Path, backend: str) -> OneStepPipeline:
    pytest.importorskip(backend)
    return OneStepPipeline.load(root, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_every_place_of_every_batch(bundles: dict[str, Path], backend: str) -> None:
    with load(bundles["tiny"], backend) as pipe:
        alone = {}
        for prompt in PROMPTS:
            for seed in range(3):
                alone[prompt, seed] = pipe(prompt, seed=seed).images_BHWC[0]
    with load(bundles["tiny"], backend) as pipe:
        for size in range(1, LARGEST + 1):
            for shift in range(3):
                pairs = [
                    (PROMPTS[(place + shift) % 3], (place + size) % 3) for place in range(size)
                ]
                result = pipe.generate(pairs)
                assert list(zip(result.prompts, result.seeds, strict=True)) == pairs
                for pair, image_HWC in zip(pairs, result.images_BHWC, strict=True):
                    np.testing.assert_array_equal(image_HWC, alone[pair])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", ["edit", "inpaint", "upscale"])
def test_images_from_images(bundles: dict[str, Path], backend: str, task: str) -> None:
    image = example_image(32, 32, number=1)
    with load(bundles[f"tiny-{task}"], backend) as pipe:
        if task == "edit":
            alone = [pipe.edit(image, PROMPTS[0], seed=seed).images_BHWC[0] for seed in range(5)]
            together = pipe.edit(image, PROMPTS[0], count=5).images_BHWC
        elif task == "inpaint":
            options = (image, example_mask(32, 32), PROMPTS[0])
            alone = [pipe.inpaint(*options, seed=seed).images_BHWC[0] for seed in range(5)]
            together = pipe.inpaint(*options, count=5).images_BHWC
        else:
            large = example_image(24, 40, number=1)
            together = pipe.upscale(large).images_BHWC
            pipe.warmup(1)
            assert pipe.batch_sizes == (1,)
            alone = pipe.upscale(large).images_BHWC
        np.testing.assert_array_equal(together, np.stack(list(alone)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_control_images_of_several_scales(bundles: dict[str, Path], backend: str) -> None:
    scales = (0.0, 0.3, 1.0, 2.0)
    with load(bundles["tiny-control"], backend) as pipe:
        jobs = []
        alone = []
        for seed, scale in enumerate(scales):
            image = example_image(32, 32, number=seed % 2)
            source = control_source(pipe.bundle, image, scale=scale, height=None, width=None)
            jobs += pipe.jobs([(PROMPTS[seed % 3], seed)], source=source)
            alone.append(pipe.control(image, PROMPTS[seed % 3], scale=scale, seed=seed))
        for order in (jobs, jobs[::-1], jobs + jobs):
            for made in pipe.make(order):
                expected = alone[made.parameters["seed"]].images_BHWC[0]
                np.testing.assert_array_equal(made.stage_image_HWC, expected)


def test_a_prompt_of_a_batch_is_known_afterwards(bundles: dict[str, Path]) -> None:
    encoded = []
    with load(bundles["tiny"], "onnxruntime") as pipe:
        encoder = pipe.runners["text_encoder"]
        run = encoder._run  # type: ignore[attr-defined]

        def count(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            encoded.append(len(inputs["tokens"]))
            return run(inputs)

        encoder._run = count  # type: ignore[attr-defined]
        pipe.generate([(PROMPTS[0], 0), (PROMPTS[1], 1), (PROMPTS[0], 2)])
        assert encoded == [1, 1]
        pipe.generate([(PROMPTS[1], 5)])
        pipe(PROMPTS[0], count=8)
        assert encoded == [1, 1]
        pipe([PROMPTS[2], PROMPTS[0]])
        assert encoded == [1, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_warm_up_gives_sizes_and_changes_no_image(bundles: dict[str, Path], backend: str) -> None:
    with load(bundles["tiny"], backend) as pipe:
        assert pipe.batch_sizes == tuple(range(1, LARGEST + 1))
        before = pipe(PROMPTS, count=3).images_BHWC
        found = pipe.warmup()
        assert found.sizes == pipe.batch_sizes
        assert found.sizes[0] == 1
        assert found.changing == ()
        np.testing.assert_array_equal(pipe(PROMPTS, count=3).images_BHWC, before)
        assert pipe.warmup(2).sizes in ((1,), (1, 2))
        with pytest.raises(HipaError, match="largest is 0"):
            pipe.warmup(0)


def test_a_bundle_of_one_batch_size() -> None:
    with load(Path("emoji"), "onnxruntime") as pipe:
        assert pipe.warmup().sizes == (1,)
        result = pipe.generate([(PROMPTS[0], 1), (PROMPTS[1], 2)])
        np.testing.assert_array_equal(
            result.images_BHWC[1], pipe(PROMPTS[1], seed=2).images_BHWC[0]
        )
        assert repr(result) == "GenerateResult(2 x 128x128: 'a red pear', seed 1, …)"


def test_what_holds_pixels_equals_itself_alone() -> None:
    with load(Path("emoji"), "onnxruntime") as pipe:
        jobs = [*pipe.jobs([(PROMPTS[0], 1)]), *pipe.jobs([(PROMPTS[0], 1)])]
        made = [image for job in jobs for image in pipe.make([job])]
        results = [pipe(PROMPTS[0], seed=1), pipe(PROMPTS[0], seed=1)]
        for one, other in (jobs, made, results):
            assert one == one
            assert one != other
            assert len({one, other}) == 2


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "got 0 prompts"),
        (["a pear"], "Expected a pair"),
        ([("a pear", 1, 2)], "Expected a pair"),
        ([("a pear", "1")], "seed is '1'"),
        ([("a pear", 1.0)], "seed is 1.0"),
        ([("a pear", True)], "seed is True"),
        ([("a pear", -1)], "out of range"),
        ([(7, 1)], "a prompt is 7"),
        ([("pear " * 90, 1)], "tokens"),
    ],
)
def test_requests_that_are_wrong(bundles: dict[str, Path], requests: list, message: str) -> None:
    with (
        load(bundles["tiny"], "onnxruntime") as pipe,
        pytest.raises(HipaError, match=message),
    ):
        pipe.generate(requests)


def test_a_list_of_seeds_is_refused_with_the_remedy(bundles: dict[str, Path]) -> None:
    with (
        load(bundles["tiny"], "onnxruntime") as pipe,
        pytest.raises(HipaError, match=r"seed is \[1, 2\].*pipe.generate\(\[\(prompt, seed\)"),
    ):
        pipe(["a pear", "a boat"], seed=[1, 2])  # type: ignore[arg-type]


def test_jobs_that_cannot_share_a_batch(bundles: dict[str, Path]) -> None:
    with load(bundles["tiny"], "onnxruntime") as pipe:
        jobs = pipe.jobs([("a pear", seed) for seed in range(LARGEST + 1)])
        for wrong in ([], jobs):
            with pytest.raises(HipaError, match="Expected 1 to 8 in a batch"):
                pipe.make(wrong)
    with load(bundles["tiny-edit"], "onnxruntime") as pipe:
        from hipa_deploy.images.source import edit_source

        image = example_image(32, 32, number=1)
        sources = [
            edit_source(pipe.bundle, image, strength=strength, height=None, width=None)
            for strength in (0.75, 0.5)
        ]
        mixed = [pipe.jobs([("a pear", 1)], source=source)[0] for source in sources]
        with pytest.raises(HipaError, match="differ in size, strength or refining"):
            pipe.make(mixed)
