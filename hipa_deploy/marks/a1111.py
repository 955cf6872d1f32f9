"""Generation parameters as the text of AUTOMATIC1111's web UI, which other programs read too.

The form is that of ``create_infotext`` and ``parse_generation_parameters`` in modules of
AUTOMATIC1111/stable-diffusion-webui (processing.py, infotext_utils.py). ComfyUI's front end and
stable-diffusion.cpp read and write the same:

    the prompt
    Negative prompt:
    Steps: 1, Sampler: HiPA one step, CFG scale: 1, Seed: 7, Size: 512x512, Version: hipa-deploy 0.1
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

KEYWORD = "parameters"
"""Of the PNG text chunk."""
NEGATIVE = "Negative prompt:"
SAMPLER = "HiPA one step"
# A1111's names of the samplers that refine. Its own space their timesteps in another way.
REFINERS = {"dpmsolver++": "DPM++ 2M", "ddim": "DDIM"}
# A name, a colon, and a value: in quotes, or up to the next comma. It finds what A1111's
# ``re_param`` finds. That one tries every letter of a word as the first of a name, which takes
# minutes for a stranger's 60 KB. What ends the word decides, so the first letter is enough here.
_FIELD = re.compile(r'(?<![\w \-/])[ \-/]*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LEAST_FIELDS = 3  # with fewer, A1111 takes the last line for a part of the prompt


def infotext(parameters: Mapping[str, Any]) -> str:
    """The parameters of an image as A1111's text; '' where they hold no prompt.

    Args:
        parameters: as ``GenerateResult.parameters`` has them.

    Example:
        >>> infotext({"prompt": "a cat", "seed": 7, "width": 64, "height": 64}).splitlines()[0]
        'a cat'

    """
    if "prompt" not in parameters:
        return ""
    fields: dict[str, Any] = {"Steps": 1, "Sampler": SAMPLER, "CFG scale": 1}
    unet = parameters.get("unet")
    # The base UNet made a refined image, in many steps.
    refine = parameters.get("refine")
    if isinstance(refine, Mapping):
        fields["Steps"] = refine.get("steps")
        fields["Sampler"] = REFINERS.get(str(refine.get("sampler")), refine.get("sampler"))
        fields["CFG scale"] = refine.get("guidance")
        unet = refine.get("unet")
    if "seed" in parameters:
        fields["Seed"] = parameters["seed"]
    if "width" in parameters and "height" in parameters:
        fields["Size"] = f"{parameters['width']}x{parameters['height']}"
    # A1111 names a model by the first ten digits of a SHA-256.
    if unet:
        fields["Model hash"] = str(unet)[:10]
    if parameters.get("bundle_name"):
        fields["Model"] = parameters["bundle_name"]
    if parameters.get("strength") is not None:
        fields["Denoising strength"] = parameters["strength"]
    fields["Version"] = parameters.get("producer", "hipa-deploy")
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items())
    # ComfyUI's reader looks for the line of the negative prompt, so it is there although it is
    # empty: one step has no guidance, and a refined image leads away from the empty prompt.
    return f"{parameters['prompt']}\n{NEGATIVE} \n{line}"


def _quoted(value: Any) -> str:
    """A value as A1111's ``quote`` writes it: as JSON where a comma or a colon would mislead."""
    text = str(value)
    if any(letter in text for letter in ",\n:"):
        return json.dumps(text, ensure_ascii=False)
    return text


def parse_infotext(text: str) -> dict[str, str]:
    """Read the text that A1111, ComfyUI, stable-diffusion.cpp or this package wrote.

    Returns:
        'Prompt', 'Negative prompt' and every field of the last line, as text. A text without
        fields is all prompt.

    Example:
        >>> parse_infotext("a cat\\nSteps: 20, Sampler: Euler a, Seed: 1")["Seed"]
        '1'

    """
    *lines, last = text.strip().split("\n")
    found = _FIELD.findall(last)
    if len(found) < _LEAST_FIELDS:
        lines.append(last)
        found = []
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        part = line.strip()
        if part.startswith(NEGATIVE):
            target = negative
            part = part[len(NEGATIVE) :].strip()
        target.append(part)
    values = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    for name, value in found:
        values[name] = _unquoted(value)
    return values


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value.strip()
