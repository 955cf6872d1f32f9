"""Measure the latency of two bundles and say whether one is slower by more than chance.

Needs:   pip install 'hipa-deploy[export]', because the second bundle is exported first; measuring
         needs the core install alone.
Run:     python examples/07_compare_latency.py --runs 50
Expect:  full.json and tiny.json, two latency reports, and a table: the bundle with the model's own
         decoder beside one with a tiny decoder, which is faster.
"""

import argparse
from pathlib import Path

from rich.console import Console

from hipa_deploy import OneStepPipeline, embedded
from hipa_deploy.engines.latency.compare import compare_reports, render_comparison
from hipa_deploy.engines.latency.measure import profile_pipeline
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--runs", type=int, default=50, help="timed runs of each bundle, 10 or more")
runs = parser.parse_args().runs

# On the command line: hipa-export --model emoji --adaptor emoji --decoder tiny --out tiny-bundle
tiny = Path("tiny-bundle")
if not tiny.exists():
    export_bundle(
        ExportOptions(model="emoji", adaptor=embedded.ADAPTOR, decoder=embedded.DECODER, out=tiny)
    )

reports = {}
for name, bundle in (("full", "emoji"), ("tiny", tiny)):
    with OneStepPipeline.load(bundle, backend="onnxruntime") as pipe:
        reports[name] = profile_pipeline(pipe, runs=runs)
    # The same file as hipa-profile --json writes, with the conditions of the measurement.
    Path(f"{name}.json").write_text(
        reports[name].model_dump_json(indent=2) + "\n", encoding="utf-8"
    )

# 'slower' and 'faster' need a change past 5 % and a confidence interval that excludes no change.
comparison = compare_reports(reports["full"], reports["tiny"], threshold_percent=5)
Console(width=120).print(render_comparison(comparison))
decoder = comparison.rows["vae_decoder"]
print(f"tiny decoder: {decoder.ratio:.2f} times the full decoder's time, {decoder.verdict}")
