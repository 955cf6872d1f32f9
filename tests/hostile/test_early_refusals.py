"""A mistake that can be known at once is said at once: in one line, before torch is imported.

Each case is one mistake in a command that would otherwise work for minutes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from hipa_deploy.embedded import ADAPTOR, BUNDLE, DECODER, MODEL
from tests.hostile.harness import Worker

HEAVY = ("torch", "diffusers", "transformers", "onnx", "peft", "tensorrt", "tensorrt_rtx")
CPU_SECONDS = 2.0  # on a slow and busy machine; without load it is a tenth of that
WEIGHTS = "pytorch_lora_weights.safetensors"

EXPORT = ("export", "--model", "emoji", "--out", "new")
EXPORT_ADAPTED = (*EXPORT, "--adaptor", "emoji")
SWAP = ("export", "--model", "emoji", "--swap-for", "emoji", "--out", "new")
EVALUATE = ("evaluate",)
TRAIN = ("train", "--out", "new")
GENERATE = ("generate", "emoji", "a red apple")
AVERAGE = ("train", "--out", "new", "--average", "emoji")
DRY_RUN = (*TRAIN, "--dry-run")
PUBLISH = ("publish", "emoji", "--repo", "me/x", "--dry-run", "new")
TRITON = ("triton", "emoji", "--out", "new")
BULK = ("bulk", "emoji", "rows.parquet", "--out", "new")
SERVE = ("serve", "emoji", "--port", "0")
LARGE = ("--height", "2048", "--width", "2048", "--batch", "64")
BUILD = ("build", "emoji", "--backend", "rtx", "--target", "rtx40")
PROFILE = ("profile", "emoji")
MODEL_COMMANDS = {"export": EXPORT, "evaluate": EVALUATE, "train": TRAIN}

# The words of a command, and a part of the line that it must print.
CASES: list[tuple[tuple[str, ...], str]] = [
    # What to write, and where.
    ((*EXPORT[:-1], "full"), "full exists"),
    ((*EXPORT[:-1], "."), "current folder"),
    ((*EXPORT[:-1], "file.txt"), "file.txt"),
    ((*EXPORT[:-1], "file.txt/new"), "no folder"),
    ((*EXPORT[:-1], "loop"), "loop"),
    ((*EXPORT[:-1], "loop/new"), "loop"),
    ((*EXPORT[:-1], "x" * 300), "name"),
    ((*EXPORT[:-1], "a\0b"), "null byte"),
    ((*TRAIN[:-1], "full"), "full exists"),
    ((*TRAIN[:-1], "loop"), "loop"),
    ((*TRAIN[:-1], "x" * 300), "name"),
    ((*TRAIN[:-1], "file.txt/new"), "no folder"),
    ((*EVALUATE, "--json", "file.txt"), "file.txt exists"),
    ((*EVALUATE, "--json", "loop"), "loop"),
    ((*EVALUATE, "--json", "file.txt/report.json"), "no folder"),
    ((*EVALUATE, "--out", "file.txt"), "file.txt"),
    ((*EVALUATE, "--out", "x" * 300), "name"),
    ((*GENERATE, "--out", "image.png"), "image.png exists"),
    ((*GENERATE, "--out", "loop"), "loop"),
    ((*GENERATE, "--out", "x" * 300 + ".png"), "name"),
    ((*GENERATE, "--out", "a\0b.png"), "null byte"),
    ((*GENERATE, "--out", "file.txt/new.png"), "no folder"),
    ((*PROFILE, "--json", "file.txt"), "file.txt exists"),
    ((*PROFILE, "--html", "loop"), "loop"),
    ((*PROFILE, "--json", "x" * 300), "name"),
    (("demo", "--out", "file.txt"), "file.txt"),
    (("demo", "--out", "loop"), "loop"),
    (("demo", "--out", "file.txt/new"), "no folder"),
    (("doctor", "--self-test", "--out", "file.txt"), "file.txt exists"),
    # Adaptors.
    ((*EXPORT, "--adaptor", "nope"), "nope does not exist"),
    ((*EXPORT, "--adaptor", "no-metadata"), WEIGHTS),
    ((*EXPORT, "--adaptor", "no-weights"), WEIGHTS),
    ((*EXPORT, "--adaptor", "cut-metadata"), "not JSON"),
    ((*EXPORT, "--adaptor", "cut"), WEIGHTS),
    ((*EXPORT, "--adaptor", "not-finite"), "NaN"),
    ((*EXPORT, "--adaptor", "half-a-pair"), "lora"),
    ((*EXPORT, "--adaptor", "foreign-layer"), "layer"),
    ((*EXPORT, "--adaptor", "other-shape"), "shape"),
    ((*EXPORT, "--adaptor", "other-model"), "another base model"),
    ((*EXPORT, "--adaptor", "file.txt"), "file.txt"),
    ((*EXPORT_ADAPTED, "--adaptor-scale", "nan"), "scale"),
    ((*EXPORT_ADAPTED, "--adaptor-scale", "inf"), "scale"),
    ((*EXPORT, "--adaptor", "emoji-edit", "--task", "inpaint"), "trained to edit"),
    ((*EVALUATE, "--adaptor", "nope"), "nope does not exist"),
    ((*EVALUATE, "--adaptor", "cut"), WEIGHTS),
    ((*EVALUATE, "--adaptor", "not-finite"), "NaN"),
    ((*EVALUATE, "--adaptor", "half-a-pair"), "lora"),
    ((*EVALUATE, "--adaptor", "no-weights"), WEIGHTS),
    ((*EVALUATE, "--adaptor", "foreign-layer"), "layer"),
    ((*EVALUATE, "--adaptor", "other-model"), "another base model"),
    ((*TRAIN, "--from", "nope"), "nope does not exist"),
    ((*TRAIN, "--from", "cut"), WEIGHTS),
    ((*TRAIN, "--from", "not-finite"), "NaN"),
    ((*TRAIN, "--from", "half-a-pair"), "lora"),
    ((*TRAIN, "--from", "other-rank"), "rank"),
    ((*TRAIN, "--from", "other-model"), "another base model"),
    ((*TRAIN, "--recipe", "emoji-decoder", "--adaptor", "nope"), "nope does not exist"),
    ((*TRAIN, "--recipe", "emoji-decoder", "--adaptor", "cut"), WEIGHTS),
    ((*TRAIN, "--recipe", "emoji-decoder", "--from", "emoji"), "--from"),
    ((*TRAIN, "--adaptor", "emoji"), "--adaptor"),
    ((*SWAP,), "--adaptor or --lora"),
    ((*SWAP, "--adaptor", "nope"), "nope does not exist"),
    ((*SWAP, "--adaptor", "cut"), WEIGHTS),
    ((*SWAP, "--adaptor", "not-finite"), "NaN"),
    ((*SWAP, "--adaptor", "emoji", "--batch", "2"), "--swap-for"),
    ((*SWAP[:4], "nope", *SWAP[5:], "--adaptor", "emoji"), "nope"),
    ((*GENERATE, "--adaptor", "nope"), "nope"),
    # Encoders and decoders.
    ((*EXPORT, "--decoder", "nope"), "nope does not exist"),
    ((*EXPORT, "--decoder", "file.txt"), "file.txt"),
    ((*EXPORT, "--decoder", "./full"), "full"),
    ((*EXPORT, "--decoder", "other-decoder"), "another VAE"),
    ((*EXPORT, "--decoder", "cut-decoder"), "cut-decoder"),
    ((*EXPORT, "--decoder", "not-finite-decoder"), "NaN"),
    ((*EXPORT, "--encoder", "tiny"), "--encoder"),
    ((*EXPORT, "--adaptor", "emoji-edit", "--encoder", "nope"), "nope does not exist"),
    ((*EXPORT, "--adaptor", "emoji-edit", "--encoder", "other-decoder"), "decoder"),
    ((*EXPORT, "--adaptor", "emoji-upscale", "--encoder", "nope"), "nope"),
    ((*EXPORT, "--decoder", ""), "--decoder is empty"),
    ((*EXPORT, "--adaptor", "emoji-edit", "--encoder", ""), "--encoder is empty"),
    ((*EXPORT, "--adaptor", ""), "--adaptor is empty"),
    ((*SWAP, "--adaptor", " "), "--adaptor is empty"),
    ((*TRAIN, "--from", ""), "--from is empty"),
    # ControlNets.
    ((*EXPORT, "--controlnet", ""), "--controlnet is empty"),
    ((*SWAP, "--adaptor", "emoji", "--controlnet", ""), "--controlnet is empty"),
    ((*EXPORT, "--controlnet", "nets/canny.pth"), "--controlnet nets/canny.pth does not exist"),
    ((*EXPORT, "--controlnet", "nets/x.SAFETENSORS"), "nets/x.SAFETENSORS does not exist"),
    ((*EXPORT, "--controlnet", "a/x", "--controlnet", "a/y"), "--controlnet is given twice: a/x,"),
    ((*SWAP, "--adaptor", "emoji", *("--controlnet", "x") * 3), "--controlnet is given 3 times"),
    ((*EXPORT, "--controlnet", "nope"), "--controlnet nope does not exist"),
    ((*EXPORT, "--controlnet", "full"), "--controlnet full has no config.json"),
    ((*EXPORT, "--controlnet", "file.txt"), "file.txt"),
    ((*EXPORT, "--controlnet", "emoji-adaptor/pytorch_lora_weights.safetensors"), "no ControlNet"),
    ((*EXPORT, "--controlnet", "union"), "ControlNetUnionModel"),
    ((*EXPORT, "--controlnet", "of-sd15"), "block_out_channels"),
    ((*EXPORT, "--task", "control"), "--controlnet"),
    ((*EXPORT, "--controlnet", "of-emoji", "--task", "generate"), "Leave out one of the two"),
    ((*EXPORT, "--controlnet", "of-emoji", "--adaptor", "emoji-edit"), "trained to edit"),
    (
        (*EXPORT, "--controlnet", "of-emoji", "--with-teacher", "--adaptor", "emoji"),
        "--with-teacher",
    ),
    ((*EXPORT, "--controlnet", "of-emoji", "--layout", "generic"), "--layout generic"),
    ((*EXPORT, "--controlnet", "of-emoji", "--encoder", "tiny"), "--encoder"),
    ((*EXPORT, "--controlnet", "four-channels"), "4 channels"),
    ((*EXPORT, "--controlnet", "other-factor"), "reduces the control image 4 times"),
    ((*SWAP, "--adaptor", "emoji", "--controlnet", "of-emoji"), "has no ControlNet"),
    (("control", "emoji", "photo.png", "x"), "not to control"),
    (("control", "controlled", "photo.png", "x", "--scale", "3"), "Expected 0 to 2"),
    (("control", "controlled", "photo.png", "x", "--scale", "nan"), "Expected 0 to 2"),
    (("generate", "controlled", "x"), "hipa-control"),
    # What does not exist is named although something else is missing or wrong too.
    ((*EVALUATE, "--coco", "nope"), "--coco nope does not exist"),
    ((*EVALUATE, "--coco", "full"), "--coco full has no annotations"),
    ((*EVALUATE, "--coco", "nope", "--model", "no-model"), "no-model does not exist"),
    ((*EVALUATE, "--rival", "no/such/folder"), "--rival no/such/folder does not exist"),
    ((*TRAIN, "--gpus", "2", "--model", "no-model"), "no-model does not exist"),
    ((*TRAIN, "--patience", "2", "--model", "no-model"), "no-model does not exist"),
    (("build", "nope"), "bundle nope does not exist"),
    (("build", "nope", "--for", "nowhere"), "bundle nope does not exist"),
    (("publish", "nope", "--repo", "me/x"), "nope does not exist"),
    (("serve", "nope", "--replicas", "2"), "nope does not exist"),
    (("bulk", "nope", *BULK[2:], "--replicas", "3"), "nope does not exist"),
    (("doctor", "nope", "--out", "a.md"), "nope does not exist"),
    (("doctor", "nope", "--bisect"), "nope does not exist"),
    (("doctor", "nope", "--self-test"), "nope does not exist"),
    (("publish", "emoji", "--repo", "me/x", "--report", "nope"), "--report nope has no report.md"),
    # Numbers.
    ((*EXPORT, "--height", "65"), "multiple"),
    ((*EXPORT, "--height", "-64"), "multiple"),
    ((*EXPORT, "--width", "0"), "multiple"),
    ((*EXPORT, "--width", str(10**12)), "pixels"),
    ((*EXPORT, "--height", str(10**30)), "pixels"),
    ((*EXPORT, "--batch", "0"), "batch"),
    ((*EXPORT, "--batch", str(10**9)), "batch"),
    ((*EXPORT, "--batch", str(10**30)), "batch"),
    ((*EXPORT, "--context-tokens", "78"), "context"),
    ((*EXPORT, "--clip-skip", "99"), "clip"),
    ((*EXPORT, "--clip-skip", "-1"), "clip"),
    ((*EXPORT, "--dynamic", "depth=1:2:3"), "--dynamic"),
    ((*EXPORT, "--dynamic", "height=64:128"), "--dynamic"),
    ((*EXPORT, "--dynamic", "height=64:65:128"), "multiple"),
    ((*EXPORT, "--dynamic", "height=128:64:256"), "--dynamic"),
    ((*EXPORT, "--dynamic", f"height=64:64:{10**12}"), "height"),
    ((*EXPORT, "--dynamic", f"height=64:64:{'9' * 5000}"), "--dynamic"),
    ((*EXPORT, "--dynamic", f"batch=1:1:{10**9}"), "--dynamic"),
    ((*EXPORT, "--dynamic", "batch=1:1:4", "--layout", "generic"), "--layout onestep"),
    ((*EXPORT, "--strengths", "0.5"), "--strengths"),
    ((*EXPORT, "--adaptor", "emoji-edit", "--strengths", "x"), "--strengths"),
    ((*EXPORT, "--adaptor", "emoji-edit", "--strengths", "0.123"), "strength"),
    ((*EXPORT, "--task", "edit", "--strengths", "1.5"), "strength"),
    ((*EXPORT, "--task", "edit", "--strengths", "nan"), "strength"),
    ((*EXPORT, "--task", "edit", "--strengths", "0.5,0.5"), "strengths"),
    ((*EXPORT, "--layout", "generic", "--fuse"), "--fuse"),
    ((*EXPORT, "--one-step", "nope"), "nope"),
    ((*EXPORT, "--for", "nope"), "nope"),
    ((*EXPORT, "--for", "orin-nano", "--build", "rtx"), "--build"),
    ((*EXPORT, "--for", "orin-nano", "--layout", "generic"), "--layout"),
    ((*EXPORT, "--for", "orin-nano", *LARGE), "what would fit"),
    ((*EXPORT_ADAPTED, "--one-step", "hyper-sd15"), "own step"),
    ((*EXPORT, "--one-step", "file.toml"), "file.toml"),
    ((*EVALUATE, "--images", "3"), "Expected 4"),
    ((*EVALUATE, "--images", str(10**9)), "Expected 4"),
    ((*EVALUATE, "--one-step", "nope", "--adaptor", "none"), "nope"),
    ((*EVALUATE, "--one-step", "hyper-sd15", "--adaptor", "none"), "LoRA"),
    ((*EVALUATE, "--rival", "nope"), "nope"),
    ((*EVALUATE, "--rival", "nope.safetensors=hyper-sd15"), "nope.safetensors"),
    ((*EVALUATE, "--recipe", "nope"), "nope"),
    ((*EVALUATE, "--context-tokens", "78"), "context"),
    ((*EVALUATE, "--clip-skip", "99"), "clip"),
    ((*TRAIN, "--recipe", "nope"), "nope"),
    ((*TRAIN, "--recipe", "file.toml"), "file.toml"),
    ((*TRAIN, "--recipe", "full"), "full"),
    ((*TRAIN, "--steps", "0"), "steps"),
    ((*TRAIN, "--steps", str(10**12)), "steps"),
    ((*TRAIN, "--recipe", "no-images.toml"), "nowhere"),
    ((*TRAIN, "--recipe", "code.toml"), "--allow-code"),
    ((*TRAIN, "--recipe", "emoji-decoder", "--dry-run"), "--dry-run"),
    ((*GENERATE, "--count", "0"), "Expected 1"),
    ((*GENERATE, "--count", str(10**9)), "Expected 1"),
    ((*GENERATE, "--seed", "-1"), "seed"),
    ((*GENERATE, "--seed", str(10**30)), "seed"),
    ((*GENERATE, "--height", "65"), "height"),
    ((*GENERATE, "--width", str(10**12)), "width"),
    ((*GENERATE, "--backend", "nope"), "nope"),
    (("upscale", "upscaler", "photo.png", "--overlap", "128"), "overlap"),
    (("upscale", "upscaler", "photo.png", "--overlap", "127"), "overlap"),
    (("upscale", "upscaler", "photo.png", "--overlap", "-1"), "overlap"),
    (("inpaint", "emoji", "photo.png", "photo.png", "x"), "inpaint"),
    (("edit", "emoji", "photo.png", "x"), "edit"),
    (("edit", "editor", "photo.png", "x", "--strength", "2"), "strength"),
    (("edit", "editor", "photo.png", "x", "--count", str(10**9)), "Expected 1"),
    ((*PROFILE, "--runs", "0"), "runs"),
    ((*PROFILE, "--runs", str(10**9)), "runs"),
    ((*PROFILE, "--warmup", "-1"), "warm"),
    ((*PROFILE, "--warmup", str(10**9)), "warm"),
    ((*PROFILE, "--roofline", "nope"), "nope"),
    ((*PROFILE, "--backend", "nope"), "nope"),
    ((*BUILD, "--workspace", str(10**12)), "workspace"),
    ((*BUILD, "--workspace", "-1"), "workspace"),
    ((*BUILD, "--tactic-dram", str(10**12)), "tactic"),
    ((*BUILD, "--optimization-level", "6"), "optimization"),
    ((*BUILD, "--best-of", "0"), "best"),
    ((*BUILD, "--best-of", "2"), "no NVIDIA GPU"),
    ((*BUILD, "--best-of", str(10**9)), "best"),
    ((*BUILD[:-1], "nope"), "nope"),
    (("build", "nope", "--backend", "rtx"), "nope"),
    (("build", "emoji"), "--backend"),
    (("build", "emoji", "--for", "nope"), "nope"),
    (("build", "emoji", "--for", "orin-nano", "--target", "thor"), "--target"),
    (("build", "emoji", "--for", "orin-nano", "--backend", "rtx"), "does not support"),
    ((*BUILD, "--timing-cache", "full"), "full"),
    ((*BUILD, "--timing-cache", "/dev/zero"), "/dev/zero"),
    (("doctor", "nope"), "nope"),
    (("doctor", "emoji", "--backend", "nope"), "nope"),
    (("doctor", "--self-test", "emoji"), "--self-test"),
    (("demo", "--task", "edit", "--quick"), "--quick"),
    (("demo", "--out", "full"), "full"),
    # Trainings that are predicted or averaged.
    ((*TRAIN, "--gpus", "4"), "--gpus"),
    ((*TRAIN, "--rank", "4"), "--rank"),
    ((*AVERAGE,), "twice"),
    ((*AVERAGE, "--average", "nope"), "nope"),
    ((*AVERAGE, "--average", "cut"), "cut"),
    ((*AVERAGE, "--average", "not-finite"), "NaN"),
    ((*AVERAGE, "--average", "other-model"), "base model"),
    ((*AVERAGE, "--rank", "0"), "rank"),
    ((*AVERAGE, "--steps", "3"), "--average"),
    (("train", "--out", "full", *AVERAGE[3:], "--average", "emoji-adaptor"), "full exists"),
    ((*DRY_RUN, "--model", "nope"), "nope"),
    ((*DRY_RUN, "--model", "full"), "full"),
    ((*DRY_RUN, "--prompts", "nope.txt"), "nope.txt"),
    ((*DRY_RUN, "--recipe", "nope"), "nope"),
    ((*DRY_RUN, "--gpus", "0"), "gpus"),
    ((*DRY_RUN, "--lora", f"cut/{WEIGHTS}"), "cut"),
    ((*DRY_RUN, "--lora", f"foreign-layer/{WEIGHTS}"), "layer"),
    ((*DRY_RUN, "--from", "cut"), "cut"),
    ((*DRY_RUN, "--from", "other-rank"), "rank"),
    # Publishing.
    ((*PUBLISH[:3], "x", "--dry-run", "new"), "--repo"),
    ((*PUBLISH[:-1], "full"), "full"),
    ((*PUBLISH[:-1], "file.txt"), "file.txt"),
    ((*PUBLISH, "--base-model", "x"), "--base-model"),
    ((*PUBLISH, "--license", "no such"), "--license"),
    ((*PUBLISH, "--report", "nope"), "nope"),
    ((*PUBLISH, "--report", "full"), "full"),
    ((*PUBLISH, "--model", "nope"), "nope"),
    ((*PUBLISH, "--model", "full"), "full"),
    (("publish", "nope", *PUBLISH[2:]), "nope"),
    (("publish", "full", *PUBLISH[2:]), "neither"),
    (("publish", "cut", *PUBLISH[2:], "--model", "emoji"), "cut"),
    (("publish", "other-model", *PUBLISH[2:], "--model", "emoji"), "base model"),
    # Services and many images.
    ((*TRITON[:-1], "full"), "full"),
    ((*TRITON[:-1], "file.txt"), "file.txt"),
    ((*TRITON, "--name", "a/b"), "--name"),
    ((*TRITON, "--backend", "rtx"), "--backend"),
    ((*TRITON, "--instances", "0"), "--instances"),
    (("triton", "nope", *TRITON[2:]), "nope"),
    ((*BULK, "--replicas", "3"), "--ray"),
    ((*BULK, "--backend", "nope"), "nope"),
    ((*BULK, "--shard-size", "0"), "--shard-size"),
    ((*BULK, "--column", "name"), "--column"),
    ((*BULK, "--seed", "-1"), "seed"),
    ((*BULK, "--c2pa", "nope.pem"), "nope.pem"),
    ((*BULK, "--checker", "os:abort"), "--allow-code"),
    ((*BULK, "--checker", "nope:dark", "--allow-code"), "No module named 'nope'"),
    ((*BULK[:-1], "file.txt"), "file.txt"),
    ((*BULK[:-1], "full"), "full"),
    (("bulk", "nope", *BULK[2:]), "nope"),
    (("bulk", "emoji", "file.txt", *BULK[3:]), "file.txt"),
    (("serve", "nope"), "nope"),
    (("serve", "full"), "full"),
    (("serve", "emoji", "emoji"), "emoji"),
    ((*SERVE, "--backend", "nope"), "nope"),
    ((*SERVE, "--batch", "0"), "batch"),
    ((*SERVE, "--queue", "0"), "queue"),
    ((*SERVE, "--time-limit", "-1"), "time"),
    ((*SERVE, "--replicas", "2"), "--ray"),
    ((*SERVE, "--api-keys", "nope"), "nope"),
    ((*SERVE, "--api-keys", "empty.txt"), "key"),
    ((*SERVE, "--c2pa", "nope.pem"), "nope.pem"),
    ((*SERVE, "--checker", "os:abort"), "--allow-code"),
    ((*SERVE, "--checker", "os", "--allow-code"), "MODULE:FUNCTION"),
    ((*SERVE, "--checker", "nope:dark", "--allow-code"), "No module named 'nope'"),
    ((*SERVE, "--checker", "os:nope", "--allow-code"), "no attribute 'nope'"),
    ((*SERVE, "--checker", "os:sep", "--allow-code"), "Expected a function"),
    ((*SERVE, "--checker", "os:abort", "--allow-code"), "one argument"),
    ((*SERVE[:-1], str(10**8)), "port"),
    # Reports, questions, marks.
    (("profile", "compare", "nope.json", "nope.json"), "nope.json"),
    (("profile", "compare", "file.txt", "file.txt"), "file.txt"),
    (("profile", "compare", "file.txt", "file.txt", "--threshold", "x"), "threshold"),
    (("profile", "compare", "a.json", "b.json", "--json", "file.txt"), "a.json is missing"),
    (("profile", "table", "nope.json"), "nope.json"),
    (("init", "--device", "toaster"), "--device"),
    (("init", "--device", "cpu"), "--model"),
    ((*GENERATE, "--again", "file.txt"), "--again"),
    ((*GENERATE, "--refine", "5"), "refine"),
    ((*GENERATE, "--guidance", "3"), "--guidance"),
    ((*GENERATE, "--format", "webp", "--out", "a.png"), "--format"),
    ((*GENERATE, "--quality", "0", "--out", "a.jpg"), "quality"),
    ((*GENERATE, "--c2pa", "nope.pem"), "nope.pem"),
    ((*GENERATE, "--checker", "os:abort"), "--allow-code"),
    ((*GENERATE, "--checker", "", "--allow-code"), "MODULE:FUNCTION"),
    ((*GENERATE, "--checker", "../x:f", "--allow-code"), "MODULE:FUNCTION"),
    (("edit", "editor", "photo.png", "x", "--checker", "os:abort"), "--allow-code"),
    (("upscale", "upscaler", "photo.png", "--checker", "os:abort"), "--allow-code"),
    (("control", "controlled", "photo.png", "x", "--checker", "os:abort"), "--allow-code"),
    ((*EXPORT, "--mark", "nope"), "--mark"),
    ((*EXPORT, "--sign", "nope"), "nope"),
    ((*EXPORT, "--sign", "file.txt"), "file.txt"),
    ((*EXPORT, "--with-teacher"), "--adaptor"),
    ((*EXPORT, "--reference-prompts", "nope.txt"), "nope.txt"),
    ((*EXPORT_ADAPTED, "--with-teacher", "--fuse"), "--fuse"),
    ((*BUILD, "--without-remedy", "nope"), "nope"),
    (("doctor", "--bisect"), "--bisect"),
    (("doctor", "emoji", "--bisect"), "--bisect"),
    (("doctor", "--out", "a.md"), "--self-test"),
]
# Mistakes that each of the three commands with a model can be given.
for command in MODEL_COMMANDS.values():
    model = command if "--model" not in command else command[:1] + command[3:]
    CASES += [
        ((*model, "--model", "nope"), "nope"),
        ((*model, "--model", ""), "the name of the model is empty"),
        ((*model, "--model", "nets/v1.ckpt"), "nets/v1.ckpt does not exist"),
        ((*model, "--model", "file.txt"), "file.txt"),
        ((*model, "--model", "full"), "full"),
        ((*model, "--model", "emoji-adaptor"), "holds a LoRA, not a model"),
        ((*command, "--config", "sd15"), "--config"),
        ((*command, "--vae", "nope"), "--vae nope does not exist"),
        ((*command, "--vae", ""), "--vae is empty"),
        ((*command, "--vae", "file.txt"), "file.txt"),
        ((*command, "--vae", "full"), "no config.json"),
        ((*command, "--vae", f"cut/{WEIGHTS}"), "cut"),
        ((*command, "--vae", f"emoji-adaptor/{WEIGHTS}"), "holds no VAE"),
        ((*command, "--lora", "nope.safetensors"), "nope.safetensors"),
        ((*command, "--lora", f"cut/{WEIGHTS}"), "cut"),
        ((*command, "--lora", f"not-finite/{WEIGHTS}"), "NaN"),
        ((*command, "--lora", f"emoji-adaptor/{WEIGHTS}:nan"), "finite"),
        ((*command, "--lora", f"emoji-adaptor/{WEIGHTS}:x"), "does not exist"),
        ((*command, "--lora", "file.txt"), "file.txt"),
        ((*command, "--lora", "full"), "full"),
        ((*command, "--lora", f"foreign-layer/{WEIGHTS}"), "layer"),
        ((*command, "--lora", f"half-a-pair/{WEIGHTS}"), "lora"),
        ((*command, "--embedding", "nope.safetensors"), "nope.safetensors"),
        ((*command, "--embedding", "file.txt"), "file.txt"),
        ((*command, "--embedding", f"cut/{WEIGHTS}"), "cut"),
        ((*command, "--prompts", "nope.txt"), "nope.txt"),
        ((*command, "--prompts", "empty.txt"), "empty"),
        ((*command, "--prompts", "utf16.txt"), "UTF-16"),
        ((*command, "--prompts", "zero.txt"), "zero byte"),
        ((*command, "--prompts", "/dev/zero"), "/dev/zero"),
        ((*command, "--prompts", "fifo"), "fifo"),
        ((*command, "--prompts", "full"), "full"),
        ((*command, "--prompts", "loop"), "loop"),
        ((*command, "--prompts", "sparse"), "sparse"),
        ((*command, "--prompts", "one-line"), "one-line"),
        ((*command, "--prompts", "columns.csv"), "columns.csv"),
        ((*command, "--prompts", "lines.jsonl"), ".jsonl"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is wrong in the cases."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine\n")
    (folder / "file.txt").write_text("mine\n")
    (folder / "file.toml").write_text("steps = [\n")
    (folder / "image.png").write_bytes(b"mine")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    Image.new("RGB", (640, 640)).save(folder / "photo.png")
    _write_prompts(folder)
    _write_adaptors(folder)
    _write_decoders(folder)
    for task in ("edit", "upscale", "control"):
        name = {"edit": "editor", "upscale": "upscaler", "control": "controlled"}[task]
        _bundle_for(task, folder / name)
    _write_controlnets(folder)
    return folder


def _write_controlnets(folder: Path) -> None:
    """Folders with a configuration and a weight: enough for checks of the request."""
    unet = json.loads((MODEL / "unet/config.json").read_text())
    fitting = {
        "_class_name": "ControlNetModel",
        "block_out_channels": unet["block_out_channels"],
        "cross_attention_dim": unet["cross_attention_dim"],
        "layers_per_block": unet["layers_per_block"],
    }
    configs = {
        "of-emoji": fitting,
        "of-sd15": {"_class_name": "ControlNetModel"},
        "union": {"_class_name": "ControlNetUnionModel"},
        "four-channels": fitting | {"conditioning_channels": 4},
        "other-factor": fitting | {"conditioning_embedding_out_channels": [16, 32, 96]},
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        weights = folder / name / "diffusion_pytorch_model.safetensors"
        save_file({"conv_in.weight": np.zeros(1, np.float32)}, weights)


def _write_prompts(folder: Path) -> None:
    (folder / "empty.txt").write_text("\n\n")
    (folder / "utf16.txt").write_text("a boat\n", encoding="utf-16")
    (folder / "zero.txt").write_text("a boat\na \0 bridge\n")
    (folder / "columns.csv").write_text("name,size\nboat,3\n")
    (folder / "lines.jsonl").write_text('{"text": "a boat"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a boat"]}), folder / "rows.parquet")
    (folder / "one-line").write_text("a boat " * 10_000)
    with (folder / "sparse").open("wb") as file:
        file.truncate(40 * 10**9)
    recipe = (Path(__file__).parents[2] / "train/recipes/emoji-edit.toml").read_text()
    (folder / "no-images.toml").write_text(
        recipe.replace("[source]", '[source]\nimages = "nowhere"')
    )
    recipe = (Path(__file__).parents[2] / "train/recipes/emoji.toml").read_text()
    (folder / "code.toml").write_text(recipe.replace("[loss]", '[loss]\nbackbone = "os:abort"'))


def _write_adaptors(folder: Path) -> None:
    """Copies of the embedded adaptor, each with one fault."""
    for name in (
        "emoji-adaptor", "no-metadata", "no-weights", "cut-metadata", "cut", "not-finite",
        "half-a-pair", "foreign-layer", "other-shape", "other-model", "other-rank",
    ):  # fmt: skip
        shutil.copytree(ADAPTOR, folder / name)
    (folder / "no-metadata/hipa_adaptor.json").unlink()
    (folder / f"no-metadata/{WEIGHTS}").unlink()
    (folder / f"no-weights/{WEIGHTS}").unlink()
    os.truncate(folder / "cut-metadata/hipa_adaptor.json", 100)
    os.truncate(folder / f"cut/{WEIGHTS}", 1000)
    tensors = load_file(ADAPTOR / WEIGHTS)
    down = next(name for name in tensors if ".lora_A." in name)
    up = down.replace("lora_A", "lora_B")

    def save(name: str, changed: dict[str, np.ndarray]) -> None:
        save_file(changed, folder / name / WEIGHTS)

    save("not-finite", tensors | {down: np.full_like(tensors[down], np.nan)})
    save("half-a-pair", {name: value for name, value in tensors.items() if name != down})
    # Shapes that belong together, in a layer that the model does not have.
    foreign = {"unet.attic.lora_A.weight": tensors[down], "unet.attic.lora_B.weight": tensors[up]}
    save("foreign-layer", tensors | foreign)
    wide = np.concatenate([tensors[down], tensors[down]], axis=1)
    save("other-shape", tensors | {down: wide})
    halved = {}
    for name, value in tensors.items():
        halved[name] = value[: len(value) // 2].copy() if ".lora_A." in name else _half(value)
    save("other-rank", halved)
    _edit(folder / "other-model/hipa_adaptor.json", base_unet_sha256="0" * 64)
    _edit(folder / "other-rank/hipa_adaptor.json", rank=tensors[down].shape[0] // 2)


def _half(value: np.ndarray) -> np.ndarray:
    return value[:, : value.shape[1] // 2].copy()


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _write_decoders(folder: Path) -> None:
    for name in ("other-decoder", "cut-decoder", "not-finite-decoder"):
        shutil.copytree(DECODER, folder / name)
    _edit(folder / "other-decoder/hipa_decoder.json", base_vae_sha256="0" * 64)
    weights = "diffusion_pytorch_model.safetensors"
    os.truncate(folder / f"cut-decoder/{weights}", 1000)
    tensors = load_file(folder / f"not-finite-decoder/{weights}")
    name = next(iter(tensors))
    save_file(
        tensors | {name: np.full_like(tensors[name], np.inf)},
        folder / f"not-finite-decoder/{weights}",
    )


def _bundle_for(task: str, folder: Path) -> None:
    """The embedded bundle with another task in its manifest: enough for checks of the request."""
    shutil.copytree(BUNDLE, folder)
    manifest = folder / "hipa.json"
    content = json.loads(manifest.read_text())
    content["task"] = task
    if task == "upscale":
        content["upscale"] = 4
    elif task == "control":
        content["control"] = {"name": "edges", "sha256": "0" * 64}
    else:
        content["strengths"] = [{"strength": 0.75, "timestep": 749, "alpha_bar": 0.03}]
    manifest.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("words", "said"),
    CASES,
    ids=lambda value: " ".join(value)[:80] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_said_at_once(
    words: tuple[str, ...], said: str, folder: Path, worker: Worker
) -> None:
    outcome = worker.run(folder, words, forbidden=HEAVY)
    assert outcome.fault is None
    assert outcome.code == 1, "it was accepted"
    assert said.lower() in outcome.printed.lower()
    assert outcome.cpu_seconds < CPU_SECONDS
