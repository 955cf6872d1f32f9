"""Many prompts and seeds, each image written to disk as soon as it is made, with a progress bar.

Needs:   the core install.
Run:     python examples/02_many_images.py
Expect:  the folder images/ with 12 PNG files, 0-seed100.png to 2-seed103.png, and a progress bar.
"""

from pathlib import Path

from rich.progress import Progress

from hipa_deploy import OneStepPipeline
from hipa_deploy.images.png import save_png

PROMPTS = [
    "3d emoji of a red apple",
    "flat emoji of a panda",
    "noto emoji of a rocket",
]
FIRST_SEED = 100
COUNT = 4  # images of each prompt, with seeds 100, 101, 102 and 103

out = Path("images")
total = len(PROMPTS) * COUNT
with OneStepPipeline.load("emoji") as pipe, Progress() as progress:
    task = progress.add_task("images", total=total)

    # stream() yields one batch at a time, so that memory stays small however many images there are.
    # All prompts are checked before the first image is made: a mistake costs no time.
    for batch in pipe.stream(PROMPTS, seed=FIRST_SEED, count=COUNT):
        for image_HWC, prompt, seed, parameters in zip(
            batch.images_BHWC, batch.prompts, batch.seeds, batch.parameters, strict=True
        ):
            # save_png stores the parameters in the PNG; example 08 makes the image again from them.
            path = out / f"{PROMPTS.index(prompt)}-seed{seed}.png"
            # It replaces a file only if it is asked to: a second run makes the same images.
            save_png(path, image_HWC, parameters, force=True)
        progress.advance(task, len(batch.seeds))

print(f"{out}: {total} images")
