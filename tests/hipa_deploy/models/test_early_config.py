"""The defaults that are written down are the libraries', and no library is imported."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hipa_deploy.embedded import MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.models.clip_tokenizer import load_tokenizer, text_sizes
from hipa_deploy.models.early_config import SCHEDULER, TEXT, UNET, VAE, early_config
from hipa_deploy.models.model_config import ModelConfig


def library_defaults(kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def test_the_defaults_are_the_libraries() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig

    for written, kind in (
        (UNET, UNet2DConditionModel),
        (VAE, AutoencoderKL),
        (SCHEDULER, DDIMScheduler),
    ):
        defaults = library_defaults(kind)
        assert written == {key: defaults[key] for key in written}
    text = CLIPTextConfig().to_dict()
    assert {key: text[key] for key in TEXT} == TEXT


@pytest.mark.parametrize(
    "name",
    ["native_size", "vae_factor", "size_multiple", "text_width", "text_layers", "last_timestep"],
)
def test_it_says_what_the_whole_configuration_says(name: str) -> None:
    assert getattr(early_config(MODEL), name) == getattr(ModelConfig.read(MODEL), name)


def test_the_sizes_of_text_are_the_tokenizers() -> None:
    config = ModelConfig.read(MODEL)
    tokenizer = load_tokenizer(config)
    assert text_sizes(config) == (tokenizer.model_max_length, config.text_layers)
    assert text_sizes(early_config(MODEL)) == text_sizes(config)


def test_no_library_is_imported() -> None:
    code = (
        "import sys; from hipa_deploy.embedded import MODEL, ADAPTOR\n"
        "from hipa_deploy.models.early_config import early_config\n"
        "from hipa_deploy.models.lora.early_lora import check_adaptor\n"
        "early_config(MODEL); check_adaptor(ADAPTOR, MODEL)\n"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_prediction_type_of_another_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "scheduler/scheduler_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "prediction_type": "v-prediction"}))
    with pytest.raises(HipaError, match=r"predicts 'v-prediction'\. Expected one of: epsilon"):
        early_config(folder)
