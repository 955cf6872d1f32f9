"""Write a bundle as a model repository of Triton."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.bundle.signature import signature_path
from hipa_deploy.disk.files import check_space, new_folder
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.triton.bundle_model import text_files
from hipa_deploy.triton.triton_config import Backend, stage_config, whole_config

VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_MODEL_PY = '''"""The model of a hipa-deploy bundle: pip install hipa-deploy where Triton runs."""

from hipa_deploy.triton.python_model import TritonPythonModel  # noqa: F401
'''


def check_repository_request(name: str, backend: str, instances: int) -> Backend:
    """Check what needs no bundle.

    Raises:
        HipaError: a name that Triton would not take, a backend that it does not have, or no
            instance.

    """
    if not _NAME.fullmatch(name):
        raise HipaError(
            f"--name {brief(name)} cannot be a model's. Expected letters, digits and . _ -."
        )
    if backend not in get_args(Backend):
        raise HipaError(
            f"--backend {brief(backend)} is none of Triton's. Expected one of: "
            f"{', '.join(get_args(Backend))}."
        )
    if not 1 <= instances <= 1000:
        raise HipaError(f"--instances is {instances}. Expected 1 to 1000.")
    found: Backend = backend  # type: ignore[assignment]
    return found


def write_repository(
    bundle: Bundle,
    out: Path,
    *,
    name: str,
    backend: Backend = "onnxruntime",
    instances: int = 1,
    joined: bool = True,
) -> list[str]:
    """Write ``out``: a model for each stage, and one from prompt to image.

    Engines are taken only if they were built for the GPU of this machine, by this version of
    TensorRT: an engine runs nowhere else.

    Args:
        bundle: the bundle.
        out: a folder that does not exist or is empty; it is written whole or not at all.
        name: of the model from prompt to image; those of the stages begin with it.
        backend: what runs the stages in Triton.
        instances: copies of every model that run at once.
        joined: whether Triton may join requests into batches.

    Returns:
        The names of the models.

    Raises:
        HipaError: a damaged bundle, no engine that fits this machine, or no space.

    Example:
        >>> write_repository(Bundle.open(Path("my-bundle")), Path("models"), name="my-bundle")
        ['my-bundle', 'my-bundle_text_encoder', 'my-bundle_unet', 'my-bundle_vae_decoder']

    """
    _check_marks(bundle)
    bundle.verify()
    files = _engine_files(bundle) if backend == "tensorrt" else _onnx_files(bundle)
    sizes = [path.stat().st_size for stage in files.values() for path in stage.values()]
    check_space(out, sum(sizes))
    models = [name]
    with new_folder(out) as folder:
        _write_whole(bundle, folder / name, name, instances)
        for stage, sources in files.items():
            model = f"{name}_{stage}"
            models.append(model)
            version = folder / model / VERSION
            version.mkdir(parents=True)
            for target, source in sources.items():
                (version / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, version / target)
            spec = bundle.stages[stage].spec
            config = stage_config(model, spec, backend, joined=joined, instances=instances)
            (folder / model / "config.pbtxt").write_text(config, encoding="utf-8")
    return models


def _check_marks(bundle: Bundle) -> None:
    """Refuse a bundle whose images must be signed: what leaves Triton is pixels, and no file."""
    if bundle.manifest.marks.c2pa:
        raise HipaError(
            f"the owner of {bundle.root} wants images with signed content credentials (C2PA), and "
            "Triton answers with pixels. Use hipa-serve --c2pa."
        )


def _write_whole(bundle: Bundle, folder: Path, name: str, instances: int) -> None:
    """The model from prompt to image: its code, and the bundle without stages."""
    inside = folder / VERSION / "bundle"
    inside.mkdir(parents=True)
    shutil.copyfile(bundle.root / MANIFEST, inside / MANIFEST)
    signature = signature_path(bundle.root / MANIFEST)
    if signature.is_file():
        shutil.copyfile(signature, inside / signature.name)
    for relative in text_files(bundle):
        target = inside / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path(relative), target)
    (folder / VERSION / "model.py").write_text(_MODEL_PY, encoding="utf-8")
    config = whole_config(name, bundle, instances=instances)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")


def _onnx_files(bundle: Bundle) -> dict[str, Mapping[str, Path]]:
    """Of each stage: its graph and the files of its weights, by their names in the version."""
    found: dict[str, Mapping[str, Path]] = {}
    for name, stage in bundle.stages.items():
        files = {"model.onnx": bundle.stage_path(name)}
        folder = stage.path.rpartition("/")[0]
        for relative in bundle.weight_files(name):
            files[relative[len(folder) + 1 :]] = bundle.path(relative)
        found[name] = files
    return found


def _engine_files(bundle: Bundle) -> dict[str, Mapping[str, Path]]:
    """Of each stage: the engine that fits this machine."""
    from hipa_deploy.engines.store.select import fitting_engines
    from hipa_deploy.engines.store.sidecar import engine_path

    sidecars = fitting_engines(bundle, bundle.stages, "tensorrt")
    return {stage: {"model.plan": engine_path(path)} for stage, path in sidecars.items()}
