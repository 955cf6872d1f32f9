"""The two TensorRT libraries, TensorRT and TensorRT-RTX, behind one name.

Both modules have the same API for all that this package calls (TensorRT 10.3 to 11.4, TensorRT-RTX
1.4 to 1.7, held by tests/contracts). What differs stays here: the module's name and packages, and
the compute capabilities that TensorRT-RTX compiles for ahead of time.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

from hipa_deploy.engines.device.jetson import l4t_release
from hipa_deploy.errors import HipaError, MissingDependencyError

TensorRTLibrary = Literal["tensorrt", "rtx"]
"""A TensorRT library, by the name of its backend: 'tensorrt', or 'rtx' for TensorRT-RTX."""

TENSORRT_LIBRARIES: tuple[TensorRTLibrary, ...] = get_args(TensorRTLibrary)

_MODULES: dict[TensorRTLibrary, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_PACKAGES: dict[TensorRTLibrary, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}

_FIRST_OF_JETPACK_7 = 38  # the major version of its Jetson Linux release; JetPack 6 has 36


def as_tensorrt_library(name: str) -> TensorRTLibrary:
    """The TensorRT library of a backend.

    Raises:
        HipaError: the backend ``name`` runs no engines.

    """
    for library in TENSORRT_LIBRARIES:
        if name == library:
            return library
    raise HipaError(
        f"backend {name!r} has no engines. Expected one of: {', '.join(TENSORRT_LIBRARIES)}."
    )


def load_tensorrt(library: TensorRTLibrary) -> ModuleType:
    """Import the module of a TensorRT library.

    Raises:
        MissingDependencyError: the package is not installed.
        HipaError: the package is installed and does not load, or is too old for strongly typed
            networks.

    """
    name = _MODULES[library]
    package = _PACKAGES[library]
    try:
        trt = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise missing(package, library) from None
        # The module is there, and one that it imports is not.
        raise HipaError(
            f"{package} is installed but incomplete ({error}). {_reinstall(package)}"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise HipaError(
            f"{package} is installed but does not load ({error}). {_reinstall(package)}"
        ) from None

    # The graph says the precision of every layer, and only a strongly typed network obeys it.
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        raise HipaError(
            f"{package} {trt.__version__} is too old: no strongly typed networks. "
            "Expected 10.3 or newer."
        )
    return trt


def missing(package: str, library: TensorRTLibrary) -> HipaError:
    """The error for a package that ``library`` needs, with the command for this machine.

    On Jetson the extra 'tensorrt' would be wrong: TensorRT comes with JetPack, and cuda-python has
    to fit JetPack's CUDA.
    """
    jetpack = _jetpack() if library == "tensorrt" else None
    if jetpack is None:
        return MissingDependencyError(package, library)
    if package != "tensorrt":
        return MissingDependencyError(package, f"jetson{jetpack}")
    return HipaError(
        "tensorrt is not installed, or hidden from this environment; "
        "on Jetson it is JetPack's own. Run: sudo apt install python3-libnvinfer, "
        "and make the environment with: python3 -m venv --system-site-packages"
    )


def _reinstall(package: str) -> str:
    """The command that repairs a broken package: apt on Jetson, where TensorRT is the system's."""
    if package == "tensorrt" and _jetpack() is not None:
        return "Run: sudo apt install --reinstall python3-libnvinfer"
    return f"Run: pip install --force-reinstall {package}"


def _jetpack() -> int | None:
    """JetPack's major version, 6 or 7, by the Jetson Linux release; None elsewhere."""
    release = l4t_release()
    if release is None:
        return None
    major = int(release.split(".")[0])
    return 6 if major < _FIRST_OF_JETPACK_7 else 7


@cache
def recording_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that prints nothing and keeps the latest error in ``last``.

    There is one for the whole process: TensorRT keeps the first logger that it receives.
    """
    base: Any = trt.ILogger

    class Recorder(base):
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 requires the base's constructor by name
            self.last = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                self.last = message.strip().rstrip(".")

    return Recorder()


def compilable(trt: ModuleType) -> tuple[int, ...]:
    """Compute capabilities (86 for 8.6) that TensorRT-RTX compiles for without such a GPU.

    TensorRT has none: it builds on the device itself.
    """
    # TensorRT has no such enumeration. RTX's also has members that name no GPU: NONE, CURRENT.
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return tuple(sorted(int(name[2:]) for name in names if name.startswith("SM")))


def set_compute_capabilities(trt: ModuleType, config: Any, capabilities: tuple[int, ...]) -> None:
    """Set the GPUs that a TensorRT-RTX ``IBuilderConfig`` compiles for.

    Args:
        trt: the module of TensorRT-RTX.
        config: the IBuilderConfig.
        capabilities: compute capabilities times ten, 86 for 8.6.

    Raises:
        HipaError: TensorRT-RTX refuses one of them.

    """
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        member = getattr(trt.ComputeCapability, f"SM{capability}")
        if not config.set_compute_capability(member, index):
            raise HipaError(
                f"TensorRT-RTX {trt.__version__} refuses SM{capability} among {list(capabilities)}."
            )
