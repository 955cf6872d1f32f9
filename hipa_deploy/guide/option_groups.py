"""The groups in which the help of every command shows its options.

An option is in the same group wherever it occurs, so that one finds it again.
"""

from __future__ import annotations

HELP_GROUP = "Help"

_GROUPS = {
    "Model": (
        *("--model", "--config", "--vae", "--adaptor", "--adaptor-scale", "--from", "--lora"),
        *("--embedding", "--one-step", "--decoder", "--encoder", "--rival"),
        "--controlnet",
        "--with-teacher",
    ),
    "Prompts": (
        *("--prompts", "--context-tokens", "--clip-skip", "--truncate", "--prompt-weights"),
        *("--log-prompts", "--reference-prompts", "--column"),
    ),
    "Image": (
        *(
            "--task",
            "--strength",
            "--strengths",
            "--feather",
            "--match",
            "--overlap",
            "--scale",
            "--seed",
            "--count",
        ),
        *("--height", "--width", "--dynamic", "--batch", "--images", "--again"),
        *("--refine", "--guidance"),
    ),
    "Training": (
        *("--recipe", "--steps", "--held-out", "--patience", "--log-with"),
        *("--average", "--rank", "--gpus", "--quick"),
    ),
    "Precision and layout": ("--dtype", "--layout", "--fuse"),
    "Device": (
        *("--for", "--backend", "--build", "--target", "--workspace", "--tactic-dram"),
        *(
            "--optimization-level",
            "--timing-cache",
            "--refit",
            "--best-of",
            "--no-repair",
            "--without-remedy",
            "--cache",
            "--verify",
            "--low-memory",
            "--swap",
        ),
    ),
    "Measuring": (
        *("--runs", "--seconds", "--warmup", "--metric", "--threshold", "--layers", "--roofline"),
        *("--self-test", "--bisect", "--coco", "--year", "--inception", "--clip", "--captions"),
        *("--reference", "--resolution", "--clip-prefix", "--shard"),
    ),
    "Output": (
        *("--out", "--swap-for", "--json", "--html", "--markdown", "--dry-run", "--force"),
        *("--sign", "--name", "--shard-size", "--format", "--quality"),
    ),
    "Publishing": ("--repo", "--base-model", "--license", "--report", "--private"),
    "Network": ("--host", "--port", "--api-keys", "--allow-host", "--allow-origin"),
    "Limits": (
        *("--wait", "--queue", "--time-limit", "--prompt-limit", "--body-limit"),
        *("--pixel-limit", "--steps-limit"),
    ),
    "Several machines": (
        *("--ray", "--replicas", "--replica-cpus", "--replica-gpus", "--scale-at"),
        *("--instances", "--join", "--no-join"),
    ),
    "Marks": ("--mark", "--watermark", "--c2pa"),
    "Safety": ("--checker", "--allow-code"),
    HELP_GROUP: ("--help", "--version"),
}

GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
