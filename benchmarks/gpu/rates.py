"""The card's own rates: matrix products and copies, as PyTorch reaches them.

They are what the other figures are compared with: a data sheet's peak is reached by no program.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.job import Job

MATMUL = "matrix product"
COPY = "copy on the device"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Products in a query: a query then takes milliseconds, and the wait after it is a small part.
REPEATS = 8


def run(job: Job) -> None:
    """Measure the rates, those of the roofline first."""
    size = 64 if job.tiny else 8192
    mib = 4 if job.tiny else 2048
    cases = [
        (f"{MATMUL}, fp16", lambda: _matmul(job, "fp16", size)),
        (COPY, lambda: _copy(job, COPY, mib, job.device, job.device)),
        (f"{MATMUL}, tf32", lambda: _matmul(job, "tf32", size)),
        (f"{MATMUL}, bf16", lambda: _matmul(job, "bf16", size)),
        (f"{MATMUL}, fp32", lambda: _matmul(job, "fp32", size)),
    ]
    to_device = "copy from the host"
    from_device = "copy to the host"
    if job.on_gpu:
        cases.append((to_device, lambda: _copy(job, to_device, 256, "cpu", job.device)))
        cases.append((from_device, lambda: _copy(job, from_device, 256, job.device, "cpu")))
    job.file.plan([name for name, _ in cases])
    if not job.on_gpu:
        # No CPU has TF32; the case would be the FP32 one under another name.
        job.file.leave_out(f"{MATMUL}, tf32", "a CPU has no TF32")
    for name, case in cases:
        if job.on_gpu or "tf32" not in name:
            job.file.attempt(name, case, least_seconds=job.effort.least_case)


def _matmul(job: Job, precision: str, size: int) -> Figure:
    """Products of two square matrices [size, size]; a multiplication and an addition are two."""
    dtype = DTYPES.get(precision, torch.float32)
    left = torch.randn(size, size, device=job.device, dtype=dtype)
    right = torch.randn(size, size, device=job.device, dtype=dtype)
    out = torch.empty_like(left)

    def query(number: int) -> None:
        for _ in range(REPEATS):
            torch.mm(left, right, out=out)

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        stats, validity = job.time_call(query)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    flops = REPEATS * 2 * size**3
    return Figure(
        name=f"{MATMUL}, {precision}",
        model=f"{size} x {size}",
        workload=MATMUL,
        engine="PyTorch",
        precision=precision,
        batch=REPEATS,
        unit="TFLOP/s",
        per_second=flops / stats.p50_ms / 1e9,
        stats=stats,
        validity=validity,
    )


def _copy(job: Job, name: str, mib: int, source: str, target: str) -> Figure:
    """Copies of ``mib`` MiB; a copy on the device reads and writes, which counts as twice."""
    size = mib * 2**20
    same = source == target
    read = torch.zeros(size, dtype=torch.uint8, device=source)
    written = torch.zeros(size, dtype=torch.uint8, device=target)
    if job.on_gpu and not same:
        read = read.pin_memory() if source == "cpu" else read
        written = written.pin_memory() if target == "cpu" else written

    stats, validity = job.time_call(lambda number: written.copy_(read, non_blocking=True))
    moved = size * (2 if same else 1)
    return Figure(
        name=name,
        model=f"{mib} MiB",
        workload=name,
        engine="PyTorch",
        precision="bytes",
        batch=1,
        unit="GB/s",
        per_second=moved / stats.p50_ms / 1e6,
        stats=stats,
        validity=validity,
    )
