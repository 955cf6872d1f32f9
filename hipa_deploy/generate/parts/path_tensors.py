"""Every tensor along the path of one batch, for checks and profiles of a single stage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np

from hipa_deploy.bundle.adaptor_swap import TEXT_STAGE, TEXT_STAGE_2
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.generate.jobs.image_job import ImageJob
from hipa_deploy.generate.parts.batch_maker import BatchMaker
from hipa_deploy.generate.parts.loaded_stages import LoadedStages
from hipa_deploy.generate.stages import Tensors, input_names, output_names, split_context


def path_tensors(
    bundle: Bundle, loaded: LoadedStages, maker: BatchMaker, jobs: Sequence[ImageJob]
) -> Tensors:
    """Every tensor of one batch by name; see ``OneStepPipeline.tensors``.

    Args:
        bundle: that the stages are of.
        loaded: the stages, all of which run.
        maker: starts the batch. It has made nothing yet, so nothing that it remembers is taken.
        jobs: of one prompt.

    """
    with loaded.shared() as now:
        feed = maker.text_feed(jobs, now.stages, nullcontext)
    feed |= maker.start(jobs)

    # Everything that a stage takes or gives, and that is not in the feed already.
    layout = bundle.manifest.layout
    names: list[str] = []
    for stage in bundle.manifest.stages:
        names += input_names(stage.spec, layout)
        names += output_names(stage.spec, layout)
    computed = []
    for name in dict.fromkeys([*names, "images"]):
        if name not in feed and name not in ("tokens", "tokens_2", "sizes"):
            computed.append(name)
    parts: Tensors = {}
    if TEXT_STAGE_2 in bundle.stages and "context" in feed:
        parts = split_context(feed["context"], bundle.manifest.text_widths)
        computed = [name for name in computed if name not in parts]
    with loaded.shared() as now:
        found = feed | parts | now.stages.run(feed, computed)
    # Of several images the text encoder was run by itself, so the tokens are not in the feed.
    if TEXT_STAGE in bundle.stages:
        for name, value in jobs[0].prepared.tensors().items():
            found.setdefault(name, np.repeat(value, len(jobs), axis=0))
    return found
