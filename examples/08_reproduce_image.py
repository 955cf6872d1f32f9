"""Read how a PNG was made, and make it again, bit for bit.

Needs:   the core install.
Run:     python examples/08_reproduce_image.py [IMAGE.png]
Expect:  the image's generation parameters, and 'the same bytes: True'. Without an argument the
         script first makes panda.png. Any PNG of hipa-generate with the bundle 'emoji' will do.
"""

import sys
from pathlib import Path

from hipa_deploy import OneStepPipeline
from hipa_deploy.images.png import png_bytes, read_parameters, save_png

with OneStepPipeline.load("emoji") as pipe:
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    else:
        path = Path("panda.png")
        if not path.exists():
            first = pipe("flat emoji of a panda", seed=42)
            save_png(path, first.images_BHWC[0], first.parameters[0])

    # The parameters also hold hashes of the model, the adaptor and the UNet that made the image.
    parameters = read_parameters(path)
    for name, value in parameters.items():
        print(f"{name}: {value}")

    result = pipe(
        parameters["prompt"],
        seed=parameters["seed"],
        height=parameters["height"],
        width=parameters["width"],
        truncate=parameters["truncate"],
        prompt_weights=parameters["prompt_weights"],
    )

# The same bytes need the same backend and library versions too: another may round another way.
same = png_bytes(result.images_BHWC[0], result.parameters[0]) == path.read_bytes()
print(f"the same bytes: {same}")
