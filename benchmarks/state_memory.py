"""Bytes that each process of a run keeps from one step to the next, over numbers of processes: counted, not computed.

    python benchmarks/state_memory.py --json state_memory.json          # ZeRO 2 on 1, 2, 4, 8, 16 processes
    python benchmarks/state_memory.py --stages 4 --ranks 4 8 16         # as 4 pipeline stages

Real processes on CPUs take two steps with an image each; then the memory behind every tensor that is still alive is
summed: bf16 weights, fp32 masters and Adam's moments, the target encoder's average and its cast, and with stages the
fp32 sums of gradients. ZeRO 2's gradients, with activations, are gone by then: at its highest a process also holds its
slice of them (4 bytes a parameter over the number of processes) and what first_gpu_hour.py measures.
"""

from __future__ import annotations

import gc
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  # here, so that the processes need not import it one by one
import measure
import torch
import torch.multiprocessing
from workload import batch_of, config_of

from ijepa_ds.config import Config
from ijepa_ds.engine.zero import init_distributed
from ijepa_ds.method.schedules import Hyperparameters
from ijepa_ds.train import build_trainable

STEPS = 2
NOW = Hyperparameters(lr=1e-4, weight_decay=0.05, momentum=0.99)


def configuration(model: str, ranks: int, stages: int) -> Config:
    """An image a process and step; where one would wait for the other does not matter here."""
    zero = {"stage": 1 if stages > 1 else 2, "reduce_bucket_size": 10**6}
    changes = {"train_batch_size": ranks, "train_micro_batch_size_per_gpu": stages, "zero_optimization": zero}
    pipeline = {"stages": stages, "largest_bubble": 1}
    return config_of(model, bf16={"enabled": True}, ijepa__pipeline=pipeline, **changes)


def one_rank(rank: int, model: str, ranks: int, stages: int, port: int, folder: str) -> None:
    """A process: its steps, then what it keeps, to a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    config = configuration(model, ranks, stages)
    process = init_distributed()
    trainable = build_trainable(config, process)
    for step in range(STEPS):
        trainable.step(iter([batch_of(config, step=step, device=process.device, size=1)]), NOW)
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    tensors = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    state = sum(values.numel() * 4 for slices in trainable.state().slices.values() for _, values in slices)
    parameters = sum(trainable.num_parameters.values())
    torch.save((sum(storages.values()), state, parameters), Path(folder) / f"{rank}.pt")


def measured(model: str, ranks: int, stages: int) -> dict[str, Any]:
    """One number of processes."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        arguments = (model, ranks, stages, port, folder)
        torch.multiprocessing.start_processes(one_rank, arguments, nprocs=ranks, start_method="fork")
        told = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    kept, state = [one[0] for one in told], [one[1] for one in told]
    return {
        "processes": ranks,
        "stages": stages,
        "parameters": told[0][2],
        "kept_mb": {"most": max(kept) / 1e6, "least": min(kept) / 1e6},
        "sharded_state_mb": {"most": max(state) / 1e6, "least": min(state) / 1e6, "together": sum(state) / 1e6},
        "bytes_a_parameter": max(kept) / told[0][2],
    }


def main() -> None:
    """Measure as the command line says, print a table, write JSON."""
    parser = measure.parser(__doc__)
    parser.add_argument("--model", default="vits16_single_gpu", help="a file of ds_configs/, or tiny")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--stages", type=int, default=1)
    options = parser.parse_args()
    results = [measured(options.model, ranks, options.stages) for ranks in options.ranks]
    rows = [
        [
            one["processes"],
            one["kept_mb"]["most"],
            one["kept_mb"]["least"],
            one["sharded_state_mb"]["most"],
            one["sharded_state_mb"]["together"],
            one["bytes_a_parameter"],
        ]
        for one in results
    ]
    heads = ["processes", "kept, MB: most", "least", "of it fp32 state: most", "of all processes", "bytes a parameter"]
    print(measure.table(rows, heads))
    measure.save(measure.record(results, compared=__doc__, device=torch.device("cpu")), options.json)


if __name__ == "__main__":
    main()
