"""What this machine computes fast: which processor it has, and whether bf16 is worth taking on it."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from pathlib import Path

import torch

_SIZE = 256  # rows and columns of the matrices that are multiplied: a third of a millisecond in fp32 on one core
_SECONDS = 0.1
_LEAST = 5  # products of each precision, however slow they are
_CLEARLY = 0.8  # bf16 must take less than this share of the time of fp32
_LARGEST = 8192  # rows and columns, in the search for the fastest product: 400 MB in bf16 with its result


def processor_name() -> str:
    """Name of the processor as the system gives it, or of its architecture where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor behind ``device``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


@functools.cache
def product_seconds() -> dict[torch.dtype, float]:
    """Median time of a product of two matrices on one core of the processor, in seconds, in bf16 and in fp32.

    Both are timed in turn for a tenth of a second: what a processor says of itself does not tell what the libraries
    make of it. One thread, so that the answer is the same in a process that has all cores and in one that shares them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exact = torch.ones(_SIZE, _SIZE)
        matrices = {dtype: exact.to(dtype) for dtype in (torch.bfloat16, torch.float32)}
        times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in matrices}
        for matrix in matrices.values():
            matrix @ matrix  # the first product prepares its kernel
        began = time.perf_counter()
        while time.perf_counter() - began < _SECONDS or len(times[torch.float32]) < _LEAST:
            for dtype, matrix in matrices.items():
                start = time.perf_counter()
                matrix @ matrix
                times[dtype].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {dtype: statistics.median(values) for dtype, values in times.items()}


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 computes clearly faster than fp32 on ``device``: GPUs since Ampere; a processor is timed."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    seconds = product_seconds()
    return seconds[torch.bfloat16] < _CLEARLY * seconds[torch.float32]


def why(device: torch.device) -> str:
    """What :func:`has_fast_bf16` judges by, for a sentence."""
    name = device_name(device)
    if device.type == "cuda":
        return f"{name} {'has' if has_fast_bf16(device) else 'lacks'} arithmetic for bf16"
    half, single = (1000 * product_seconds()[dtype] for dtype in (torch.bfloat16, torch.float32))
    return f"a product of {_SIZE} x {_SIZE} takes {half:.2g} ms in bf16 and {single:.2g} ms in fp32 on {name}"


def bf16_warning(enabled: bool, device: torch.device, *, cure: str) -> str | None:
    """One sentence with the cure where bf16 is ``enabled`` on a device that emulates it, else None."""
    if not enabled or has_fast_bf16(device):
        return None
    return f"bf16 is not faster than fp32 here: {why(device)}; {cure} computes in fp32"


def set_numerics(*, low_precision: bool, deterministic: bool) -> None:
    """Arithmetic of GPUs that would surprise is turned off: fp32 is fp32, and bf16 products are summed in fp32.

    Call it before the first use of a GPU.

    Args:
        low_precision: the run computes in bf16, so that convolutions of fp32 values may be rounded too.
        deterministic: only algorithms that give the same bits again; slower. An operation that has none raises.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # products split over K sum in bf16
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = low_precision  # on by default
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, for bugs


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest product of two square matrices, timed for about a tenth of a second.

    The matrices grow until one product takes a twentieth of that. What the device reaches under torch's present
    settings, not what its data sheet says.
    """
    size, best, rate = _SIZE, 0.0, 0.0
    while True:
        rate = product_flops(size, device, dtype, seconds=_SECONDS / 4)
        best = max(best, rate)
        if size == _LARGEST or 2 * size**3 / rate > _SECONDS / 20:
            return best
        size *= 2


def product_flops(size: int, device: torch.device, dtype: torch.dtype, *, seconds: float) -> float:
    """Operations a second of a product of two matrices of ``size`` x ``size``, the fastest of those within a time."""
    generator = torch.Generator(device).manual_seed(0)  # random, since zeros multiply faster on some devices
    matrix = torch.rand(size, size, device=device, generator=generator).sub_(0.5).to(dtype)
    result = matrix @ matrix  # the first product prepares its kernel
    _wait(device)
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.matmul(matrix, matrix, out=result)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
