"""``hipa-train``: train an adaptor, or a tiny decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hipa_deploy.commands.options import (
    ConfigOption,
    EmbeddingOption,
    LoraOption,
    ModelOption,
    VaeOption,
    chosen_adaptor,
    console,
)
from hipa_deploy.disk.files import refuse_to_overwrite
from hipa_deploy.errors import HipaError, memory_remedy
from hipa_deploy.extras import require

if TYPE_CHECKING:
    from hipa_deploy.engines.targets.target import TargetProfile
    from hipa_deploy.models.style import Style
    from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe


def train(
    out: Annotated[Path, typer.Option(help="Folder to write: the adaptor, or the decoder.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="Settings of the training: a TOML file, or an included recipe: emoji | "
            "emoji-sharpen | emoji-edit | emoji-inpaint | emoji-upscale | emoji-decoder | sd15 | "
            "sd21-base | sd21-v | sdxl | ssd-1b | vega."
        ),
    ] = "emoji",
    model: ModelOption = "emoji",
    config: ConfigOption = None,
    vae: VaeOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one prompt a line, or a table of captions (.csv, .parquet) to train "
            "on, in place of the recipe's prompts."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", help="Adaptor to start from: a folder, or 'emoji'. From scratch by default."
        ),
    ] = None,
    adaptor: Annotated[
        str | None,
        typer.Option(
            help="For a decoder recipe only: the adaptor with which the decoder will be used, "
            "a folder or 'emoji'."
        ),
    ] = None,
    lora: LoraOption = None,
    embedding: EmbeddingOption = None,
    average: Annotated[
        list[Path] | None,
        typer.Option(
            help="Train nothing, and write the average of this adaptor and the others. Give it two "
            "or more times."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Of an average: its rank. By default that of the adaptors."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps, in place of the recipe's number.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Prompts that are not trained on, as for --prompts: as often as the recipe says "
            "what is trained is measured on them, and the best step kept. By default the recipe's."
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Early stop: end after so many held-out measurements in a row without a better "
            "one. Never by default.",
        ),
    ] = None,
    log_with: Annotated[
        list[str] | None,
        typer.Option(
            help="Where losses, samples and measurements go: tensorboard, or another tracker of "
            "accelerate, such as wandb. May be given several times; tensorboard by default."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the settings and the predicted time and memory; train nothing."
        ),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="With --dry-run: how many GPUs train together; 1 by default."
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Let the recipe run code: a backbone or a loss of your own, module:function. The "
            "module is imported, so allow only what you trust.",
        ),
    ] = False,
) -> None:
    """Train a HiPA adaptor, with which a model makes an image in one step.

    A recipe for a decoder trains a small image decoder instead. A training that was stopped
    continues when the same command runs again, and one that is finished with more --steps. With
    --average, trained adaptors become one.
    """
    require("train")
    if average:
        training = (prompts, start, adaptor, lora, embedding, steps, config, vae, gpus)
        watching = (held_out, patience, log_with)
        named = recipe != "emoji" or model != "emoji" or dry_run or allow_code
        if named or any(other is not None for other in (*training, *watching)):
            raise HipaError(
                "--average trains nothing, so it goes with --out and --rank alone. Leave the "
                "other options out."
            )
        _average(average, out, rank)
        return
    if rank is not None:
        raise HipaError(
            "--rank is for --average; the rank of a training is adaptor.rank of its recipe. "
            "Leave it out."
        )
    from hipa_deploy.generate.prompt_files import check_prompt_file
    from hipa_deploy.models.locate import check_model_name, model_folder
    from hipa_deploy.models.lora.early_lora import check_before_model
    from hipa_deploy.models.style import parse_style
    from hipa_deploy.train.loop.output import check_new_or_finished, check_output
    from hipa_deploy.train.recipes.recipe import Recipe, load_any_recipe
    from hipa_deploy.train.training_request import check_dry_run, check_trackers
    from hipa_deploy.user_code import check_allowed, code_allowed

    check_model_name(model)
    if gpus is not None and not dry_run:
        raise HipaError(
            "--gpus is for --dry-run. To train on several GPUs, start the command with "
            "'accelerate launch' (docs/how-to/several-gpus.md)."
        )

    # Only what was given on the command line replaces a value of the recipe.
    overrides: dict[str, Any] = {}
    if steps is not None:
        overrides["steps"] = steps
    if prompts is not None:
        check_prompt_file(prompts)
        overrides["prompts"] = str(prompts.absolute())
    if held_out is not None:
        check_prompt_file(held_out)
        overrides["held_out.prompts"] = str(held_out.absolute())
    if patience is not None:
        overrides["held_out.patience"] = patience
    check_trackers(log_with or ())
    chosen = load_any_recipe(recipe, overrides)
    initial = chosen_adaptor(start, "--from")
    active = chosen_adaptor(adaptor)
    style = parse_style(lora, embedding)
    check_before_model(model, style, initial, active)
    # What is missing is named before an output that is there. A finished training may be extended.
    if not dry_run:
        check_new_or_finished(out)

    # What can be known without torch is checked before it is imported.
    if isinstance(chosen, Recipe) and active:
        raise HipaError(
            f"--adaptor is for a decoder, but recipe {recipe} trains an adaptor. "
            "Leave it out, or use --from to start from an adaptor."
        )
    if not isinstance(chosen, Recipe) and (initial or dry_run):
        option = "--from" if initial else "--dry-run"
        raise HipaError(
            f"{option} is for an adaptor, but recipe {recipe} trains a decoder. Leave it out."
        )
    with code_allowed(allow_code):
        check_allowed("backbone", chosen.loss.backbone)
        check_allowed("loss", chosen.loss.custom or "")
        if isinstance(chosen, Recipe) and chosen.alignment.is_code:
            check_allowed("scorer", chosen.alignment.scorer or "")
        folder = model_folder(model, config, vae)
        if dry_run:
            assert isinstance(chosen, Recipe)  # a decoder's was refused above
            check_dry_run(chosen, folder, initial, style)
            _dry_run_training(chosen, folder, initial, style, gpus or 1)
        else:
            check_output(out, chosen)
            _train(chosen, folder, out, initial or active, style, log_with or ["tensorboard"])


def _average(folders: list[Path], out: Path, rank: int | None) -> None:
    """Write the average of adaptors, and print where it is and what its rank left out."""
    from hipa_deploy.embedded import resolve_adaptor
    from hipa_deploy.train.average_request import check_average

    found = [resolve_adaptor(str(folder)) for folder in folders]
    check_average(found)
    refuse_to_overwrite(out)

    from hipa_deploy.train.average_adaptors import average_adaptors

    made = average_adaptors(found, out, rank)
    console.print(
        f"average of {len(folders)} adaptors, rank {made.rank}: {made.error:.1%} of its norm is "
        "left out",
        highlight=False,
    )
    typer.echo(made.folder)


def _train(
    chosen: Recipe | DecoderRecipe,
    folder: Path,
    out: Path,
    start: Path | None,
    style: Style,
    log_with: list[str],
) -> None:
    """Train what the recipe is for, and print where it is.

    Args:
        chosen: the recipe, of an adaptor or of a decoder.
        folder: the base model.
        out: the folder to write.
        start: the adaptor to start from, or the one that a decoder will be used with.
        style: LoRAs and embeddings that are added to the base model.
        log_with: names of trackers.

    """
    from hipa_deploy.train.training_request import check_request

    check_request(chosen, folder, start, style)

    from hipa_deploy.train.loop.processes import is_main, leaving_process_group
    from hipa_deploy.train.recipes.recipe import Recipe
    from hipa_deploy.train.train_adaptor import train_adaptor
    from hipa_deploy.train.train_decoder import train_decoder

    remedy = "Lower micro_batch in the recipe, which a run that goes on may change."
    if isinstance(chosen, Recipe):
        remedy = (
            "Lower micro_batch or set gradient_checkpointing = true in the recipe, both of which a "
            "run that goes on may change, or lower teacher.batch if it was making teacher pairs. "
            "hipa-train --dry-run says what fits where."
        )
    with leaving_process_group(), memory_remedy(remedy):
        if isinstance(chosen, Recipe):
            path = train_adaptor(
                chosen,
                folder,
                out,
                initial_adaptor=start,
                style=style,
                log_with=log_with,
                console=console,
            )
        else:
            path = train_decoder(
                chosen,
                folder,
                out,
                adaptor=start,
                style=style,
                log_with=log_with,
                console=console,
            )

    # Several processes may train together; the path is printed once.
    if is_main():
        typer.echo(path)


def _dry_run_training(
    recipe: Recipe, model_dir: Path, start: Path | None, style: Style, processes: int
) -> None:
    """Print the resolved recipe and the predicted cost on every GPU that hipa-deploy knows.

    Raises:
        HipaError: the training could not start, for example because its prompts cannot be read, a
            LoRA does not fit the model, or the adaptor to start from was trained with others.

    """
    from hipa_deploy.train.prediction.dry_run import dry_run

    # Merged LoRAs cost a training nothing, so the prediction is that of the base model.
    if style:
        from hipa_deploy.models.lora.open_style import OpenStyle
        from hipa_deploy.models.model_config import ModelConfig

        OpenStyle.read(style, ModelConfig.read(model_dir))
    if start is not None:
        from hipa_deploy.train.model.unet_adaptor import check_start, start_note

        check_start(recipe, start, model_dir, style)
        note = start_note(recipe, start)
        if note:
            typer.echo(note)

    with console.status("predicting"):
        lines, problem = dry_run(recipe, model_dir, training_gpus(), processes)

    # The problem comes last: the user sees the recipe that has it.
    Console().print(*lines, sep="\n", markup=False, highlight=False)
    if problem:
        raise problem


def training_gpus() -> list[TargetProfile]:
    """The GPUs for which a training is predicted.

    Devices whose memory is shared with the CPU (Jetson) are for running, not for training.
    """
    from hipa_deploy.engines.targets.target import load_target_profile, target_names

    found = []
    for name in target_names():
        profile = load_target_profile(name)
        if profile.memory_shared:
            continue
        if name == "a100":
            # The smaller A100 computes as fast. No engine depends on its memory, so that it is no
            # target of its own.
            changes = {"title": "A100 40 GB SXM", "memory_gib": 40}
            found.append(profile.model_copy(update=changes))
        found.append(profile)
    return found
