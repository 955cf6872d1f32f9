"""Make ``surfaces/*.pyi``: what each version of TensorRT, TensorRT-RTX and cuda-python offers.

    pip download --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 \\
        --python-version 3.11 --dest wheels tensorrt-cu13-bindings==11.4.0.106
    python tests/contracts/make_surfaces.py wheels/*.whl

A wheel must be of the running Python's version (the pinned ones are cp311). TensorRT's libraries
take gigabytes, and the bindings need nine functions of them. An empty library with these, made by
the C compiler, lets the real bindings be imported, so that classes, enumerations and signatures are
read from the very objects that a user gets. Nothing can be built or run that way. The stubs of
``tensorrt-stubs`` are cut down to the same classes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import surface

SURFACES = Path(__file__).parent / "surfaces"
MODULES = {
    "tensorrt": "tensorrt_bindings",
    "tensorrt_rtx": "tensorrt_rtx_bindings",
    "cuda_python": "cuda.bindings.runtime",
    "cuda_bindings": "cuda.bindings.runtime",
}


def main(wheels: list[str]) -> None:
    """Write the surface of every wheel."""
    for wheel in map(Path, wheels):
        name, version = wheel.name.split("-")[:2]
        family = re.sub(r"_cu\d+(_bindings)?$", "", name)
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
            if family == "tensorrt_stubs":
                text = stubs_surface(Path(folder))
            else:
                text = _describe(family, Path(folder))
        out = SURFACES / f"{family}-{version}.pyi"
        out.write_text(_provenance(wheel) + text)
        print(out, out.stat().st_size)


def _provenance(wheel: Path) -> str:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    origin = f"# Names, parameters and types alone, from {wheel.name}\n"
    return f"{origin}# SHA-256 {digest}, by tests/contracts/make_surfaces.py.\n"


def read_surface(path: Path) -> str:
    """A surface without its provenance."""
    lines = path.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("# "))


def _describe(family: str, folder: Path) -> str:
    """Import the bindings in a process of their own and describe them."""
    libraries = folder / "libraries"
    for binding in folder.rglob("tensorrt*.so"):
        empty_libraries(binding, libraries)
    paths = os.pathsep.join([str(folder), *(path for path in sys.path if path)])
    return subprocess.run(
        [sys.executable, __file__, "--describe", MODULES[family]],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def describe(module: str) -> str:
    """The surface of an importable module."""
    found = importlib.import_module(module)
    if module.startswith("cuda"):
        return surface.cudart_surface(found)
    return surface.tensorrt_surface(found)


def empty_libraries(binding: Path, folder: Path) -> None:
    """Libraries of the names that ``binding`` needs, whose functions all return 0."""
    folder.mkdir(exist_ok=True)
    dynamic_section = _run("readelf", "-d", binding)
    needed = re.findall(r"Shared library: \[(lib(?:nv|tensorrt)[^]]+)\]", dynamic_section)
    undefined = _run("nm", "-D", "--undefined-only", binding)
    symbols = re.findall(r" U ((?:create|get|init)[A-Z]\w+)$", undefined, re.M)
    source = folder / "empty.c"
    source.write_text("".join(f"int {symbol}(void) {{ return 0; }}\n" for symbol in symbols))
    for name in needed:
        _run("cc", "-shared", "-fPIC", source, "-o", folder / name, f"-Wl,-soname,{name}")


def _run(*command: str | Path) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout


def stubs_surface(folder: Path) -> str:
    """``tensorrt-stubs`` cut down to the classes of a surface, without docstrings."""
    # As published, not all of it is Python: 'in' is a parameter, and a parameter without a default
    # follows one with a default. So only what is used is parsed.
    bindings = (folder / "tensorrt_bindings/tensorrt.pyi").read_text()
    bindings = bindings.replace(", channel_axis: int)", ")")
    blocks = re.split(r"^(?=\w)", bindings, flags=re.M)
    tree = ast.parse("".join(block for block in blocks if _wanted(block)))
    package = ast.parse((folder / "tensorrt_bindings/__init__.pyi").read_text())

    classes: list[ast.stmt] = []
    constants: list[ast.stmt] = []
    known = {"ILogger.Severity"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in surface.CLASSES:
            classes.append(node)
            known.add(node.name)
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) != "bool":
            constants.append(node)
    functions: list[ast.stmt] = []
    for node in tree.body + package.body:
        if isinstance(node, ast.FunctionDef) and node.name in surface.FUNCTIONS:
            functions.append(node)

    body = [ast.unparse(_cut(node, known)) for node in [*classes, *constants, *functions]]
    lines = "\n".join(body)
    return f"{surface.HEADER}__version__: str\n\n{surface.ENUM}\n{lines}\n"


def _wanted(block: str) -> bool:
    """Whether a block of top-level text is a class or function of the surface, or a constant."""
    match = re.match(r"class (\w+)|def (\w+)|\w+: ", block)
    if match is None:
        return False
    name = match[1] or match[2]
    return name is None or name in surface.CLASSES or name in surface.FUNCTIONS


def _cut(node: ast.stmt, known: set[str]) -> ast.stmt:
    """A definition with known types, without docstrings and unused members."""
    if isinstance(node, ast.AnnAssign):
        node.annotation = surface.known_type(node.annotation, known)
    elif isinstance(node, ast.FunctionDef):
        node.body = [ast.Expr(ast.Constant(...))]
        node.decorator_list = [_bare(decorator) for decorator in node.decorator_list]
        node.returns = surface.known_type(node.returns, known)
        for argument in node.args.args:
            if argument.annotation:
                argument.annotation = surface.parameter_type(argument.annotation, known)
    elif isinstance(node, ast.ClassDef):
        members = [member for member in node.body if not surface.unused(node.name, _name(member))]
        if any(_name(member) == "__members__" for member in node.body):
            node.bases = [ast.Name("Enum")]
            members = [member for member in members if isinstance(member, ast.AnnAssign)]
        # A statement without a name is a docstring.
        body = [_cut(member, known) for member in members if _name(member)]
        node.body = body or [ast.Expr(ast.Constant(...))]
        node.body += ast.parse(surface.PROTOCOLS.get(node.name, "")).body
    return node


def _bare(decorator: ast.expr) -> ast.expr:
    """``typing.overload`` as ``overload``, which a surface imports by name."""
    return ast.Name("overload") if ast.unparse(decorator) == "typing.overload" else decorator


def _name(node: ast.stmt) -> str:
    """What a statement of a class body defines; '' for a docstring."""
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    return node.name if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--describe"]:
        print(describe(sys.argv[2]), end="")
    else:
        main(sys.argv[1:])
