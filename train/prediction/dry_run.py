"""``hipa-train --dry-run``: the resolved recipe, and what the training would take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import RenderableType
from rich.table import Table

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.models.clip_tokenizer import text_sizes
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.train.losses.gradient_balance import WHOLE_BATCHES, divides_batch
from hipa_deploy.train.model.mixed_precision import precision_note
from hipa_deploy.train.prediction.simulated_training import CPU
from hipa_deploy.train.prediction.training_cost import (
    TrainingCost,
    TrainingPrediction,
    call_counts,
    edits_made,
    folder_size,
    images_made,
    measure_steps,
    predict_training,
    step_counts,
)
from hipa_deploy.train.recipes.recipe import MixedPrecision, Recipe, read_prompts

# Shares of an A100's FP16 peak that InstaFlow's published rates come to (arXiv 2309.06380: 200,000
# pairs a day at 25 guided steps; 86,000 steps a day at batch 4 with LPIPS), with the operations
# counted as in training_cost.py.
PAIRS_UTILISATION = 0.30
STEPS_UTILISATION = 0.10
USABLE_MEMORY = 0.9  # of a GPU's: CUDA itself and fragmentation take the remaining tenth
# More guided images of one prompt than this teach the adaptor that prompt, and little else (ours).
MOST_PAIRS_A_PROMPT = 100
# Stable Diffusion's schedule leaves 0.0047 at its last timestep, and SDXL's the same.
LEAST_SIGNAL = 1e-4
SMALL_FLOPS = 0.5e12  # of a teacher call and two steps: seconds on a CPU, so they are measured
GIB = 2**30
ENOUGH_SEEN = 0.8  # of the teacher's pairs: what a step draws is left to chance
GB = 1e9
HOUR = 3600


class Gpu(Protocol):
    """The facts of a GPU that a prediction needs; the profiles of engines/targets have them."""

    @property
    def title(self) -> str:
        """Its name."""

    @property
    def memory_gib(self) -> int | None:
        """Its memory in GiB; None where it is not known."""

    @property
    def fp16_tflops(self) -> float | None:
        """Its FP16 peak rate in TFLOP/s; None where it is not known."""

    @property
    def fp16_accumulate(self) -> str | None:
        """The type in which that rate accumulates: where it is 'fp16', FP32 is half as fast."""

    @property
    def tf32_tflops(self) -> float | None:
        """Its TF32 peak rate in TFLOP/s, of float32 matrix products on tensor cores."""


def dry_run(
    recipe: Recipe, model_dir: Path, gpus: Sequence[Gpu], processes: int = 1
) -> tuple[list[RenderableType], HipaError | None]:
    """What ``--dry-run`` prints.

    Args:
        recipe: The resolved recipe.
        model_dir: Diffusers folder; its weights are not needed.
        gpus: The GPUs to predict hours for.
        processes: How many of a GPU train together.

    Returns:
        The recipe, the tables and the warnings, in order; and the error of the prompts, if they
        cannot be read. It is returned rather than raised, so that the tables are printed before it.

    Raises:
        HipaError: A model that cannot be trained, with the reason.

    """
    if recipe.text != TextSettings():
        recipe.text.check(*text_sizes(ModelConfig.read(model_dir)))
    if divides_batch(recipe.loss.balance, recipe.micro_batch, processes):
        raise HipaError(WHOLE_BATCHES)
    prediction = predict_training(recipe, model_dir, processes)

    # Prompts do not change the prediction, so a file that is missing does not stop it.
    problem = None
    count = None
    prompts = "unreadable"
    try:
        count = len(read_prompts(recipe, model_dir))
        prompts = f"{count:,} distinct"
    except HipaError as error:
        problem = error

    shown: list[RenderableType] = [
        to_toml(recipe),
        facts_table(prediction, model_dir, prompts),
        cost_table(prediction),
    ]

    # A small model runs here in seconds: a measurement says more than a share of a peak rate.
    teacher_call = prediction.pairs.flops / recipe.teacher.steps
    measured_flops = teacher_call + prediction.warm_up.flops + prediction.step.flops
    measured_flops += prediction.fake.flops if prediction.fake else 0
    if measured_flops <= SMALL_FLOPS:
        shown.append(measured_table(prediction, measure_steps(recipe, model_dir)))
        decoder = recipe.vae_precision or recipe.mixed_precision
        precisions = (recipe.teacher.mixed_precision, recipe.mixed_precision, decoder)
        slow = precision_note(precisions, CPU)
        if slow:
            shown.append(slow)
    else:
        shown.append(gpu_table(prediction, gpus))
    for warning in doubts(prediction, count):
        shown.append(f"warning: {warning}")
    return shown, problem


def to_toml(recipe: Recipe) -> str:
    """Every setting as the text of a recipe file, defaults included.

    Settings without a value (None) are left out, as TOML has no null.
    """
    values = recipe.model_dump()
    lines = _toml_lines(values)
    for name, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *_toml_lines(table)]
    return "\n".join(lines) + "\n"


def _toml_lines(table: Mapping[str, Any]) -> list[str]:
    """``key = value`` of a table's own settings."""
    lines = []
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            lines.append(f"{key} = {_toml_value(value)}")
    return lines


def _toml_value(value: Any) -> str:
    """A value as JSON writes it, but for what TOML reads in another way.

    JSON escapes a character beyond U+FFFF as two surrogates, which TOML refuses: it stays as it is.
    JSON leaves U+007F as it is, which TOML refuses too.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def facts_table(prediction: TrainingPrediction, model_dir: Path, prompts: str) -> Table:
    """The model, the adaptor, the prompts and the pairs: facts, no predictions.

    Args:
        prediction: The training's facts.
        model_dir: Diffusers folder; its name is shown.
        prompts: How many prompts there are, in words.

    """
    adaptor = prediction.recipe.adaptor
    height, width = prediction.resolution
    sizes = [f"{name} {count / 1e6:.1f} M" for name, count in prediction.parameters.items()]
    encoder = f", encoder rank {adaptor.encoder_rank}" if adaptor.encoder_rank else ""
    shape = f"{adaptor.preset}, rank {adaptor.rank}{encoder}"

    table = Table(show_header=False)
    predicts = f"predicts {prediction.prediction_type}, {width}x{height} pixels"
    if prediction.square:
        predicts += f", of which a step decodes squares of {prediction.square}"
    table.add_row("model", f"{model_dir.name}: {predicts}")
    table.add_row("parameters", ", ".join(sizes))
    table.add_row("trainable", f"{prediction.trainable / 1e6:.2f} M ({shape})")
    table.add_row("prompts", prompts)
    table.add_row("teacher pairs", _made_by_teacher(prediction))
    return table


def _made_by_teacher(prediction: TrainingPrediction) -> str:
    """What the teacher makes, in words, and the disk that it takes."""
    recipe = prediction.recipe
    images = images_made(recipe)
    edits = edits_made(recipe)
    parts = []
    if images:
        parts.append(f"{images:,}")
    if edits:
        parts.append(f"{edits:,} edits{_of_folder(recipe)}")
    if recipe.held_out.prompts:
        parts.append(f"{recipe.held_out.count:,} of held-out prompts")
    if not parts:
        return "none: the images are those of source.images"
    size = prediction.pairs_bytes / GB
    # A small training's would be 0.00 GB.
    digits = 2 if size >= 0.01 else 4
    return f"{', '.join(parts)}: {size:.{digits}f} GB in the cache"


def _of_folder(recipe: Recipe) -> str:
    """How many images of a folder the edits start from, in words; nothing without a folder."""
    if not recipe.image_folder:
        return ""
    images = folder_size(recipe.image_folder)
    if images is None:
        return f", where the folder has {recipe.teacher.pairs:,} images"
    return f" of the folder's {images:,} images"


def doubts(prediction: TrainingPrediction, prompt_count: int | None) -> list[str]:
    """What can be trained and can hardly be meant, a sentence or two each.

    Args:
        prediction: The training.
        prompt_count: How many distinct prompts there are; None where they cannot be read.

    """
    recipe = prediction.recipe
    found = []
    # Of a folder's images teacher.pairs makes none.
    made = 0 if recipe.source_folder else recipe.teacher.pairs
    if prompt_count is not None and made > MOST_PAIRS_A_PROMPT * prompt_count:
        found.append(
            f"{recipe.teacher.pairs:,} pairs of {prompt_count:,} prompts show each prompt "
            f"{recipe.teacher.pairs / prompt_count:,.0f} times. The adaptor learns these prompts "
            "and little beyond them: expected more prompts, or fewer pairs."
        )

    # Enlarged images have no more detail for the distance to see, and cost more.
    size = recipe.loss.perceptual_size
    smallest = prediction.square or min(prediction.resolution)
    if size is not None and size > smallest:
        found.append(
            f"perceptual_size = {size} is larger than the images of {smallest} pixels: they would "
            f"be enlarged for the perceptual distance. Expected at most {smallest}."
        )

    # The step's x0 is (x_T - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar).
    if prediction.prediction_type == "epsilon" and prediction.alpha_bar < LEAST_SIGNAL:
        found.append(
            f"alpha_bar is {prediction.alpha_bar:.2g} at timestep {recipe.timestep}, and the model "
            "predicts epsilon: hardly any signal is left to compute x0 from. Expected at least "
            f"{LEAST_SIGNAL:g}: choose an earlier timestep."
        )
    own = {"loss": recipe.loss.custom}
    if recipe.alignment.is_code:
        own["scorer"] = recipe.alignment.scorer
    for what, name in own.items():
        if name:
            found.append(
                f"the cost of the {what} {name} is not known, and not counted: expected somewhat "
                "more time and memory than is said below."
            )
    found += _made_for_nothing(recipe)
    return found


def _made_for_nothing(recipe: Recipe) -> list[str]:
    """A sentence where the steps see much fewer images or edits than the teacher makes."""
    made = edits_made(recipe) or images_made(recipe)
    what = "edits" if recipe.task == "edit" else "pairs"
    if recipe.pictures_folder:
        made += images_made(recipe)
        what = "pairs and edits"
    # How many edits there are of a folder's images is known when it is there.
    if not made or (recipe.image_folder and folder_size(recipe.image_folder) is None):
        return []
    seen = expected_rows(made, recipe.batch, recipe.steps)
    if seen >= ENOUGH_SEEN * made:
        return []
    return [
        f"{recipe.steps:,} steps of {recipe.batch} draw about {seen:,} of the {made:,} {what}. The "
        "others are made for nothing, unless an earlier training has left them in the cache."
    ]


def expected_rows(count: int, batch: int, steps: int) -> int:
    """How many of ``count`` rows are drawn at least once, on average.

    A step draws its rows without repetition, and each step anew (``batch_rows``).

    Example:
        >>> expected_rows(count=8192, batch=16, steps=500)
        5110

    """
    missed = (1 - min(batch, count) / count) ** steps
    return round(count * (1 - missed))


def cost_table(prediction: TrainingPrediction) -> Table:
    """Operations of all processes, memory of one of them, and how often each work is done."""
    recipe = prediction.recipe
    warm_up, decoded = step_counts(recipe)
    precisions = f"pairs {_name(recipe.teacher.mixed_precision)}, "
    precisions += f"steps {_name(recipe.mixed_precision)}"
    table = Table("", title=f"Predicted; memory with the weights included; {precisions}")
    for heading in ("rows", "at once", "TFLOP", "memory, GiB", "how often"):
        table.add_column(heading, justify="right")

    def add(name: str, rows: int, at_once: int, cost: TrainingCost, times: int) -> None:
        tflop = f"{cost.flops / 1e12:.3g}"
        memory = f"{cost.peak_bytes / GIB:.2f}"
        table.add_row(name, str(rows), str(at_once), tflop, memory, f"{times:,}")

    batches = math.ceil(prediction.sampler_batches)
    micro_batch = prediction.micro_batch
    pair_rows = recipe.teacher.batch
    add("teacher pairs", pair_rows, pair_rows, prediction.pairs, batches)
    add("step, latents alone", recipe.batch, micro_batch, prediction.warm_up, warm_up)
    add(_step_title(recipe), recipe.batch, micro_batch, prediction.step, decoded)
    if prediction.fake:
        add("fake score's steps", recipe.batch, micro_batch, prediction.fake, decoded)
    if prediction.target:
        add("its teacher images", recipe.batch, micro_batch, prediction.target, decoded)
    if prediction.held_out:
        count = recipe.held_out.count
        at_once = recipe.held_out_rows
        add("held-out measure", count, at_once, prediction.held_out, recipe.measurements)
    return table


def _step_title(recipe: Recipe) -> str:
    """What an optimiser step after the warm-up does."""
    decodes = recipe.loss.has_image_terms or recipe.alignment.weight
    title = "step, decoded" if decodes else "step"
    if recipe.score.weight:
        title += ", score"
    if recipe.latent_discriminator.weight:
        title += ", latent discriminator"
    if recipe.alignment.weight:
        title += ", alignment"
    return title


def _name(precision: MixedPrecision) -> str:
    """The name of a precision as one says it."""
    return "float32" if precision == "no" else precision


def gpu_table(prediction: TrainingPrediction, gpus: Sequence[Gpu]) -> Table:
    """What fits on named GPUs, and hours at a stated share of their peak rate.

    GPUs whose memory or rate is not known are left out. Several GPUs are taken to share the work
    evenly: an adaptor's gradients are a small message.
    """
    shares = f"{PAIRS_UTILISATION:.0%} (pairs) and {STEPS_UTILISATION:.0%} (steps)"
    processes = prediction.processes
    count = "one GPU" if processes == 1 else f"{processes} GPUs"
    title = f"Predicted hours on {count}, at {shares} of the peak rate of the recipe's precision"
    table = Table("", title=title)
    for heading in ("memory, GiB", "fits", "largest micro-batch", "pairs", "steps"):
        table.add_column(heading, justify="right")
    for gpu in gpus:
        if gpu.memory_gib is None or gpu.fp16_tflops is None:
            continue
        usable = USABLE_MEMORY * gpu.memory_gib * GIB
        fits = "yes" if prediction.peak_bytes <= usable else "no"
        largest = str(prediction.memory.largest(usable, prediction.rows))
        pairs, steps = hours(prediction, gpu)
        memory = str(gpu.memory_gib)
        table.add_row(gpu.title, memory, fits, largest, _hours_text(pairs), _hours_text(steps))
    return table


def hours(prediction: TrainingPrediction, gpu: Gpu) -> tuple[float | None, float | None]:
    """Predicted hours of the teacher pairs, and of the steps; None where no rate is known."""
    recipe = prediction.recipe
    rates = (
        _peak_rate(gpu, recipe.teacher.mixed_precision),
        _peak_rate(gpu, recipe.mixed_precision),
    )
    operations = (
        prediction.pairs_flops / PAIRS_UTILISATION,
        prediction.training_flops / STEPS_UTILISATION,
    )
    taken = []
    for rate, count in zip(rates, operations, strict=True):
        taken.append(None if rate is None else count / rate / HOUR / prediction.processes)
    return taken[0], taken[1]


def _peak_rate(gpu: Gpu, precision: MixedPrecision) -> float | None:
    """Operations a second at the peak, in the arithmetic of a training in this precision.

    float32 means TF32, which a training turns on (train/model/mixed_precision.py).
    """
    if precision == "no":
        return None if gpu.tf32_tflops is None else gpu.tf32_tflops * 1e12
    if gpu.fp16_tflops is None:
        return None

    # Training accumulates in FP32, which is half as fast where the rate is FP16's. bfloat16 is as
    # fast as FP16 on every GPU that has it.
    return gpu.fp16_tflops * 1e12 / (2 if gpu.fp16_accumulate == "fp16" else 1)


def _hours_text(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:.3g}"


def measured_table(prediction: TrainingPrediction, seconds: Mapping[str, float]) -> Table:
    """The result of ``measure_steps``, and the whole training at that pace.

    Args:
        prediction: The training.
        seconds: As ``measure_steps`` returns them.

    """
    table = Table("", title="Measured on this machine's CPU, random weights")
    for heading in ("seconds", "how often", "minutes in all"):
        table.add_column(heading, justify="right")
    for name, count in call_counts(prediction.recipe).items():
        minutes = seconds[name] * count / 60
        table.add_row(name, f"{seconds[name]:.3f}", f"{count:,.0f}", f"{minutes:.1f}")
    return table
