"""An image from a prompt, in Python.

Needs:   the core install (pip install hipa-deploy); no GPU, no PyTorch.
Run:     python examples/01_image.py
Expect:  apple.png in the current folder, 128x128 pixels: a red apple on white. The embedded model
         'emoji' knows emoji and nothing else; a bundle of your own model works the same way.
"""

from hipa_deploy import OneStepPipeline

# Loading checks the bundle's files and opens its models; do it once and make many images.
with OneStepPipeline.load("emoji") as pipe:
    result = pipe("3d emoji of a red apple", seed=0)

    # images_BHWC is uint8 [1, 128, 128, 3], RGB; images is the same as Pillow images.
    image = result.images[0]
    image.save("apple.png")
    print(f"apple.png: {image.width}x{image.height}, seed {result.seeds[0]}, on {pipe.backend}")
