"""Two examples for the help of each command."""

from __future__ import annotations

EXAMPLES = {
    "demo": ("hipa-demo", "hipa-demo --quick --out quick-demo"),
    "init": ("hipa-init", "hipa-init --device orin-nano --model my-model --adaptor none"),
    "train": (
        "hipa-train --recipe emoji --out my-adaptor --steps 500",
        "hipa-train --recipe sd15 --model my-model --prompts captions.txt --out a --dry-run",
    ),
    "export": (
        "hipa-export --model my-model --adaptor my-adaptor --out my-bundle --dtype fp16",
        "hipa-export --model my-model --adaptor my-adaptor --out small --for orin-nano",
    ),
    "build": (
        "hipa-build my-bundle --for orin-nano --dry-run",
        "hipa-build my-bundle --backend rtx --target rtx40",
    ),
    "publish": (
        "hipa-publish my-adaptor --repo me/my-adaptor --model my-model --dry-run folder",
        "hipa-publish my-bundle --repo me/my-bundle --report quality --private",
    ),
    "generate": (
        'hipa-generate emoji "3d emoji of a red apple" --seed 7 --out apple.png',
        'hipa-generate my-bundle "a lighthouse" "a boat" --count 4 --out pictures',
    ),
    "edit": (
        'hipa-edit my-bundle photo.png "a snowy street" --strength 0.6',
        'hipa-edit my-bundle photo.png "a watercolour" --count 4 --out edits',
    ),
    "inpaint": (
        'hipa-inpaint my-bundle photo.png mask.png "an empty bench"',
        'hipa-inpaint my-bundle photo.png mask.png "a red door" --feather 8 --seed 3',
    ),
    "upscale": (
        "hipa-upscale my-bundle small.png --out large.png",
        'hipa-upscale my-bundle small.png "a brick wall" --overlap 16',
    ),
    "control": (
        'hipa-control my-bundle edges.png "a house by the sea"',
        'hipa-control my-bundle depth.png "a castle of sand" --scale 0.7 --count 4 --out castles',
    ),
    "serve": (
        "hipa-serve emoji",
        "hipa-serve my-bundle --host 0.0.0.0 --api-keys keys.txt --allow-host gpu-box",
    ),
    "bulk": (
        "hipa-bulk emoji prompts.parquet --out images",
        "hipa-bulk my-bundle prompts.parquet --out images --ray auto --replicas 4",
    ),
    "triton": (
        "hipa-triton emoji --out models",
        "hipa-triton my-bundle --out models --backend onnxruntime-cuda --instances 2",
    ),
    "profile": (
        "hipa-profile emoji --runs 100 --seconds 10",
        "hipa-profile my-bundle --backend tensorrt --layers --json latency.json",
    ),
    "profile compare": (
        "hipa-profile compare before.json after.json",
        "hipa-profile compare orin-10.3.json orin-10.7.json",
    ),
    "profile table": (
        "hipa-profile table latency.json",
        "hipa-profile table orin.json rtx4090.json",
    ),
    "evaluate": (
        "hipa-evaluate --adaptor emoji --images 64 --rival my-bundle",
        "hipa-evaluate --model my-model --adaptor my-adaptor --prompts held-out.txt --out report",
    ),
    "doctor": ("hipa-doctor", "hipa-doctor my-bundle --backend tensorrt"),
}


def examples_text(command: str) -> str:
    """The end of a command's help: a paragraph for each example, or nothing."""
    lines = EXAMPLES.get(command, ())
    if not lines:
        return ""
    return "\n\n".join(["Examples:", *lines])
