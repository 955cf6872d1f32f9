"""Train an adaptor for a few steps, export it, and generate with it.

Needs:   pip install 'hipa-deploy[train,export]'
Run:     python examples/05_train_adaptor.py --steps 6
Expect:  my-adaptor/, my-bundle/ and trained.png in the current folder, in about a minute on two CPU
         cores. Six steps from the included adaptor only show the way: a real training takes
         thousands (train/recipes/emoji.toml).
"""

import argparse
from pathlib import Path

from hipa_deploy import OneStepPipeline, embedded
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.train.recipes.recipe import load_recipe
from hipa_deploy.train.train_adaptor import train_adaptor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=6, help="training steps")
parser.add_argument("--pairs", type=int, default=24, help="images that the teacher makes")
options = parser.parse_args()

# A recipe holds every setting of a training; here the included one, cut short. The teacher is the
# same model with all its steps: it makes the images that the one-step model learns to make.
recipe = load_recipe(
    "emoji",
    {
        "steps": options.steps,
        "batch": 4,
        "teacher.pairs": options.pairs,
        "teacher.batch": options.pairs,
        "prompts": "model:prompts.txt",
        "loss.latent_warmup_steps": 0,
        "optimiser.warmup_steps": 1,
    },
)
adaptor = Path("my-adaptor")
if not adaptor.exists():
    # Without initial_adaptor the training begins from nothing.
    train_adaptor(recipe, embedded.MODEL, adaptor, initial_adaptor=embedded.ADAPTOR)

# Merge the adaptor into the model and write ONNX models, each checked against PyTorch.
bundle = Path("my-bundle")
if not bundle.exists():
    export_bundle(ExportOptions(model="emoji", adaptor=adaptor, out=bundle))

# From here on no PyTorch is needed: the bundle can be copied to a device.
with OneStepPipeline.load(bundle) as pipe:
    pipe("3d emoji of a red apple", seed=0).images[0].save("trained.png")
print(f"trained.png, with an adaptor trained for {options.steps} steps")
