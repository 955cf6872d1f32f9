"""From the answers of ``hipa init`` to commands."""

from __future__ import annotations

from dataclasses import dataclass

from hipa_deploy.guide.questions import JETSONS

EMOJI = "emoji"
NONE = "none"
BUNDLE = "my-bundle"
TRAINED = "my-adaptor"
CAPTIONS = "captions.txt"
CONTROLNET = "my-controlnet"

# A command is a list of words, or a line for the shell that is no command of ours.
Command = list[str] | str

_BACKENDS = {"cpu": "auto", "geforce": "rtx"}  # all others: tensorrt
_EXTRAS = {"cpu": "openvino", "geforce": "rtx", "datacenter": "tensorrt"}
_PROMPTS = {EMOJI: "3d emoji of a red apple"}


@dataclass(frozen=True)
class Answers:
    """What was answered; the names are those of the questions."""

    device: str
    model: str
    adaptor: str
    task: str
    prefer: str

    @property
    def on_jetson(self) -> bool:
        """Whether images are made on another computer than the one that exports."""
        return self.device in JETSONS

    @property
    def backend(self) -> str:
        """What runs the models."""
        return _BACKENDS.get(self.device, "tensorrt")

    @property
    def trained_task(self) -> str:
        """What the adaptor is trained for: a ControlNet guides one that generates."""
        return "generate" if self.task == "control" else self.task

    @property
    def prompt(self) -> str:
        """A prompt that the model knows."""
        return _PROMPTS.get(self.model, "a lighthouse at night")


@dataclass(frozen=True)
class Step:
    """Some commands, and what they are for."""

    title: str
    commands: tuple[Command, ...]


def route(answers: Answers) -> list[Step]:
    """The commands from a model to images on a device, in order.

    Example:
        >>> steps = route(Answers("cpu", "emoji", "emoji", "generate", "quality"))
        >>> steps[-1].commands[0]
        ['hipa-profile', 'my-bundle', '--backend', 'auto', '--runs', '100', '--seconds', '10']

    """
    steps = [_install_for_export(answers)]
    if answers.adaptor == NONE:
        steps.append(_training(answers))
    steps.append(_export(answers))
    if answers.on_jetson:
        steps.append(_copy_to_jetson())
    if answers.device != "cpu":
        steps.append(_build(answers))
    steps.append(_check(answers))
    steps.append(_images(answers))
    steps.append(_measure(answers))
    return steps


def _install_for_export(answers: Answers) -> Step:
    # On a Jetson nothing is exported: torch and diffusers stay on the PC.
    extras = ["train", "export"]
    if not answers.on_jetson:
        extras.append(_EXTRAS[answers.device])
    where = "On a PC, in" if answers.on_jetson else "In"
    title = f"{where} a copy of the repository: install what trains and exports"
    return Step(title, (f"pip install -c constraints.txt '.[{','.join(extras)}]'",))


def _training(answers: Answers) -> Step:
    command = ["hipa-train", "--model", answers.model, "--out", TRAINED]
    if answers.model == EMOJI:
        task = answers.trained_task
        suffix = "" if task == "generate" else f"-{task}"
        title = "Train an adaptor; this takes hours on a CPU"
        return Step(title, ([*command, "--recipe", f"emoji{suffix}"],))
    if answers.trained_task != "generate":
        title = (
            f"Train an adaptor for {answers.task}: copy train/recipes/emoji-{answers.task}.toml "
            "and sd15.toml into a recipe of your own first (docs/how-to/from-an-image.md)"
        )
        recipe = "my-recipe.toml"
    else:
        title = (
            f"Write captions to {CAPTIONS}, one a line; see what the training takes, then train. "
            "For SD 2.1 the recipe is sd21-base or sd21-v; for SDXL, SSD-1B and Segmind-Vega it is "
            "sdxl, ssd-1b or vega"
        )
        recipe = "sd15"
    command += ["--recipe", recipe, "--prompts", CAPTIONS]
    return Step(title, ([*command, "--dry-run"], command))


def _export(answers: Answers) -> Step:
    adaptor = TRAINED if answers.adaptor == NONE else answers.adaptor
    if adaptor == EMOJI and answers.trained_task != "generate":
        adaptor = f"{EMOJI}-{answers.task}"
    command = ["hipa-export", "--model", answers.model, "--adaptor", adaptor]
    command += ["--task", answers.task, "--out", BUNDLE]
    if answers.task == "control":
        command += ["--controlnet", CONTROLNET]

    if answers.on_jetson:
        command += ["--for", answers.device]
    else:
        # FP16 arithmetic is slower than FP32's on most CPUs.
        command += ["--dtype", "fp32" if answers.device == "cpu" else "fp16"]
    title = "Merge the adaptor and export a bundle"
    if answers.prefer != "quality":
        command += ["--decoder", "tiny"]
    elif answers.on_jetson:
        # For the smallest device --for would take the tiny one.
        command += ["--decoder", "full"]
    if answers.prefer == "memory":
        command += ["--prompts", "prompts.txt"]
        title += "; prompts.txt has every prompt that the device will ever draw, one a line"
    if answers.task == "control":
        title += f"; {CONTROLNET} is a ControlNet of the model's family (docs/how-to/controlnet.md)"
    if adaptor.endswith(".safetensors"):
        title += ". For a LoRA of others add --one-step METHOD (hipa export --help)"
    return Step(title, (command,))


def _copy_to_jetson() -> Step:
    title = (
        "Copy the bundle to the Jetson. From here on all commands run there, in the environment "
        "that docs/tutorials/jetson.md makes"
    )
    return Step(title, (f"rsync -a {BUNDLE} jetson:",))


def _build(answers: Answers) -> Step:
    build = ["hipa-build", BUNDLE]
    build += ["--for", answers.device] if answers.on_jetson else ["--backend", answers.backend]
    title = "See what the build takes, then compile engines for this GPU"
    return Step(title, ([*build, "--dry-run"], build))


def _check(answers: Answers) -> Step:
    check = ["hipa-doctor", BUNDLE]
    if answers.device != "cpu":
        check += ["--backend", answers.backend]
    return Step("Compare each stage with the result that the export stored", (check,))


def _images(answers: Answers) -> Step:
    verb = [f"hipa-{answers.task}", BUNDLE]
    inputs = {
        "generate": [answers.prompt],
        "edit": ["photo.png", answers.prompt],
        "inpaint": ["photo.png", "mask.png", answers.prompt],
        "upscale": ["small.png"],
        "control": ["edges.png", answers.prompt],
    }
    command = [*verb, *inputs[answers.task], "--backend", answers.backend, "--out", "image.png"]
    return Step("The first image", (command,))


def _measure(answers: Answers) -> Step:
    # From so many runs and seconds on a figure is valid.
    enough = ["--runs", "100", "--seconds", "10"]
    command = ["hipa-profile", BUNDLE, "--backend", answers.backend, *enough]
    return Step("Measure how long an image takes", (command,))
