"""Polygraphy on our path through TensorRT: every name that it touches exists in each version.

TensorRT is a strict fake made from the surface (strict_fake.py), so nothing is parsed or built.
Polygraphy is the real one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from make_surfaces import SURFACES

from hipa_deploy.engines.build.worker import environment

HERE = Path(__file__).parent
BUILD = """
import sys
from pathlib import Path
from hipa_deploy.bundle.manifest import Axis, StageSpec, TensorSpec
from hipa_deploy.engines.build.worker import Job, build
from hipa_deploy.engines.targets.build_options import BuildOptions

onnx = Path(sys.argv[1])
out = Path(sys.argv[2])
library = sys.argv[3]
x = TensorSpec(name="x", dtype="float32", shape=("N", 4, 8, 8))
y = TensorSpec(name="y", dtype="float32", shape=("N", 4, 8, 8))
spec = StageSpec(name="unet", inputs=[x], outputs=[y], axes={"N": Axis(min=1, opt=1, max=2)})
options = BuildOptions(optimization_level=3, workspace_mib=64, max_aux_streams=0)
cache = out.with_suffix(".cache") if library == "tensorrt" else None
capabilities = (86, 89) if library == "rtx" else (87,)
job = Job(
    library=library, onnx=onnx, spec=spec, out=out, precision="fp16",
    compute_capabilities=capabilities, options=options, timing_cache=cache, mark=("x",),
)
build(job, print)
assert out.is_file()
"""
FAKE = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from strict_fake import fake_module
sys.modules[__name__] = fake_module(Path({surface!r}), __name__)
"""
SURFACE = [path for path in sorted(SURFACES.glob("tensorrt*-*.pyi")) if "stubs" not in path.name]


def build_on(surface: Path, folder: Path, code: str = BUILD) -> subprocess.CompletedProcess[str]:
    """Run the worker's build with polygraphy, where TensorRT is the fake of ``surface``."""
    name = re.sub(r"-.*", "", surface.stem)
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(FAKE.format(here=str(HERE), surface=str(surface)))
    (folder / "model.onnx").touch()
    library = "rtx" if name == "tensorrt_rtx" else "tensorrt"
    paths = [str(folder)]
    other_polygraphy = os.environ.get("POLYGRAPHY_UNDER_TEST")
    if other_polygraphy:
        paths.append(other_polygraphy)
    arguments = [str(folder / "model.onnx"), str(folder / "unet.engine"), library]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment(library), "PYTHONPATH": os.pathsep.join(paths)},
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("surface", SURFACE, ids=lambda path: path.stem)
def test_a_build_touches_only_what_is_there(surface: Path, tmp_path: Path) -> None:
    result = build_on(surface, tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_name_that_is_gone_is_noticed(tmp_path: Path) -> None:
    surface = tmp_path / "tensorrt-12.0.0.pyi"
    whole = (SURFACES / "tensorrt-11.4.0.106.pyi").read_text()
    surface.write_text(whole.replace("    def add_optimization_profile", "    def add_profile"))
    assert "add_optimization_profile" in build_on(surface, tmp_path).stderr


def test_an_attribute_that_is_gone_is_noticed(tmp_path: Path) -> None:
    surface = tmp_path / "tensorrt-12.0.0.pyi"
    whole = (SURFACES / "tensorrt-11.4.0.106.pyi").read_text()
    surface.write_text(whole.replace("    progress_monitor: ", "    monitor: "))
    assert "progress_monitor" in build_on(surface, tmp_path).stderr
