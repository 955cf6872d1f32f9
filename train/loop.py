"""Train a HiPA adaptor: one readable function, and the run folder that makes it resumable."""

from __future__ import annotations

import hashlib
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from hipa_deploy.adaptor import AdaptorMetadata, read_metadata, unet_sha256
from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.files import refuse_to_overwrite
from hipa_deploy.images import grid
from hipa_deploy.train.adaptor import (
    PRESETS,
    adaptor_parameters,
    add_adaptor,
    load_weights,
    save_adaptor,
    without_adaptor,
)
from hipa_deploy.train.base_model import DiffusionModel, to_uint8
from hipa_deploy.train.loss import HipaLoss
from hipa_deploy.train.one_step import one_step_latents
from hipa_deploy.train.pairs import lookup, prompt_contexts, teacher_pairs
from hipa_deploy.train.perceptual import DistsLike
from hipa_deploy.train.progress import ProgressBar
from hipa_deploy.train.recipe import LossSettings, OptimiserSettings, Recipe, read_prompts

# What may change between two sittings of one run.
FREE_TO_CHANGE = {"checkpoint_every", "sample_every", "samples", "gradient_checkpointing", "prompts"}


def train_adaptor(
    recipe: Recipe,
    model_dir: Path,
    out: Path,
    *,
    initial_adaptor: Path | None = None,
    cache: Path | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> Path:
    """Train an adaptor for ``model_dir`` and write it to the new folder ``out``; the same call resumes a stopped run.

    ``out``.run holds the checkpoint, TensorBoard scalars and sample grids (teacher | base in one step | adapted).
    ``initial_adaptor`` is an adaptor folder of the same shape to start from. ``cache`` keeps teacher pairs.

    Raises:
        HipaError: bad input, a loss that is not finite, or Ctrl-C; the last checkpoint stays.

    """
    console = console or Console(stderr=True)
    refuse_to_overwrite(out)

    # The frozen base model, and what it says about the one step.
    model = DiffusionModel.load(model_dir, device)
    prompts = read_prompts(recipe, model_dir)
    metadata = _metadata(recipe, model, prompts)
    step_constants = {k: getattr(metadata, k) for k in ("timestep", "alpha_bar", "prediction_type")}

    # Adaptor, loss, optimiser; the run folder puts them back to where a stopped run was. All of it comes before the
    # teacher pairs, so that whatever does not fit shows before anything expensive starts.
    settings = recipe.adaptor
    add_adaptor(model.unet, targets=metadata.targets, rank=settings.rank, alpha=metadata.alpha, seed=recipe.seed)
    if initial_adaptor is not None:
        read_metadata(initial_adaptor, model_dir)
        load_weights(model.unet, initial_adaptor)
    if recipe.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.vae.enable_gradient_checkpointing()
    weights = adaptor_parameters(model.unet)
    loss = hipa_loss(recipe.loss).to(model.device)
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=recipe.optimiser.weight_decay)
    run = Run(out.with_name(out.name + ".run"), weights, optimizer, metadata)
    run.resume()

    # Teacher pairs: the same noise leads to the student's image and to the teacher's.
    context = prompt_contexts(model, prompts, console)
    with without_adaptor(model.unet):
        pairs = teacher_pairs(
            model, prompts, recipe.teacher, seed=recipe.seed, context=context, cache=cache, console=console
        )

    def teacher_latents(rows: Tensor | list[int]) -> Tensor:
        return pairs.latents_NCHW[rows].float().to(model.device)

    def student_latents(rows: Tensor) -> Tensor:
        noise_BCHW = model.noise(pairs.seed_N[rows].tolist())
        return one_step_latents(model.unet, noise_BCHW, context(pairs.prompt_N[rows]), **step_constants)

    @torch.no_grad()
    def teacher_images(rows: list[int]) -> Tensor:
        return model.decode(teacher_latents(rows)).clamp(0, 1)

    # What training compares with, and the two columns of the sample grid that stay.
    targets = lookup("teacher images", teacher_images, len(pairs), console)
    shown = torch.arange(min(recipe.samples, len(pairs)))
    with torch.no_grad(), without_adaptor(model.unet):
        columns = [to_uint8(targets(shown)), to_uint8(model.decode(student_latents(shown)))]

    with run.writer() as scalars, interruptible() as stop, ProgressBar(console) as progress:
        task = progress.add_task("training", total=recipe.steps, completed=run.step)
        while run.step < recipe.steps:
            # One UNet call at the last timestep, x0 in float32, decoded unless in the warm-up.
            rows = batch_rows(len(pairs), recipe.batch, recipe.seed, run.step)
            latents, target_latents = student_latents(rows), teacher_latents(rows)
            if run.step < recipe.loss.latent_warmup_steps:
                total, terms = loss.latent_only(latents, target_latents)
            else:
                total, terms = loss(model.decode(latents), targets(rows), latents, target_latents)

            # Step, unless something is not finite.
            total.backward()
            norm = nn.utils.clip_grad_norm_(weights.values(), recipe.optimiser.clip_norm)
            run.check_finite(total.item(), norm.item())
            rate = learning_rate(recipe.optimiser, run.step, recipe.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1

            # Report, sample, checkpoint.
            values = {"loss": total.item(), **{name: term.item() for name, term in terms.items()}}
            progress.update(task, completed=run.step)
            progress.note = f"step {run.step}  " + "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            for name, value in {**values, "gradient_norm": norm.item(), "learning_rate": rate}.items():
                scalars.add_scalar(name, value, run.step)
            done = run.step == recipe.steps
            if run.step % recipe.sample_every == 0 or done:
                with torch.no_grad():
                    run.save_samples([*columns, to_uint8(model.decode(student_latents(shown)))])
            if run.step % recipe.checkpoint_every == 0 or done or stop.is_set():
                run.save()
                console.print(progress.note, highlight=False)
            if stop.is_set() and not done:
                raise HipaError(f"stopped at step {run.step} of {recipe.steps}. Run the same command to resume.")

    return save_adaptor(model.unet, metadata, model.schedule, out)


def hipa_loss(settings: LossSettings) -> HipaLoss:
    """The loss a recipe describes, on EfficientNet-Lite0 features."""
    return HipaLoss(
        DistsLike(size=settings.perceptual_size),
        perceptual_weight=settings.perceptual_weight,
        hf_weight=settings.hf_weight,
        latent_weight=settings.latent_weight,
        radius=settings.radius,
    )


def batch_rows(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Rows of one step, int64 [batch], from (seed, step) alone: a resumed run draws what an unbroken one would."""
    rows = np.random.default_rng((seed, step)).choice(count, size=batch, replace=batch > count)
    return torch.from_numpy(rows)


def learning_rate(settings: OptimiserSettings, step: int, steps: int) -> float:
    """Linear warm-up, then constant or a cosine down to a hundredth of the peak."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.decay == "cosine":
        progress = max(0.0, step - settings.warmup_steps) / max(steps - settings.warmup_steps, 1)
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
    return rate


@dataclass
class Run:
    """The run folder: ``state.pt`` holds everything that the next step depends on."""

    folder: Path
    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    metadata: AdaptorMetadata
    step: int = 0
    saved_step: int = field(default=0, init=False)

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.folder / "state.pt"

    def resume(self) -> None:
        """Load the checkpoint if there is one.

        Raises:
            HipaError: it is damaged, or belongs to another recipe or model.

        """
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            stored = AdaptorMetadata.model_validate_json(state["metadata"])
        except Exception as error:  # torch raises whatever unpickling met
            got = type(error).__name__
            raise HipaError(f"checkpoint {self.path} is damaged ({got}). Remove {self.folder}.") from None
        self._check_same_run(stored)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.saved_step = state["step"]

    def save(self) -> None:
        """Write beside, then rename: a run killed while saving keeps its last checkpoint."""
        state = {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "metadata": self.metadata.model_dump_json(),
        }
        scratch = self.path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, scratch)
            scratch.replace(self.path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise HipaError(
                f"checkpoint {self.path} cannot be written: {first_line(error)}. The one before it stays."
            ) from None
        self.saved_step = self.step

    def check_finite(self, loss: float, norm: float) -> None:
        """Raise HipaError if the loss or its gradient norm is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        kept = f"The checkpoint of step {self.saved_step} is kept." if self.saved_step else "No checkpoint exists yet."
        got = f"loss {loss:g}, gradient norm {norm:g} at step {self.step + 1}"
        raise HipaError(f"training diverged: {got}. {kept} Lower optimiser.learning_rate.")

    def save_samples(self, columns: list[Tensor]) -> None:
        """Columns of uint8 [N, H, W, 3] side by side as samples/step-00001000.png."""
        path = self.folder / "samples" / f"step-{self.step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid([column.numpy() for column in columns])).save(path)

    def writer(self) -> SummaryWriter:
        """TensorBoard scalars; what a killed run wrote past its checkpoint is hidden."""
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    def _check_same_run(self, stored: AdaptorMetadata) -> None:
        remedy = "Remove it, or choose another output folder."
        if stored.base_unet_sha256 != self.metadata.base_unet_sha256:
            raise HipaError(f"run folder {self.folder} belongs to another base model. {remedy}")
        if stored.prompts_sha256 != self.metadata.prompts_sha256:
            raise HipaError(f"run folder {self.folder} was started with other prompts. {remedy}")
        was, now = _flat(stored.recipe), _flat(self.metadata.recipe)
        for key in sorted(was.keys() | now.keys()):
            if key not in FREE_TO_CHANGE and was.get(key) != now.get(key):
                change = f"{key} was {was.get(key)}, is {now.get(key)}"
                raise HipaError(f"run folder {self.folder} has another recipe: {change}. {remedy}")


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that a step is never cut in half; the second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _metadata(recipe: Recipe, model: DiffusionModel, prompts: list[str]) -> AdaptorMetadata:
    settings = recipe.adaptor
    return AdaptorMetadata(
        base_unet_sha256=unet_sha256(model.folder),
        prompts_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        rank=settings.rank,
        alpha=settings.alpha or settings.rank,
        targets=PRESETS[settings.preset],
        timestep=recipe.timestep,
        prediction_type=model.prediction_type,
        alpha_bar=model.alpha_bar(recipe.timestep),
        resolution=model.resolution,
        steps_trained=recipe.steps,
        recipe=recipe.model_dump() | {"prompts": Path(recipe.prompts).name},
    )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
