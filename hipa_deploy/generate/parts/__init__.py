"""The parts of a pipeline, each of which owns one thing.

``job_maker`` makes jobs of requests, and ``batch_maker`` makes images of jobs, on the stages of
``loaded_stages``, which calls share and a swap changes. ``batch_pipeline`` puts them together.
May import: what ``generate`` may, and ``generate.refine``.
"""
