"""Before the first step: every shape of micro-batch that a run will meet, compiled and tried, the largest first.

A cold cache takes minutes: here no process waits in a collective of the devices, whose patience is ten. And what the
largest micro-batch needs beside weights and moments is needed here, not after thousands of steps.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_ds.distributed import Process, patiently
from ijepa_ds.engine.trainable import ShardedTrainable
from ijepa_ds.errors import UserError
from ijepa_ds.method.compiled import compile_blocks
from ijepa_ds.progress import Progress

# Every process of a node compiles the same at the same time; the default is a worker for each core, for each of them.
COMPILE_THREADS = "4"


@dataclass(frozen=True)
class Shapes:
    """Of a run's micro-batches."""

    num_images: int
    image_size: tuple[int, int]
    context_tokens: int
    num_targets: int
    target_tokens: list[int]  # of each, the largest first
    contexts: int = 1  # of each image


@dataclass
class _Zeros:
    """A micro-batch of nothing, in the shapes, dtypes and strides of the loader's."""

    images: Tensor
    context_block: Tensor
    target_blocks: Tensor
    keys: Tensor | None


def compile_and_warm_up(
    trainable: ShardedTrainable, shapes: Shapes, process: Process, *, backend: Any = "inductor"
) -> None:
    """Compile the blocks for every shape; from then on a shape that is not among them runs uncompiled.

    Raises:
        UserError: the largest micro-batch does not fit into the device's memory, or torch cannot compile here.
    """
    _set_up_inductor()
    tokens = shapes.target_tokens
    if process.is_main:
        counts = ", ".join(map(str, tokens))
        print(f"compiling for target blocks of {counts} patches; a first run takes minutes", file=sys.stderr)
    target_encoder = trainable.target_encoder.encoder
    compile_blocks(trainable.module, target_encoder, num_shapes=len(tokens), backend=backend)
    warm_up(trainable, shapes, process)
    torch.compiler.set_stance("eager_on_recompile")


def warm_up(trainable: ShardedTrainable, shapes: Shapes, process: Process) -> None:
    """Forward and backward passes of a micro-batch of every shape, of which nothing remains.

    Raises:
        UserError: the largest micro-batch does not fit into the device's memory.
    """
    progress = Progress(len(shapes.target_tokens), what="shapes", name="warming up", enabled=process.is_main)
    with patiently("compiling or trying the shapes of its micro-batches", process):
        for done, target_tokens in enumerate(shapes.target_tokens, start=1):
            _try(trainable, shapes, target_tokens, process.device)
            progress.show(done, f"target blocks of {target_tokens} patches")
    progress.end(len(shapes.target_tokens))


def _try(trainable: ShardedTrainable, shapes: Shapes, target_tokens: int, device: torch.device) -> None:
    try:
        trainable.rehearse(_zeros(shapes, target_tokens, device))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{shapes.num_images} images at once, with target blocks of {target_tokens} patches, do not fit into "
            f"the device's memory; lower train_micro_batch_size_per_gpu ({' '.join(str(error).split())})"
        ) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"torch cannot compile the blocks here; set ijepa.compile to false ({reason})") from error


def _zeros(shapes: Shapes, target_tokens: int, device: torch.device) -> _Zeros:
    count, contexts = shapes.num_images, shapes.num_images * shapes.contexts
    return _Zeros(
        torch.zeros(count, *shapes.image_size, 3, dtype=torch.uint8, device=device),
        torch.zeros(contexts, shapes.context_tokens, dtype=torch.long, device=device),
        torch.zeros(shapes.num_targets, contexts, target_tokens, dtype=torch.long, device=device),
        torch.zeros(contexts, dtype=torch.long, device=device),
    )


def _set_up_inductor() -> None:
    """Where compiled code is kept and how many processes compile it, unless the environment says so already."""
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = COMPILE_THREADS
        import torch._inductor.config

        torch._inductor.config.compile_threads = int(COMPILE_THREADS)  # it may have read the environment before
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ijepa_ds" / "inductor"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # torch's default is a temporary folder
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
