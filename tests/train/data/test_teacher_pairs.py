from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.train.data import teacher_pairs as module
from hipa_deploy.train.data.teacher_pairs import (
    cache_folder,
    cached_rows,
    prompt_order,
    teacher_latents,
    teacher_pairs,
    teacher_scheduler,
)
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.model import mixed_precision
from hipa_deploy.train.model.conditions import Conditions
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.recipes.recipe import TeacherSettings
from tests.tiny_model import PROMPTS

ZERO_SIGNAL = "rescale_betas_zero_snr"
TEACHER = TeacherSettings(steps=3, guidance=4.0, pairs=6, batch=4, dtype="float32")


def equal(a: module.Pairs, b: module.Pairs) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("latents_NCHW", "prompt_N", "seed_N")
    )


def test_same_as_the_pipeline(model: DiffusionModel) -> None:
    noise = model.noise([7])
    got = teacher_latents(
        model, noise, model.conditions(["a red apple"]), model.unguided(), TEACHER
    )
    model.pipe.scheduler = teacher_scheduler(model.schedule, "ddim")
    expected = model.pipe(
        "a red apple",
        latents=noise,
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_without_guidance_the_empty_prompt_does_not_matter(model: DiffusionModel) -> None:
    plain = TEACHER.model_copy(update={"guidance": 1.0})
    noise = model.noise([7])
    conditions = model.conditions(["a red apple"])
    first = teacher_latents(model, noise, conditions, model.unguided(), plain)
    unused = Conditions(torch.full_like(conditions.context_BLD, torch.nan))
    assert torch.equal(first, teacher_latents(model, noise, conditions, unused, plain))


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_latents_that_are_not_finite_end_at_the_first_shard(
    model: DiffusionModel, tmp_path: Path, precision: str, half_precision: None
) -> None:
    # Finite weights, and an output beyond float16, as that of a layer that overflows.
    model.unet.conv_out.bias.fill_(1e5)
    teacher = TEACHER.model_copy(update={"dtype": "float16", "mixed_precision": precision})
    message = "teacher pairs 0 to 3: the teacher's latents are not finite as float16"
    with pytest.raises(HipaError, match=message) as error:
        teacher_pairs(model, PROMPTS, teacher, seed=0, cache=tmp_path)
    assert ("teacher.mixed_precision" in str(error.value)) == (precision == "fp16")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_a_schedule_from_which_eps_has_no_first_step(
    model: DiffusionModel, tmp_path: Path, sampler: str
) -> None:
    config = replace(model.config, scheduler={**model.config.scheduler, ZERO_SIGNAL: True})
    model.__dict__["config"] = config  # a cached property
    teacher = TEACHER.model_copy(update={"sampler": sampler})
    with pytest.raises(HipaError, match="predicts epsilon, and its noise schedule ends in pure"):
        teacher_pairs(model, PROMPTS, teacher, seed=0, cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("sampler", ["euler", "DDIM", ""])
def test_a_sampler_of_no_known_name(model: DiffusionModel, sampler: str) -> None:
    with pytest.raises(HipaError, match=f"'{sampler}' is unknown. Expected ddim or dpmsolver"):
        teacher_scheduler(model.schedule, sampler)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("kind", ["model_dir", "v_model_dir"])
def test_samplers_start_at_the_last_timestep(
    sampler: str, kind: str, request: pytest.FixtureRequest
) -> None:
    model = DiffusionModel.load(request.getfixturevalue(kind), "cpu")
    scheduler = teacher_scheduler(model.schedule, sampler)
    scheduler.set_timesteps(25)
    assert len(scheduler.timesteps) == 25
    assert scheduler.timesteps[0] == 999
    assert scheduler.config.prediction_type == model.prediction_type
    teacher = TEACHER.model_copy(update={"sampler": sampler})
    latents = teacher_latents(
        model, model.noise([0, 1]), model.conditions(PROMPTS[:2]), model.unguided(), teacher
    )
    assert latents.shape == (2, 4, 8, 8)
    assert torch.isfinite(latents).all()
    assert isinstance(scheduler, DPMSolverMultistepScheduler) == (sampler == "dpmsolver++")


def test_cache_is_read_resumed_and_extended(
    model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = teacher_latents

    def counted(model: DiffusionModel, noise: torch.Tensor, *conditions: object) -> torch.Tensor:
        made.append(len(noise))
        return original(model, noise, *conditions)

    monkeypatch.setattr(module, "teacher_latents", counted)
    first = teacher_pairs(model, PROMPTS, TEACHER, seed=0, cache=tmp_path)
    assert made == [4, 2]
    assert equal(teacher_pairs(model, PROMPTS, TEACHER, seed=0, cache=tmp_path), first)
    assert made == [4, 2]

    # A damaged shard is made again, and is the same.
    shard = sorted(tmp_path.rglob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    assert equal(teacher_pairs(model, PROMPTS, TEACHER, seed=0, cache=tmp_path), first)
    assert made == [4, 2, 4]

    # More pairs: whole shards stay.
    more = teacher_pairs(
        model, PROMPTS, TEACHER.model_copy(update={"pairs": 8}), seed=0, cache=tmp_path
    )
    assert made == [4, 2, 4, 4]
    assert torch.equal(more.latents_NCHW[:4], first.latents_NCHW[:4])


def test_a_shard_of_another_teacher_is_refused(model: DiffusionModel, tmp_path: Path) -> None:
    teacher_pairs(model, PROMPTS, TEACHER, seed=0, cache=tmp_path)
    other = TEACHER.model_copy(update={"guidance": 2.0})
    folder = cache_folder(model, PROMPTS, TEACHER, 0, tmp_path)
    folder.rename(cache_folder(model, PROMPTS, other, 0, tmp_path))
    with pytest.raises(
        HipaError,
        match=rf"00000004.safetensors are another teacher's \(cache {folder.name}\). Remove",
    ):
        teacher_pairs(model, PROMPTS, other, seed=0, cache=tmp_path)


def test_a_full_disk_keeps_the_shards_before(
    model: DiffusionModel, tmp_path: Path, monkeypatch
) -> None:
    original = module.write_file
    written = []

    def full(path: Path, content: bytes) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        original(path, content)

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(
        HipaError,
        match=r"cannot be written: No space left on device. The shards before it are kept",
    ):
        teacher_pairs(model, PROMPTS, TEACHER, seed=0, cache=tmp_path)
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == [
        "00000000-00000004.safetensors"
    ]


def test_a_cache_that_machines_do_not_share(
    model: DiffusionModel, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(Processes, "fail_together", lambda self: nullcontext())
    with pytest.raises(
        HipaError, match=r"made by another process, are not seen here. Point HIPA_CACHE at"
    ):
        teacher_pairs(model, PROMPTS, TEACHER, seed=0, cache=tmp_path, processes=Processes(1, 2))
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == [
        "00000004-00000006.safetensors"
    ]


@pytest.mark.usefixtures("half_precision")
def test_a_teacher_in_half_precision(model: DiffusionModel) -> None:
    half = TEACHER.model_copy(update={"mixed_precision": "fp16"})
    arguments = (model, model.noise([0]), model.conditions(PROMPTS[:1]), model.unguided())
    exact = teacher_latents(*arguments, TEACHER)
    rounded = teacher_latents(*arguments, half)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, rtol=0.05, atol=0.5)


def test_stored_noise_and_prompt_lead_to_the_latents(model: DiffusionModel, tmp_path: Path) -> None:
    pairs = teacher_pairs(model, PROMPTS, TEACHER, seed=3, cache=tmp_path)
    conditions = model.conditions([PROMPTS[i] for i in pairs.prompt_N[4:]])
    again = teacher_latents(
        model, model.noise(pairs.seed_N[4:].tolist()), conditions, model.unguided(), TEACHER
    )
    assert torch.allclose(again, pairs.latents_NCHW[4:], atol=1e-5)
    assert len(set(pairs.seed_N.tolist())) == 6


def test_half_precision_storage(model: DiffusionModel, tmp_path: Path) -> None:
    half = TEACHER.model_copy(update={"dtype": "float16"})
    assert (
        teacher_pairs(model, PROMPTS, half, seed=0, cache=tmp_path).latents_NCHW.dtype
        == torch.float16
    )


@pytest.mark.usefixtures("half_precision")
def test_cache_key_depends_on_content(
    model: DiffusionModel, v_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(
        model: DiffusionModel = model,
        prompts: list[str] = PROMPTS,
        seed: int = 0,
        **changes: object,
    ) -> Path:
        return cache_folder(model, prompts, TEACHER.model_copy(update=changes), seed, tmp_path)

    changed = [
        key(DiffusionModel.load(v_model_dir, "cpu")),
        key(prompts=PROMPTS[:2]),
        key(seed=1),
        key(steps=4),
        key(guidance=2.0),
        key(sampler="dpmsolver++"),
        key(mixed_precision="bf16"),
    ]
    assert len({key(), *changed}) == 8
    assert key(pairs=100) == key()

    # Pairs that a CPU computes in float32 in place of bfloat16 are float32's.
    monkeypatch.setattr(mixed_precision, "_cpu_computes_in", lambda precision: False)
    assert key(mixed_precision="bf16") == key()

    # How prompts are encoded is part of it, but for defaults, which older pairs do not name.
    texts = [TextSettings(clip_skip=1), TextSettings(context_tokens=154)]
    texts.append(TextSettings(prompt_weights=True))
    encoded = [key(replace(model, text=text)) for text in texts]
    assert len({key(), *encoded}) == 4
    assert key(replace(model, text=TextSettings())) == key()


def test_every_prompt_equally_often() -> None:
    order = prompt_order(5, 23, seed=0)
    assert sorted(order[:20].bincount().tolist()) == [4] * 5
    assert torch.equal(prompt_order(5, 11, seed=0), order[:11])
    assert not torch.equal(prompt_order(5, 23, seed=1), order)


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_rows_in_memory_or_computed(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TABLE_BYTES", limit)
    rows = cached_rows("doubles", lambda index: torch.tensor(index)[:, None] * 2.0, count=40)
    assert rows(torch.tensor([39, 0, 39])).tolist() == [[78], [0], [78]]


def test_a_table_takes_no_memory_of_a_gpu() -> None:
    moved = []

    class OnGpu(torch.Tensor):
        """A tensor that says when it is copied into the processor's memory."""

        def cpu(self, *_: object, **__: object) -> torch.Tensor:
            moved.append(len(self))
            return self.as_subclass(torch.Tensor)

    def computed(rows: list[int]) -> torch.Tensor:
        return torch.ones(len(rows), 3).as_subclass(OnGpu)

    rows = cached_rows("ones", computed, count=40)
    assert moved == [16, 16, 8]
    assert type(rows(torch.tensor([39, 0]))) is torch.Tensor
