"""How well a draft foretells the base model's own image of the same prompt and noise.

Purpose: for prompts that nobody trained on, the distance of each draft to its own final image,
beside its distances to the finals of other seeds and of other prompts; and how often its own final
is the nearest of all.

Commands, from the repository's root::

    hipa-export --model emoji --adaptor emoji --with-teacher --out /tmp/refine-bundle
    python benchmarks/refine.py /tmp/refine-bundle --out refine.json

Expected time: about 6 minutes for 72 prompts with 4 seeds on one AVX-512 core.

Two distances: the root mean square over pixels, in levels of 0 to 255; and 1 - cosine of
EfficientNet-Lite0's features, which says more of what is shown and less of where.

Shapes: N images, D features, P prompts, S seeds, N = P S.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from hipa_deploy.embedded import MODEL
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.train.evaluation.quality import lite0_features

HELD_OUT = ("prompts_pair.txt", "prompts_concept.txt")
FIRST_SEED = 500  # far from the seeds of reports and samples


def held_out_prompts(count: int) -> list[str]:
    """``count`` of the embedded model's held-out prompts, evenly spaced."""
    prompts: list[str] = []
    for name in HELD_OUT:
        prompts += (MODEL / name).read_text(encoding="utf-8").splitlines()
    places = np.linspace(0, len(prompts) - 1, count).round().astype(int)
    return [prompts[place] for place in dict.fromkeys(places.tolist())]


def pixel_distances(drafts_NHWC: np.ndarray, finals_NHWC: np.ndarray) -> np.ndarray:
    """Root mean square differences [N, N], a row a draft, in levels of 0 to 255."""
    rows = []
    finals_ND = finals_NHWC.reshape(len(finals_NHWC), -1).astype(np.float32)
    for draft_D in drafts_NHWC.reshape(len(drafts_NHWC), -1).astype(np.float32):
        rows.append(np.sqrt(np.square(finals_ND - draft_D).mean(axis=1)))
    return np.stack(rows)


def feature_distances(drafts_NHWC: np.ndarray, finals_NHWC: np.ndarray) -> np.ndarray:
    """1 - cosine of Lite0's features [N, N], a row a draft."""
    units = []
    for images_NHWC in (drafts_NHWC, finals_NHWC):
        features_ND = np.asarray(lite0_features(images_NHWC), np.float64)
        units.append(features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True))
    return np.asarray(1 - units[0] @ units[1].T)


def spread(values: np.ndarray) -> dict[str, float]:
    """The median of some distances, and the middle half of them."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "p25": float(low), "p75": float(high)}


def foretelling(distances_NN: np.ndarray, seeds: int) -> dict[str, Any]:
    """What the distances of drafts to finals say.

    Args:
        distances_NN: a row a draft; the seeds of a prompt are neighbours.
        seeds: of each prompt.

    """
    count = len(distances_NN)
    prompt_N = np.arange(count) // seeds
    is_own = np.eye(count, dtype=bool)
    same_prompt = prompt_N[:, None] == prompt_N[None]
    own_N = np.diag(distances_NN)
    other_seed = distances_NN[same_prompt & ~is_own].reshape(count, seeds - 1)
    rank_N = 1 + (distances_NN < own_N[:, None]).sum(axis=1)
    return {
        "own": spread(own_N),
        "other_seed": spread(other_seed),
        "other_prompt": spread(distances_NN[~same_prompt]),
        "nearest_of_all": float((rank_N == 1).mean()),
        "in_nearest_5": float((rank_N <= 5).mean()),
        "median_rank": float(np.median(rank_N)),
        "nearest_of_its_prompt": float((own_N[:, None] < other_seed).all(axis=1).mean()),
    }


def between_seeds(distances_NN: np.ndarray, seeds: int) -> dict[str, float]:
    """The spread of the distances between images of one prompt, each to the other seeds'."""
    place_N = np.arange(len(distances_NN))
    same_prompt = place_N[:, None] // seeds == place_N[None] // seeds
    return spread(distances_NN[same_prompt & ~np.eye(len(place_N), dtype=bool)])


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle exported with --with-teacher.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 72,
    seeds: Annotated[int, typer.Option(help="Seeds of each prompt.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Steps; the teacher's by default.")] = None,
) -> None:
    """Measure how well drafts foretell final images."""
    console = Console(stderr=True)
    texts = held_out_prompts(prompts)
    drafts = []
    finals = []
    seconds = {"draft": 0.0, "final": 0.0}
    with OneStepPipeline.load(bundle, "onnxruntime") as pipe:
        for text in track(texts, console=console):
            started = time.perf_counter()
            draft = pipe(text, seed=FIRST_SEED, count=seeds)
            drafted = time.perf_counter()
            final = pipe.refine(draft, steps)
            seconds["draft"] += drafted - started
            seconds["final"] += time.perf_counter() - drafted
            drafts.append(draft.images_BHWC)
            finals.append(final.images_BHWC)
    drafts_NHWC = np.concatenate(drafts)
    finals_NHWC = np.concatenate(finals)
    report = {
        "prompts": len(texts),
        "seeds": seeds,
        "refine": final.parameters[0]["refine"],
        "milliseconds": {name: 1000 * t / len(drafts_NHWC) for name, t in seconds.items()},
    }
    for name, distances in (("pixels", pixel_distances), ("features", feature_distances)):
        report[name] = {
            **foretelling(distances(drafts_NHWC, finals_NHWC), seeds),
            "finals_of_a_prompt": between_seeds(distances(finals_NHWC, finals_NHWC), seeds),
            "drafts_of_a_prompt": between_seeds(distances(drafts_NHWC, drafts_NHWC), seeds),
        }
    text = json.dumps(report, indent=2) + "\n"
    out.write_text(text, encoding="utf-8")
    console.print(text, highlight=False)


if __name__ == "__main__":
    typer.run(main)
