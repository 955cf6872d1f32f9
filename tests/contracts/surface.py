"""A binding's *surface* as a Python stub: names, parameters and types of the classes in use.

It has whole classes rather than the names used today, without what a graph parsed from ONNX never
needs (``add_*``).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

CLASSES = (
    "Builder", "Dims", "EngineInspector", "IBuilderConfig", "ICudaEngine", "IExecutionContext",
    "IHostMemory", "ILayer", "ILogger", "INetworkDefinition", "IOptimizationProfile", "IProfiler",
    "IProgressMonitor", "IRuntimeConfig", "ISerializationConfig", "ITensor", "ITimingCache",
    "Logger", "OnnxParser", "OnnxParserRefitter", "ParserError", "Profiler", "Refitter", "Runtime",
    "Weights",
    "BuilderFlag", "ComputeCapability", "CudaGraphStrategy", "DataType", "DeviceType",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineCapability", "EngineInvalidityDiagnostics", "EngineStat", "EngineValidity",
    "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel", "LayerInformationFormat",
    "LayerType", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParserFlag",
    "PreviewFeature", "ProfilingVerbosity", "RuntimePlatform", "SerializationFlag", "TacticSource",
    "TempfileControlFlag", "TensorFormat", "TensorIOMode", "TensorLocation",
    "TilingOptimizationLevel", "WeightsRole",
)  # fmt: skip
FUNCTIONS = ("get_nv_onnx_parser_version", "init_libnvinfer_plugins", "nptype", "volume")
_UNUSED = re.compile(r"^(__(?!init__|getitem__|len__|iter__)|_pybind11)")

# What no docstring says: a buffer in C, and iteration by __getitem__.
PROTOCOLS = {
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
    "Dims": "def __iter__(self) -> Iterator[int]: ...",
}

# What pybind11 converts of an argument (py::implicitly_convertible in TensorRT's sources); no
# docstring says it.
IMPLICIT = {
    "Weights": "Union[Weights, numpy.ndarray[Any, Any]]",
    "Dims": "Union[Dims, Sequence[int]]",
}

CUDART = re.compile(
    r"cuda(Malloc|MallocHost|MallocAsync|Free|FreeHost|FreeAsync|Memcpy|MemcpyAsync|Memset|"
    r"MemsetAsync|MemGetInfo|"
    r"HostAlloc\w*|HostGetDevicePointer|HostRegister|HostUnregister|Stream\w+|Event\w+|"
    r"GetDevice\w*|SetDevice|"
    r"DeviceSynchronize|DeviceGetAttribute|DriverGetVersion|RuntimeGetVersion|GetError\w+|"
    r"GetLastError|PeekAtLastError|"
    r"Graph(Instantiate\w*|Launch|Upload|Destroy|ExecDestroy|ExecUpdate)|"
    r"MemcpyKind|DeviceProp|DeviceAttr)"
)

HEADER = (
    "from typing import Any, Callable, ClassVar, Dict, Iterator, List, Optional, Sequence, Set, "
    "Tuple, Union, overload\n\nimport numpy\n\n"
)
ENUM = '''\
class Enum:
    """What pybind11 gives every enumeration."""

    name: str
    value: int
    __members__: ClassVar[Dict[str, Any]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
'''
_TYPES = {
    "Any", "Callable", "ClassVar", "Dict", "Iterator", "List", "Optional", "Sequence", "Set",
    "Tuple", "Union", "bool", "bytes", "dict", "float", "int", "list", "object", "set", "str",
    "tuple", "None",
}  # fmt: skip


def tensorrt_surface(trt: ModuleType) -> str:
    """The stub of a TensorRT or TensorRT-RTX module, without its provenance."""
    present = [name for name in sorted(CLASSES) if hasattr(trt, name)]
    known = set(present)
    for name in present:
        known.update(f"{name}.{inner}" for inner in _nested(getattr(trt, name)))

    parts = [HEADER + "__version__: str", ENUM.rstrip()]
    for name in present:
        parts.append("\n".join(_class(name, getattr(trt, name), known)))

    # The module's constants (trt.float16), except the one that would hide Python's own bool.
    last = []
    for name, value in sorted(vars(trt).items()):
        kind = type(value)
        if _is_enum(kind) and name != "bool" and kind.__name__ in known:
            last.append(f"{name}: {kind.__name__}")
    for name in FUNCTIONS:
        if hasattr(trt, name):
            last.append(f"def {name}{_function(name, getattr(trt, name), known)}: ...")
    return "\n\n".join([*parts, "\n".join(last)]) + "\n"


def cudart_surface(cudart: ModuleType) -> str:
    """The stub of cuda-python's CUDA runtime, without its provenance."""
    lines = []
    for name, value in sorted(vars(cudart).items()):
        if not CUDART.fullmatch(name):
            continue
        if isinstance(value, type):
            public = [part for part in dir(value) if part[0] != "_"]
            names = getattr(value, "__members__", None) or public
            lines.append(f"class {name}:")
            lines += [f"    {part}: Any" for part in sorted(names)]
            lines.append("")
        elif callable(value):
            lines.append(f"def {name}{_untyped(value)}: ...")
        else:
            lines.append(f"{name}: int")
    return "from typing import Any\n\n" + "\n".join(lines) + "\n"


def unused(kind: str, member: str) -> bool:
    """Whether a member stays out of the surface: an operator, or a hand-made network's layer."""
    return bool(_UNUSED.match(member)) or (
        kind == "INetworkDefinition" and member.startswith("add_")
    )


def _is_enum(kind: type) -> bool:
    return hasattr(kind, "__members__")


def _nested(kind: type) -> list[str]:
    return [
        name for name, value in vars(kind).items() if isinstance(value, type) and _is_enum(value)
    ]


def _class(name: str, kind: type, known: set[str], indent: str = "") -> Iterator[str]:
    if _is_enum(kind):
        yield f"{indent}class {name}(Enum):"
        members: dict[str, Any] = kind.__members__  # type: ignore[attr-defined]
        for member in sorted(members):
            yield f"{indent}    {member}: ClassVar[{kind.__qualname__}]"
        return
    bases = [base.__name__ for base in kind.__bases__ if base.__name__ in known]
    inherited = f"({', '.join(bases)})" if bases else ""
    yield f"{indent}class {name}{inherited}:"
    body: list[str] = []
    for member in sorted(vars(kind)):
        body += _member(kind, member, known)
    if name in PROTOCOLS:
        body.append(f"    {PROTOCOLS[name]}")
    yield from body or ["    ..."]


def _member(kind: type, name: str, known: set[str]) -> Iterator[str]:
    value = vars(kind)[name]
    if unused(kind.__name__, name):
        return
    if isinstance(value, type):
        yield from _class(name, value, known, "    ") if _is_enum(value) else ()
    elif isinstance(value, property):
        yield from _property(name, value, known)
    elif callable(value) or isinstance(value, staticmethod):
        yield from _method(name, value, isinstance(value, staticmethod), known)
    elif _is_enum(type(value)):
        yield f"    {name}: ClassVar[{type(value).__qualname__}]"


def _property(name: str, value: property, known: set[str]) -> Iterator[str]:
    got = _returned(value.fget, known)
    if value.fset is None:
        yield "    @property"
        yield f"    def {name}(self) -> {got}: ..."
    else:
        yield f"    {name}: {_setter_type(value.fset, known) if got == 'Any' else got}"


def _method(name: str, value: Any, static: bool, known: set[str]) -> Iterator[str]:
    found = signatures(value.__func__ if static else value, name)
    if name == "__init__" and not found:  # made by TensorRT alone
        return
    if not found:
        yield f"    def {name}(self, *args: Any, **kwargs: Any) -> Any: ..."
    for signature in found:
        if len(found) > 1:
            yield "    @overload"
        if static:
            yield "    @staticmethod"
        yield f"    def {name}{_typed(signature, known)}: ..."


def signatures(function: Any, name: str) -> list[ast.FunctionDef]:
    """The signatures that pybind11 writes first in a docstring, one for each overload.

    Empty where it wrote none.
    """
    lines = (function.__doc__ or "").strip().splitlines()
    pattern = re.compile(rf"^(?:\d+\. )?{re.escape(name)}(\(.*)$")
    overloaded = len(lines) > 1 and lines[1] == "Overloaded function."
    found = []
    for line in lines[2:] if overloaded else lines[:1]:
        match = pattern.match(line.strip())
        if match:
            found.append(_parse(name, match[1]))
    return found


def _parse(name: str, text: str) -> ast.FunctionDef:
    text = _python(re.sub(r"=\s*<[^>]*>", "= ...", text))  # a default's repr
    (function,) = ast.parse(f"def {name}{text}: ...").body
    assert isinstance(function, ast.FunctionDef)
    return function


def _python(text: str) -> str:
    """Python's names for C++ ones: nvinfer1::BuilderFlag is BuilderFlag.

    pybind11 writes the C++ name for a class that it bound later.
    """
    return re.sub(r"\b\w+::(?:\w+::)*(\w+)", r"\1", text)


def _typed(function: ast.FunctionDef, known: set[str]) -> str:
    """The parameters with types that the surface knows, and Any for the others."""
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        if argument.arg == "self":
            argument.annotation = None
        else:
            argument.annotation = parameter_type(argument.annotation, known)
    function.args.defaults = [ast.Constant(...)] * len(function.args.defaults)
    return f"({ast.unparse(function.args)}) -> {ast.unparse(known_type(function.returns, known))}"


def known_type(annotation: ast.expr | None, known: set[str]) -> ast.expr:
    """The annotation without module names, or Any if it has a class outside the surface."""
    if annotation is None:
        return ast.Name("Any")
    # tensorrt_bindings.tensorrt.Dims is Dims.
    text = re.sub(r"(?:\b[a-z_]+\.)+(?=[A-Z])", "", ast.unparse(annotation))
    text = re.sub(r"SupportsInt( \| SupportsIndex)?", "int", text).replace("SupportsFloat", "float")
    names = set(re.findall(r"[A-Za-z_][\w.]*", text))
    return ast.parse(text if names and names <= known | _TYPES else "Any", mode="eval").body


def parameter_type(annotation: ast.expr | None, known: set[str]) -> ast.expr:
    """The same for what a parameter takes."""
    found = known_type(annotation, known)
    return ast.parse(IMPLICIT.get(ast.unparse(found), ast.unparse(found)), mode="eval").body


def _returned(getter: Any, known: set[str]) -> str:
    match = re.search(r"\) -> (.+)", getter.__doc__ or "")
    if match is None:
        return "Any"
    annotation = ast.parse(_python(match[1]), mode="eval").body
    return ast.unparse(known_type(annotation, known))


def _setter_type(setter: Any, known: set[str]) -> str:
    text = (setter.__doc__ or "").strip().split("\n")[0]
    if not text.startswith("("):
        return "Any"
    parameters = _parse("setter", text).args.args
    return ast.unparse(known_type(parameters[-1].annotation, known))


def _function(name: str, function: Any, known: set[str]) -> str:
    """A function of the module: pybind11's, or one of ``__init__.py``."""
    found = signatures(function, name)
    return _typed(found[0], known) if found else _untyped(function)


def _untyped(function: Any) -> str:
    """The parameters of a Python or Cython function by name."""
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is parameter.empty
        parameters.append(name if required else f"{name}=...")
    return f"({', '.join(parameters)})"
