"""What the device can do at most: products of two square matrices by dtype and size, and copies by size.

    python benchmarks/peak.py                       # a GPU where there is one, else the CPU; half a minute
    python benchmarks/peak.py --largest 16384 --copy-mb 4096

Products: operations a second of the fastest of several, random operands, torch's present settings. Copies: bytes read
and written a second, within the device; on a GPU also from the host's memory, pinned and pageable, bytes moved once.
The peak that a run's log lines refer to is the search of ijepa_ds.hardware.peak_flops, given here beside the sweep.
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import torch

from ijepa_ds.distributed import share_cpu_threads
from ijepa_ds.hardware import peak_flops, product_flops

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print two tables, return the record."""
    options = parse(arguments)
    share_cpu_threads()
    print(measure.first_paragraph(__doc__))
    products = measure_products(options)
    copies = measure_copies(options)
    names = [name for name in products[0] if name != "size"]
    print("\nTFLOP/s of a product\n" + measure.table([list(row.values()) for row in products], ["size", *names]))
    print("\nGB/s\n" + measure.table([list(row.values()) for row in copies], list(copies[0])))
    peaks = {str(dtype).removeprefix("torch."): peak_flops(options.device, dtype) / 1e12 for dtype in DTYPES}
    print("\npeak of the log lines, TFLOP/s: " + ", ".join(f"{name} {peak:.3g}" for name, peak in peaks.items()))
    results = {"product_tflops": products, "copy_gb_per_second": copies, "peak_tflops": peaks}
    result = measure.record(results, compared=__doc__, device=options.device)
    measure.save(result, options.json)
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The sizes of what is measured."""
    parser = measure.parser(__doc__)
    parser.add_argument("--smallest", type=int, default=256, help="rows and columns")
    parser.add_argument("--largest", type=int, help="rows and columns (default: 16384 on a GPU, 2048 on a CPU)")
    parser.add_argument("--copy-mb", type=float, help="largest copy (default: 2048 on a GPU, 256 on a CPU)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each size and dtype")
    options = parser.parse_args(arguments)
    gpu = options.device.type == "cuda"
    options.largest = options.largest or (16384 if gpu else 2048)
    options.copy_mb = options.copy_mb or (2048 if gpu else 256)
    return options


def measure_products(options: argparse.Namespace) -> list[dict[str, Any]]:
    """TFLOP/s by size and dtype; a dtype that is ten times slower than fp32 is not tried on larger matrices."""
    rows: list[dict[str, Any]] = []
    slow: set[torch.dtype] = set()
    size = options.smallest
    while size <= options.largest:
        rates = {
            dtype: product_flops(size, options.device, dtype, seconds=options.seconds) / 1e12
            for dtype in DTYPES
            if dtype not in slow
        }
        slow |= {dtype for dtype, rate in rates.items() if rate < rates[torch.float32] / 10}
        rows.append({"size": size, **{str(dtype).removeprefix("torch."): rates.get(dtype) for dtype in DTYPES}})
        size *= 2
    return rows


def measure_copies(options: argparse.Namespace) -> list[dict[str, Any]]:
    """GB/s by size."""
    rows = []
    megabytes = options.copy_mb
    while megabytes >= min(16, options.copy_mb):
        rows.append({"MB": megabytes, **copy_rates(int(megabytes * 1e6), options.device, options.seconds)})
        megabytes /= 4
    return rows[::-1]


def copy_rates(size: int, device: torch.device, seconds: float) -> dict[str, float]:
    """GB/s of copying ``size`` bytes: within the device, and to it from the host."""
    source = torch.ones(size // 4, device=device)
    copies = {"device, read and written": (torch.empty_like(source), source, 2 * size)}
    if device.type == "cuda":
        for name, pinned in (("from the host, pinned", True), ("from the host, pageable", False)):
            copies[name] = (source, torch.ones(size // 4, pin_memory=pinned), size)
    rates = {}
    for name, (target, values, moved) in copies.items():
        once = measure.seconds_of(lambda to=target, of=values: to.copy_(of, non_blocking=True), device)
        rounds = max(3, min(100, int(seconds / max(once, 1e-6))))
        taken = measure.in_turns(
            {name: lambda to=target, of=values: to.copy_(of, non_blocking=True)}, rounds=rounds, device=device
        )
        rates[name] = moved / min(taken[name]) / 1e9
    return rates


if __name__ == "__main__":
    main()
