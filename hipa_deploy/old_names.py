"""The module names of version 0.1.0, which are found in the rooms where their code is now.

Code that was written for 0.1.0 goes on working and is told where to import from. The names go away
with version 0.3.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROOT = "hipa_deploy"
# The old module, and the modules that have its names now, in the order in which they are asked.
MOVED: dict[str, tuple[str, ...]] = {
    "adaptor": ("models.adaptor_folder",),
    "bundle": ("bundle.manifest", "bundle.folder"),
    "cli": (
        "commands.options",
        "commands.make_images",
        "commands.app",
        "commands.demo",
        "commands.doctor",
        "commands.evaluate",
        "commands.generate",
        "commands.train",
    ),
    "cli_common": ("commands.options", "commands.make_images"),
    "cli_profile": ("commands.profile",),
    "cli_tasks": ("commands.from_image",),
    "compositing": ("images.compositing",),
    "decoder": ("models.decoder_folder",),
    "demo": ("demo.contact_sheet", "demo.training_demo", "demo.steps"),
    "demo_tasks": ("demo.task_demo",),
    "doctor": ("doctor.examine",),
    "engines.best": ("engines.build.best_of",),
    "engines.build": ("engines.build.build_bundle",),
    "engines.build_process": ("engines.build.worker_process",),
    "engines.build_worker": ("engines.build.worker",),
    "engines.compare": ("engines.latency.compare",),
    "engines.conditions": ("engines.latency.machine_state",),
    "engines.cuda": ("engines.tensorrt.cuda",),
    "engines.device": (
        "engines.backends.available",
        "engines.device.machine",
        "engines.device.jetson",
        "engines.tensorrt.gpu",
    ),
    "engines.device_array": ("engines.tensorrt.device_array",),
    "engines.diagnose": ("engines.store.diagnose",),
    "engines.engine": ("engines.store.engine_key", "engines.store.sidecar", "engines.store.select"),
    "engines.flavour": ("engines.tensorrt.library",),
    "engines.graph": ("engines.tensorrt.cuda_graph",),
    "engines.latency_page": ("engines.latency.html_page",),
    "engines.latency_table": ("engines.latency.table",),
    "engines.layers": ("engines.latency.layer_times",),
    "engines.memory": ("engines.tensorrt.buffers",),
    "engines.onnxruntime_runner": (
        "engines.backends.onnxruntime_runner",
        "engines.backends.bound_session",
    ),
    "engines.openvino_runner": ("engines.backends.openvino_runner",),
    "engines.options": ("engines.targets.build_options",),
    "engines.plan": ("engines.build.memory_plan",),
    "engines.precision": ("engines.build.precision_check",),
    "engines.profile": (
        "engines.latency.report",
        "engines.latency.measure",
        "engines.latency.stage_timer",
    ),
    "engines.progress": ("engines.build.build_progress",),
    "engines.record": ("record",),
    "engines.refit": ("engines.tensorrt.refit", "generate.swap_stage"),
    "engines.roofline": (
        "engines.latency.roofline",
        "engines.latency.with_roofline",
        "engines.latency.stage_timer",
    ),
    "engines.runtime": ("engines.tensorrt.tensorrt_runner", "engines.tensorrt.sequence_spec"),
    "engines.smi": ("engines.device.nvidia_smi",),
    "engines.stage": ("engines.tensorrt.engine_stage",),
    "engines.stage_timer": ("engines.latency.stage_timer",),
    "engines.svg": ("engines.latency.plots",),
    "engines.sysfs": ("engines.device.sysfs", "engines.device.machine"),
    "engines.target": ("engines.targets.target",),
    "example_source": ("images.example_source",),
    "export.axes": ("export.graph.axes",),
    "export.base_model": ("export.model_parts",),
    "export.bundle": ("export.references", "export.export_bundle"),
    "export.cost": ("export.graph.graph_cost",),
    "export.fold": ("export.graph.fold",),
    "export.job": ("export.writer",),
    "export.options": ("export.export_options",),
    "export.precision": ("export.graph.half_precision",),
    "export.stages": ("export.graph.modules",),
    "export.swap": ("export.export_swap",),
    "export.to_onnx": ("export.graph.to_onnx",),
    "export.upsample": ("export.graph.upsample",),
    "export.weight_map": ("export.graph.weight_map",),
    "files": ("disk.files",),
    "hashing": ("disk.hashing",),
    "image_input": ("images.read",),
    "images": ("images.png",),
    "model_kind": ("models.kind", "models.model_config"),
    "models": ("models.locate",),
    "one_step": ("generate.noise", "generate.x0"),
    "onnx_weights": ("bundle.onnx_weights",),
    "parity": ("bundle.parity",),
    "pipeline": ("generate.pipeline",),
    "prompts": ("generate.prompts", "generate.stages"),
    "runners": ("generate.runner", "generate.open_stages"),
    "sd_configs": ("models.configurations",),
    "selfcheck": ("doctor.self_check", "engines.latency.stage_timer", "bundle.reference"),
    "selftest": ("doctor.self_test", "doctor.self_test_report"),
    "single_file": ("models.single_file",),
    "source": ("images.source",),
    "swap": ("bundle.adaptor_swap",),
    "tiling": ("images.tiling",),
    "tokenizer": ("generate.tokenizer",),
    "train.adaptor": ("train.model.unet_adaptor",),
    "train.average": ("train.model.weight_average",),
    "train.backbones": ("train.losses.backbones",),
    "train.balance": ("train.losses.gradient_balance",),
    "train.base_model": ("train.model.diffusion_model", "models.model_config"),
    "train.decoder": ("train.train_decoder",),
    "train.discriminator": ("train.losses.discriminator",),
    "train.dry_run": ("train.prediction.dry_run",),
    "train.edge": ("train.losses.edge",),
    "train.encoder": ("train.model.encoder_adaptor",),
    "train.evaluate": ("train.evaluation.quality",),
    "train.examples": ("train.data.examples",),
    "train.figures": ("train.evaluation.figures",),
    "train.frequency": ("train.losses.frequency", "train.recipes.recipe"),
    "train.interrupt": ("interrupts",),
    "train.lite0": ("train.losses.lite0",),
    "train.loop": ("train.train_adaptor",),
    "train.loss": ("train.losses.hipa_loss",),
    "train.lpips": ("train.losses.lpips",),
    "train.masks": ("train.data.masks",),
    "train.one_step": ("train.model.one_step", "generate.x0"),
    "train.originals": ("train.data.source_images",),
    "train.pairs": ("train.data.teacher_pairs",),
    "train.perceptual": ("train.losses.dists",),
    "train.precision": ("train.model.mixed_precision",),
    "train.predict": (
        "train.prediction.training_cost",
        "train.prediction.simulated_training",
        "bundle.manifest",
    ),
    "train.processes": ("train.loop.processes",),
    "train.progress": ("train.loop.progress_bar",),
    "train.prompts": ("generate.prompt_files",),
    "train.recipe": ("train.recipes.recipe", "train.recipes.loss_settings"),
    "train.report": ("train.evaluation.quality_report",),
    "train.run": (
        "train.loop.run",
        "train.loop.optimizer",
        "train.loop.scalars",
        "train.loop.training_steps",
    ),
    "train.spectrum": ("train.evaluation.spectrum",),
    "train.task_evaluate": ("train.evaluation.task_images",),
}
# Names that are called something else now, by their old module.
RENAMED: dict[str, dict[str, str]] = {
    "engines.plan": {"Plan": "MemoryPlan", "plan_build": "plan_memory"},
    "export.base_model": {"BaseModel": "ModelParts"},
    "images": {"read_recipe": "read_parameters"},
    "train.average": {"Average": "WeightAverage"},
    "train.originals": {
        "Originals": "SourceImages",
        "folder_originals": "folder_source_images",
        "teacher_originals": "teacher_source_images",
    },
}


def install() -> None:
    """Let ``import`` find the old modules. It is asked last, so it costs an import nothing."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def old_names(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that was a module in 0.1.0.

    Args:
        package: its full name, such as 'hipa_deploy.images'.

    """

    def find(name: str) -> Any:
        return _find(package, name)

    return find


def _find(module: str, name: str) -> Any:
    """What 0.1.0 had as ``name`` in ``module``, with a warning that says where it is now.

    Raises:
        AttributeError: there is no such name any more.

    """
    old = module.removeprefix(f"{ROOT}.")
    new_name = RENAMED.get(old, {}).get(name, name)
    # Python itself asks modules for names such as __path__, which are none of ours.
    if not name.startswith("__"):
        for home in MOVED[old]:
            new_module = import_module(f"{ROOT}.{home}")
            if new_name in vars(new_module):
                warnings.warn(
                    f"{module}.{name} is {new_module.__name__}.{new_name} now; "
                    "the old name goes away with version 0.3.",
                    DeprecationWarning,
                    stacklevel=3,
                )
                return getattr(new_module, new_name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _OldModules(MetaPathFinder, Loader):
    """Finds the old modules, and makes each an empty one that looks its names up."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The old module of this name; None for every other name."""
        if fullname.removeprefix(f"{ROOT}.") not in MOVED or not fullname.startswith(ROOT):
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Give the empty module its look-up."""
        module.__doc__ = "A module of version 0.1.0. Its names have moved."
        module.__dict__["__getattr__"] = old_names(module.__name__)
