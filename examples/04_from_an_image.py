"""Edit, inpaint and upscale an image.

Needs:   pip install 'hipa-deploy[export]', because the bundles of these tasks are exported first;
         running them needs the core install alone.
Run:     python examples/04_from_an_image.py
Expect:  source.png (an apple), edited.png (the apple in another style), inpainted.png (a part of
         it repainted), small.png (32x32) and upscaled.png (128x128, made from small.png). About a
         minute on two CPU cores the first time; the bundles in bundles/ are kept.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from hipa_deploy import OneStepPipeline, embedded
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions


def bundle_for(task: str) -> Path:
    """The folder of the embedded model's bundle for ``task``, exported now unless it is there.

    The same on the command line: hipa-export --model emoji --adaptor emoji-TASK --out bundles/TASK
    """
    out = Path("bundles") / task
    if not out.exists():
        adaptor = embedded.resolve_adaptor(f"emoji-{task}")
        export_bundle(ExportOptions(model="emoji", adaptor=adaptor, out=out))
    return out


with OneStepPipeline.load("emoji") as pipe:
    source = pipe("3d emoji of a red apple", seed=0).images[0]
source.save("source.png")

with OneStepPipeline.load(bundle_for("edit")) as pipe:
    # The bundle takes the strengths that its adaptor was trained for; the largest by default.
    edited = pipe.edit(source, "noto emoji of a red apple", seed=1).images[0]
edited.save("edited.png")

# White is repainted, black is kept: here a rectangle right of the middle. [128, 128], 0 and 255.
mask_HW = np.zeros((source.height, source.width), np.uint8)
mask_HW[32:96, 64:112] = 255
with OneStepPipeline.load(bundle_for("inpaint")) as pipe:
    inpainted = pipe.inpaint(source, mask_HW, "3d emoji of a red apple", seed=2).images[0]
inpainted.save("inpainted.png")

# The factor, here 4, is the adaptor's. A larger image would be enlarged tile by tile.
small = source.resize((32, 32), Image.Resampling.BICUBIC)
small.save("small.png")
with OneStepPipeline.load(bundle_for("upscale")) as pipe:
    upscaled = pipe.upscale(small, "3d emoji of a red apple").images[0]
upscaled.save("upscaled.png")
print(f"edited.png, inpainted.png, upscaled.png ({upscaled.width}x{upscaled.height})")
