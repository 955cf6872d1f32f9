"""The parts of a pipeline, each of which owns one thing; ``pipeline`` puts them together.

Requests become jobs (``job_maker``), and jobs become images (``batch_maker``), on stages that
calls share and a swap changes (``loaded_stages``). May import: what ``generate`` may, and
``generate.refine``.
"""
