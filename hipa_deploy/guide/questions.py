"""The questions of ``hipa init``."""

from __future__ import annotations

from dataclasses import dataclass, field

from hipa_deploy.errors import HipaError, brief

JETSONS = ("orin-nano", "orin-nx", "agx-orin", "thor")


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        name: Of the answer, and of the option that gives it.
        text: What is asked.
        default: The answer of an empty line.
        choices: The possible answers and what each means; empty where any text is an answer.
        hint: What is expected where any text is an answer.

    """

    name: str
    text: str
    default: str
    choices: dict[str, str] = field(default_factory=dict)
    hint: str = ""

    @property
    def option(self) -> str:
        """The option that gives the answer."""
        return f"--{self.name}"

    @property
    def expected(self) -> str:
        """What an answer is, in words."""
        return f"one of: {', '.join(self.choices)}" if self.choices else self.hint

    def check(self, value: str) -> str:
        """The answer without spaces around it.

        Raises:
            HipaError: It is empty, or none of the choices.

        """
        answer = value.strip()
        if not answer or (self.choices and answer not in self.choices):
            raise HipaError(f"{self.option} {brief(answer)}. Expected {self.expected}.")
        return answer


QUESTIONS = (
    Question(
        "device",
        "Where will images be made?",
        "cpu",
        {
            "cpu": "any computer, without a GPU",
            "geforce": "a GeForce or professional RTX GPU of the series 30, 40 or 50",
            "datacenter": "another NVIDIA GPU, such as A100, H100, L4 or T4",
            "orin-nano": "Jetson Orin Nano 8 GB",
            "orin-nx": "Jetson Orin NX",
            "agx-orin": "Jetson AGX Orin",
            "thor": "Jetson Thor",
        },
    ),
    Question(
        "model",
        "Which model? A diffusers folder, a .safetensors or .ckpt file, a Hugging Face hub id, or "
        "emoji, the small one that is included.",
        "emoji",
        hint="a path, a hub id, or emoji",
    ),
    Question(
        "adaptor",
        "Which adaptor makes it a one-step model? The folder of a HiPA adaptor, the file of a "
        "one-step LoRA such as Hyper-SD's or LCM's, emoji for the included one, or none to train "
        "one.",
        "none",
        hint="a path, emoji, or none",
    ),
    Question(
        "task",
        "What will images be made from?",
        "generate",
        {
            "generate": "a prompt",
            "edit": "an image and a prompt",
            "inpaint": "an image, a mask and a prompt",
            "upscale": "a small image",
            "control": "edges, depth or a pose for a ControlNet, and a prompt",
        },
    ),
    Question(
        "prefer",
        "What matters most?",
        "quality",
        {
            "quality": "the model's own image decoder",
            "speed": "a tiny decoder: three quarters of the arithmetic go at SD 1.5's size",
            "memory": "a tiny decoder, and a closed set of prompts in place of the text encoder",
        },
    ),
)
