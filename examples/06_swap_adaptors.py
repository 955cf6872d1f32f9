"""Give a loaded bundle another adaptor, without a new export or build, and its own one back.

Needs:   pip install 'hipa-deploy[export]' to write the other adaptor's weights; swapping them in
         needs the core install alone.
Run:     python examples/06_swap_adaptors.py
Expect:  own.png, other.png (without the adaptor's effect: one step of the plain model, a worse
         image) and own-again.png, which has the same pixels as own.png.
"""

from pathlib import Path

import numpy as np

from hipa_deploy import OneStepPipeline, embedded
from hipa_deploy.export.export_request import SwapOptions
from hipa_deploy.export.export_swap import export_swap

PROMPT = "3d emoji of a red apple"

# Only the weights that differ from the bundle's are written. Here it is the included adaptor at
# scale 0, which is the plain model; an adaptor of your own for the same model works the same way.
# On the command line:
# hipa-export --model emoji --adaptor FOLDER --swap-for emoji --out other-adaptor
other = Path("other-adaptor")
if not other.exists():
    export_swap(
        SwapOptions(
            model="emoji",
            adaptor=embedded.ADAPTOR,
            adaptor_scale=0.0,
            bundle=embedded.BUNDLE,
            out=other,
        )
    )

with OneStepPipeline.load("emoji") as pipe:
    own = pipe(PROMPT, seed=0)

    pipe.swap_adaptor(other)
    swapped = pipe(PROMPT, seed=0)

    # None is the adaptor that the bundle was exported with.
    pipe.swap_adaptor(None)
    again = pipe(PROMPT, seed=0)

own.images[0].save("own.png")
swapped.images[0].save("other.png")
again.images[0].save("own-again.png")
difference = np.abs(own.images_BHWC.astype(int) - swapped.images_BHWC).mean()
restored = np.array_equal(own.images_BHWC, again.images_BHWC)
print(f"mean difference of the two adaptors: {difference:.1f} of 255; own one restored: {restored}")
