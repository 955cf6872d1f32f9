"""Copies of engine modules that a type checker can hold against a surface.

The engines import TensorRT by a name chosen at run time, so to mypy it is a ``ModuleType`` and its
objects are ``Any``. The copy imports a surface as ``trt`` instead, and declares the classes of the
parameters and variables that hold TensorRT's objects, by their names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# What a name holds in every engine module, unless OTHERWISE says otherwise of one module.
CLASSES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "empty": "ITimingCache",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "loaded": "ICudaEngine",
    "logger": "ILogger",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "refitter": "Refitter",
    "runtime": "Runtime",
}
OTHERWISE = {
    "worker": {"engine": "IHostMemory"},
    # The engine is serialised, still to be loaded; a layer is one in JSON.
    "precision_check": {"engine": "IHostMemory", "layer": None},
    # The logger is of recording_logger's own class, here and below.
    "refit": {"logger": None},
    "tensorrt_runner": {"logger": None},
    "engine_stage": {"logger": None, "config": "IRuntimeConfig"},
}


def touches_tensorrt(path: Path) -> bool:
    """Whether a module uses TensorRT or takes one of its objects, by the names in the engines."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return any(_is_module(node) or _is_object(node) for node in nodes)


def typed_copy(path: Path, surface: str) -> str:
    """The text of ``path`` against the stub module ``surface``."""
    classes = {**CLASSES, **OTHERWISE.get(path.stem, {})}
    known = {name: kind for name, kind in classes.items() if kind is not None}
    tree = _Typed(known).visit(ast.parse(path.read_text()))
    modules = [getattr(node, "module", "") for node in tree.body]
    after_future = modules.index("__future__") + 1
    tree.body.insert(after_future, ast.parse(f"import {surface} as trt").body[0])
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _is_module(node: ast.AST) -> bool:
    """``trt`` or ``self._trt``."""
    return (isinstance(node, ast.Name) and node.id == "trt") or (
        isinstance(node, ast.Attribute) and node.attr == "_trt"
    )


def _is_object(node: ast.AST) -> bool:
    """A parameter of type Any with a name of CLASSES."""
    return (
        isinstance(node, ast.arg)
        and node.arg in CLASSES
        and ast.unparse(node.annotation or ast.Name("")) == "Any"
    )


class _Typed(ast.NodeTransformer):
    def __init__(self, classes: dict[str, str]) -> None:
        self.classes = classes
        self.bases: dict[str, ast.expr] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        # A parameter is declared where it stands (visit_arg), a variable at the function's top.
        parameters = set()
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                parameters.add(argument.arg)
        variables = set(_stored(node)).intersection(self.classes) - parameters
        self.generic_visit(node)
        node.body[:0] = [self._declared(name, name) for name in sorted(variables)]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.bases = [self.bases.get(ast.unparse(base), base) for base in node.bases]
        held = {f"_{name}": name for name in self.classes}
        stored = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and _is_store(part):
                stored.add(part.attr)
        self.generic_visit(node)
        node.body += [self._declared(name, held[name]) for name in sorted(stored & set(held))]
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        if node.arg == "trt":
            return ast.arg("module_at_run_time", ast.Name("object"))
        annotation = "" if node.annotation is None else ast.unparse(node.annotation)
        if annotation == "Any" and node.arg in self.classes:
            node.annotation = ast.parse(f"trt.{self.classes[node.arg]}", mode="eval").body
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | list[ast.stmt]:
        if node.value is not None and ast.unparse(node.target) == "base":  # base: Any = trt.ILogger
            node.value = self.visit(node.value)
            self.bases["base"] = node.value
            return ast.Pass()
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id == "base" and "base" in self.bases:
            return self.bases["base"]
        if node.id == "trt" and _is_store(node):
            return ast.Name("module_at_run_time", node.ctx)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if _is_module(node) and not _is_store(node):
            return ast.Name("trt", ast.Load())
        return self.generic_visit(node)

    def _declared(self, name: str, held: str) -> ast.stmt:
        return ast.parse(f"{name}: trt.{self.classes[held]}").body[0]


# What has variables of its own.
_SCOPES = (
    ast.FunctionDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


def _is_store(node: ast.Name | ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store)


def _stored(function: ast.FunctionDef) -> Iterator[str]:
    """Variables that a function sets, without those of comprehensions and inner functions."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Name) and _is_store(node):
            yield node.id
        if not isinstance(node, _SCOPES):
            pending += ast.iter_child_nodes(node)
