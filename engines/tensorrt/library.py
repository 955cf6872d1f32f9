"""TensorRT and TensorRT-RTX behind one name.

Both modules have the same API for all that this package calls (TensorRT 10.3 to 11.4, TensorRT-RTX 1.4 to 1.7, held
by tests/contracts). What differs stays here: the module's name and packages, and the compute capabilities that
TensorRT-RTX compiles for ahead of time.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

from hipa_deploy.engines.device.jetson import l4t_release
from hipa_deploy.errors import HipaError, MissingDependencyError

TensorRTLibrary = Literal["tensorrt", "rtx"]
TENSORRT_LIBRARIES: tuple[TensorRTLibrary, ...] = get_args(TensorRTLibrary)

_MODULES: dict[TensorRTLibrary, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_PACKAGES: dict[TensorRTLibrary, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}


def as_tensorrt_library(name: str) -> TensorRTLibrary:
    """``name`` as a TensorRT library.

    Raises:
        HipaError: it is not one.

    """
    for library in TENSORRT_LIBRARIES:
        if name == library:
            return library
    raise HipaError(
        f"backend {name!r} has no engines. Expected one of: {', '.join(TENSORRT_LIBRARIES)}."
    )


def load_tensorrt(library: TensorRTLibrary) -> ModuleType:
    """Import the TensorRT module of ``library``.

    Raises:
        MissingDependencyError: the package is not installed.
        HipaError: it is installed and does not load, or is too old for strongly typed networks.

    """
    name, package = _MODULES[library], _PACKAGES[library]
    try:
        trt = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise missing(package, library) from None
        raise HipaError(
            f"{package} is installed but incomplete ({error}). {_reinstall(package)}"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise HipaError(
            f"{package} is installed but does not load ({error}). {_reinstall(package)}"
        ) from None
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        raise HipaError(
            f"{package} {trt.__version__} is too old: no strongly typed networks. Expected 10.3 or newer."
        )
    return trt


def missing(package: str, library: TensorRTLibrary) -> HipaError:
    """The error for a package that ``library`` needs, with the command for this machine.

    On Jetson the extra 'tensorrt' would be wrong: TensorRT is JetPack's own, and cuda-python has to be of its CUDA.
    """
    jetpack = _jetpack() if library == "tensorrt" else None
    if jetpack is None:
        return MissingDependencyError(package, library)
    if package != "tensorrt":
        return MissingDependencyError(package, f"jetson{jetpack}")
    return HipaError(
        "tensorrt is not installed, or hidden from this environment; on Jetson it is JetPack's own. Run:"
        " sudo apt install python3-libnvinfer, and make the environment with: python3 -m venv --system-site-packages"
    )


def _reinstall(package: str) -> str:
    apt = package == "tensorrt" and _jetpack() is not None
    command = (
        "sudo apt install --reinstall python3-libnvinfer"
        if apt
        else f"pip install --force-reinstall {package}"
    )
    return f"Run: {command}"


def _jetpack() -> int | None:
    """JetPack's major version, 6 or 7, by the Jetson Linux release; None elsewhere."""
    release = l4t_release()
    return None if release is None else 6 if int(release.split(".")[0]) < 38 else 7


@cache
def recording_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that prints nothing and keeps the latest error in ``last``.

    One for the whole process: TensorRT keeps the first that it is given.
    """
    base: Any = trt.ILogger

    class Recorder(base):
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 wants it called by name
            self.last = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                self.last = message.strip().rstrip(".")

    return Recorder()


def compilable(trt: ModuleType) -> tuple[int, ...]:
    """Compute capabilities (86 for 8.6) that TensorRT-RTX compiles for without such a GPU; none for TensorRT."""
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM")))


def set_compute_capabilities(trt: ModuleType, config: Any, capabilities: tuple[int, ...]) -> None:
    """Tell a TensorRT-RTX ``IBuilderConfig`` which GPUs to compile for.

    Raises:
        HipaError: TensorRT-RTX refuses one.

    """
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(
            getattr(trt.ComputeCapability, f"SM{capability}"), index
        ):
            raise HipaError(
                f"TensorRT-RTX {trt.__version__} refuses SM{capability} among {list(capabilities)}."
            )
