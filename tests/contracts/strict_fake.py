"""A fake TensorRT made from a surface: it has the surface's names and parameters, and nothing else.

It is for code of other libraries, which our type checks do not see. It computes nothing: a call
whose arguments fit returns an object of the class that the surface names, True, an empty text or 0.
A name that the surface lacks is an AttributeError, as with the real module.
"""

from __future__ import annotations

import ast
import enum
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

PLAIN = {"bool": True, "int": 0, "float": 0.0, "str": "", "None": None, "tuple": (), "list": []}

# A network of one layer, with one input whose batch size its profile decides.
NETWORK = {
    "num_inputs": 1,
    "num_layers": 1,
    "num_outputs": 1,
    "name": "x",
    "shape": (-1, 4, 8, 8),
    "is_shape_tensor": False,
}
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


def fake_module(surface: Path, name: str) -> ModuleType:
    """A module of ``name`` with what ``surface`` has."""
    module: Any = ModuleType(name)
    module.__version__ = surface.stem.split("-", 1)[1]
    module.bool = None
    tree = ast.parse(surface.read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            setattr(module, node.name, _class(node, module))
        elif isinstance(node, ast.FunctionDef):
            setattr(module, node.name, lambda *_: np.float32)  # nptype, volume

    # Constants of the module, such as trt.float16, are members of DataType.
    types = {TYPES.get(member.name, member.name.lower()): member for member in module.DataType}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "DataType":
            constant = ast.unparse(node.target)
            setattr(module, constant, types[constant])
    module.bool = types["bool"]
    return module


def _class(node: ast.ClassDef, module: Any) -> type:
    bases = [ast.unparse(base) for base in node.bases]
    names = [ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)]
    if bases == ["Enum"]:
        return enum.IntEnum(node.name, {name: number for number, name in enumerate(names)})
    members: dict[str, Any] = {"__init__": lambda self, *_, **__: None}
    for part in node.body:
        if isinstance(part, ast.ClassDef):
            members[part.name] = _class(part, module)
    for part in node.body:
        if isinstance(part, ast.AnnAssign):
            members[ast.unparse(part.target)] = _attribute(part, members, module)
        elif isinstance(part, ast.FunctionDef) and part.name not in (
            "__init__",
            "__buffer__",
            "__getitem__",
        ):
            overloads = [other for other in node.body if getattr(other, "name", "") == part.name]
            members[part.name] = _method(overloads, module)
        elif getattr(part, "name", "") == "__getitem__":
            members["__getitem__"] = _item(part.returns, module)
    if node.name == "IHostMemory":
        # A real buffer: what is built is written to a file.
        content = {"__new__": lambda kind: bytes.__new__(kind, b"built"), "nbytes": 5}
        return type(node.name, (bytes,), content)
    return type(node.name, tuple(getattr(module, base) for base in bases) or (Strict,), members)


class Strict:
    """Takes no attribute that its class lacks, as pybind11's objects do.

    An object of a class derived in Python takes any.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        kind = type(self)
        if kind.__module__ == __name__ and not hasattr(kind, name):
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


def _attribute(node: ast.AnnAssign, members: dict[str, Any], module: Any) -> Any:
    """A member of the class's own enumeration, or an attribute that can be set."""
    kind = ast.unparse(node.annotation)
    name = ast.unparse(node.target)
    if kind != "ClassVar[ILogger.Severity]":
        return NETWORK.get(name, PLAIN.get(kind))
    # Inside ILogger the enumeration is a member; Logger has it from ILogger.
    logger = getattr(module, "ILogger", None)
    return members.get("Severity", getattr(logger, "Severity", None))[name]


def _method(overloads: list[Any], module: Any) -> Any:
    """A property, or a function that takes what one of the overloads takes."""
    decorators = {ast.unparse(decorator) for decorator in overloads[0].decorator_list}
    if "property" in decorators:
        name = overloads[0].name
        returns = overloads[0].returns
        return property(lambda self: NETWORK[name] if name in NETWORK else _value(returns, module))
    accepted = [(_signature(node), node.returns) for node in overloads]

    def method(*arguments: Any, **named: Any) -> Any:
        for signature, returns in accepted:
            try:
                signature.bind(*arguments, **named)
            except TypeError:
                continue
            return _value(returns, module)
        raise TypeError(
            f"{overloads[0].name} takes {' or '.join(str(signature) for signature, _ in accepted)}"
        )

    return staticmethod(method) if "staticmethod" in decorators else method


def _item(returns: ast.expr | None, module: Any) -> Any:
    """Of a sequence of one."""

    def item(self: Any, index: int) -> Any:
        if index:
            raise IndexError(index)
        return _value(returns, module)

    return item


def _signature(node: ast.FunctionDef) -> inspect.Signature:
    names: dict[str, Any] = {}
    bare = ast.parse(f"def {node.name}({ast.unparse(node.args)}): ...").body[0]
    for argument in ast.walk(bare):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    exec(compile(ast.Module([bare], []), "<surface>", "exec"), names)
    return inspect.signature(names[node.name])


def _value(annotation: ast.expr | None, module: Any) -> Any:
    kind = ast.unparse(annotation) if annotation is not None else "None"
    if kind in PLAIN:
        return PLAIN[kind]
    found: Callable[[], Any] | None = getattr(module, kind, None)
    if isinstance(found, type):
        return next(iter(found)) if issubclass(found, enum.Enum) else found()
    return []
