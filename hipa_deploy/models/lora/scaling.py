"""How strong each layer's change is: alpha, rank, and peft's configuration of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.models.lora.names import PARTS, LayerKey
from hipa_deploy.patterns import Patterns

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("LORA", "LOHA", "LOKR")
MAX_NUMBER = 1e9
PATTERNS = "rank_pattern or alpha_pattern"
# With these, peft subtracts from the base model what the LoRA starts with. The LoRA alone is then
# no difference to the model as it was published.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftSettings:
    """The values of peft's LoraConfig, LoHaConfig or LoKrConfig that a file comes with.

    Attributes:
        values: by name; of a file that diffusers wrote, with the part before the name, 'unet.r'.
        patterns: matches those of the values, within a limit of time.

    """

    values: Mapping[str, Any]
    patterns: Patterns = field(default_factory=lambda: Patterns(PATTERNS), compare=False)

    @classmethod
    def of(cls, file: Path, values: Mapping[str, Any]) -> PeftSettings:
        """The settings of a file, which may have none.

        Raises:
            HipaError: another kind of adapter than a LoRA, or one that changes the base model too.

        """
        for name, value in values.items():
            plain = name.rpartition(".")[2]
            kind = str(getattr(value, "value", value)).rpartition(".")[2]
            if plain == "peft_type" and kind.upper() not in KINDS:
                raise HipaError(
                    f"{file} is a {shown(str(value))} adapter of peft. "
                    f"Expected one of: {', '.join(KINDS)}."
                )
            if plain == "init_lora_weights" and str(value).lower().startswith(CHANGES_BASE):
                raise HipaError(
                    f"{file} was made with init_lora_weights={shown(str(value))}, which changes "
                    "the base model too. Convert it to a plain LoRA: save_pretrained(…, "
                    "path_initial_model_for_weight_conversion=…) of peft."
                )
        return cls(values)

    def scaling(
        self, key: LayerKey, kind: str, rank: int | None, stored_alpha: Tensor | None
    ) -> float:
        """What a layer's dW is multiplied by.

        The layer's own ``.alpha`` comes first, then peft's configuration with its patterns, then
        rank itself, which is the convention of a file that says nothing (diffusers and kohya
        alike).

        Args:
            key: the layer.
            kind: one of ``kinds.KINDS``.
            rank: as ``kinds.rank_of`` gives it.
            stored_alpha: the file's tensor for this layer.

        Raises:
            HipaError: an alpha that is not one number; patterns that are no regular expressions,
                or take longer than anybody waits.

        """
        settings = self._of_part(key.part)
        if rank is None and kind == "lokr" and "r" in settings:
            # peft divides by the rank that was asked for, also where both factors stayed whole.
            rank = self._patterned(settings.get("rank_pattern"), key.module, settings["r"])
            rank = int(_number("r", rank))
        if rank is None:  # a difference, or LyCORIS' LoKr with both factors whole: full strength
            return 1.0
        if stored_alpha is not None:
            if stored_alpha.numel() != 1:
                raise HipaError(
                    f"layer {key} has an alpha of shape {list(stored_alpha.shape)}. "
                    "Expected one number."
                )
            return float(stored_alpha) / rank

        # LoraConfig calls it lora_alpha, LoHaConfig and LoKrConfig alpha.
        usual = settings.get("lora_alpha", settings.get("alpha"))
        alpha = self._patterned(settings.get("alpha_pattern"), key.module, usual)
        if alpha is None:
            return 1.0
        if settings.get("use_rslora"):
            return _number("alpha", alpha) / float(rank) ** 0.5
        return _number("alpha", alpha) / rank

    def _of_part(self, part: str) -> dict[str, Any]:
        """A part's settings: diffusers writes 'unet.r', peft plain 'r'."""
        own = {}
        plain = {}
        for name, value in self.values.items():
            if name.startswith(f"{part}."):
                own[name.removeprefix(f"{part}.")] = value
            elif not name.startswith(_OTHER_PARTS):
                plain[name] = value
        return own or plain

    def _patterned(self, patterns: Any, module: str, default: Any) -> Any:
        """peft's rule: a pattern is a regular expression that the end of a module's name matches.

        Some expressions take exponential time, so all of a file have a limit together.
        """
        if not isinstance(patterns, Mapping):
            return default
        for pattern, value in patterns.items():
            if self.patterns.search(rf"^(.*\.)?({pattern})$", module):
                return value
        return default


_OTHER_PARTS = tuple({f"{part}." for part in PARTS.values() if part is not None})


def _number(name: str, value: Any) -> float:
    """A setting that must be a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -MAX_NUMBER < value < MAX_NUMBER or math.isnan(value):
        raise HipaError(f"its configuration has {name}={brief(value)}. Expected a number.")
    return float(value)
