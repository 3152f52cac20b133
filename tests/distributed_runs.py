"""Real training runs and real gloo processes for the tests, on tiny data.

Importing the package takes 10 s of a core, so processes are forked from a server that has imported it once; only the
tests of the launchers start from nothing. Runs that several tests look at are made once (:func:`once`).
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
NUM_IMAGES = 67  # 4 steps of 16 images an epoch, three images left over
GLOBAL_BATCH = 16
PATIENCE = 1800.0  # seconds until something is taken to hang: a slow machine must not meet it
_PRELOADED = [
    "torch",
    "deepspeed",
    "ijepa_ds.train",
    "ijepa_ds.evaluation.command",
    "torch.utils.tensorboard",
    "deepspeed.runtime.zero.muon.original_muon",
]

if "IJEPA_DS_TESTS" in os.environ:  # in one of the processes started here
    FOLDER = Path(os.environ["IJEPA_DS_TESTS"])
else:
    FOLDER = Path(tempfile.mkdtemp(prefix="ijepa_ds_tests_"))
    atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def once(function: Callable) -> Callable:
    """Call it once for given arguments and remember what came of it, a failure too."""

    @functools.cache
    def outcome(*arguments: Any) -> tuple[Any, BaseException | None]:
        try:
            return function(*arguments), None
        except BaseException as error:
            return None, error

    @functools.wraps(function)
    def remembered(*arguments: Any) -> Any:
        result, error = outcome(*arguments)
        if error is not None:
            raise error
        return result

    return remembered


# ------------------------------------------------------------------------------------------------------ data, config


def write_beton(
    path: Path, *, num_images: int = NUM_IMAGES, size: int = 32, labels: bool = True, first: int = 0
) -> Path:
    """Raw images of four classes (colours), from number ``first`` on, with an integer ``label`` and a float ``depth``.

    In a process of its own: ffcv's writer forks.
    """
    _run_forked(_write_beton, path, _Images(num_images, size, labels, first))
    return path


@dataclass
class _Images:
    num_images: int
    size: int
    labels: bool
    first: int

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, position: int) -> tuple:
        index = self.first + position
        draw = np.random.default_rng(index)
        label = index % 4
        image = draw.integers(0, 128, (self.size, self.size, 3)) + 32 * np.array([label, 3 - label, label // 2])
        image[:, : self.size // 2] //= 1 + label
        return (image.astype(np.uint8), *((label, float(label) + float(draw.random())) if self.labels else ()))


def _write_beton(path: Path, images: _Images) -> None:
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="raw")}
    if images.labels:
        fields |= {"label": IntField(), "depth": FloatField()}
    writer = DatasetWriter(str(path), fields, num_workers=1)
    writer.from_indexed_dataset(images)


@once
def train_beton() -> Path:
    """The labelled training images of most tests."""
    return write_beton(FOLDER / "train.beton")


@once
def plain_beton() -> Path:
    """Images without labels."""
    return write_beton(FOLDER / "plain.beton", labels=False)


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A configuration as it would stand in a file; ``changes`` by dotted key, with ``__`` for the dot."""
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6},
        "ijepa": {
            "run": {"name": "tiny", "folder": str(FOLDER / "runs")},
            "data": {"train": str(FOLDER / "train.beton"), "image_size": 32, "workers": 1},
            "model": {
                "encoder": "tiny",
                "width": 32,
                "depth": 2,
                "heads": 2,
                "patch_size": 4,
                "predictor_width": 16,
                "predictor_depth": 2,
            },
            "optimization": {"epochs": 2, "warmup_epochs": 0.5, "momentum": [0.9, 1.0]},
            "monitor": {"log_steps": 1, "health_steps": 0, "picture_steps": 0, "knn_epochs": 0},
            "checkpoint": {"minutes": 0, "keep": 20},
        },
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return config


# ---------------------------------------------------------------------------------------------------------- processes


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command_environment() -> dict[str, str]:
    """Environment of a command as a user would start it, without what a launcher sets."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _start(function: Callable, arguments: tuple, environment: dict[str, str], output: Path) -> Any:
    """A forked process whose output goes to a file."""
    before = dict(os.environ)
    path = f"{ROOT}{os.pathsep}{TESTS}"
    # The server is started by the first process, with this environment.
    added = {"PYTHONPATH": path, "IJEPA_DS_TESTS": str(FOLDER), "TORCH_CPP_LOG_LEVEL": "ERROR"}  # the last as run.py
    os.environ.update({**command_environment(), **added})
    try:
        process = _server().Process(target=_child, args=(function, arguments, environment, str(output)))
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def _child(function: Callable, arguments: tuple, environment: dict[str, str], output: str) -> None:
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.setpgrp()
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        _leave(code or 0)
    _leave(0)


def _leave(code: int) -> None:
    """As an interpreter ends: exit handlers, then the streams. A forked process would skip the first."""
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def _run_forked(function: Callable, *arguments: Any) -> None:
    output = FOLDER / f"output_{time.monotonic_ns()}"
    process = _start(function, arguments, {}, output)
    process.join(PATIENCE)
    assert process.exitcode == 0, output.read_text()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher gives a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(function: Callable, world_size: int, *arguments: Any, timeout: float = PATIENCE) -> list[Any]:
    """Call ``function(*arguments)`` of a test file in ``world_size`` gloo processes; returns what each gave back."""
    out = FOLDER / f"ranks_{time.monotonic_ns()}"
    out.mkdir()
    port = free_port()
    processes = [
        _start(
            _call_and_save,
            (function, arguments, str(out / f"result_{rank}.pt")),
            rank_environment(rank, world_size, port),
            out / f"output_{rank}",
        )
        for rank in range(world_size)
    ]
    _wait(processes, timeout)
    failed = [f"rank {rank}:\n{(out / f'output_{rank}').read_text()[-3000:]}" for rank in _not_zero(processes)]
    assert not failed, "\n".join(failed)
    return [torch.load(out / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)]


def _call_and_save(function: Callable, arguments: tuple, path: str) -> None:
    torch.save(function(*arguments), path)


def _not_zero(processes: list[Any]) -> list[int]:
    return [rank for rank, process in enumerate(processes) if process.exitcode != 0]


def _wait(processes: list[Any], timeout: float) -> None:
    """Until all have ended. As DeepSpeed's launcher does, the first that fails ends the others."""
    end = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes):
        failed = any(process.exitcode not in (None, 0) for process in processes)
        if failed or time.monotonic() > end:
            time.sleep(0.5 if failed else 0)  # the others may be about to say why, too
            for process in processes:
                if process.exitcode is None:
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
            return
        time.sleep(0.02)


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass
class TrainingRun:
    """A training that has ended: ``exit_codes`` by rank (or the launcher's alone), what it printed, its folder."""

    exit_codes: list[int]
    output: str
    folder: Path

    @property
    def rows(self) -> list[dict]:
        """metrics.jsonl."""
        return read_rows(self.folder)

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [row["loss"] for row in self.rows]

    @property
    def checkpoints(self) -> list[str]:
        """Names in checkpoints/, unfinished ones included."""
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*"))


def read_rows(folder: Path) -> list[dict]:
    """The complete lines of a run's metrics.jsonl so far."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_config(config: dict[str, Any]) -> Path:
    """The config as a file."""
    path = FOLDER / f"config_{time.monotonic_ns()}.json"
    path.write_text(json.dumps(config))
    return path


def run_folder(config: dict[str, Any]) -> Path:
    """Where a config's run lives."""
    return Path(config["ijepa"]["run"]["folder"]) / config["ijepa"]["run"]["name"]


def run_training(
    config: dict[str, Any],
    num_processes: int = 1,
    *,
    prepare: Callable[[], None] | None = None,
    timeout: float = PATIENCE,
) -> TrainingRun:
    """Train in forked processes, as ``run.py`` would; ``prepare`` is called in each before, to patch something."""
    out = FOLDER / f"training_{time.monotonic_ns()}"
    out.mkdir()
    train_beton()
    port, path = free_port(), write_config(config)
    processes = [
        _start(
            _train,
            (str(path), prepare),
            rank_environment(rank, num_processes, port),
            out / str(rank),
        )
        for rank in range(num_processes)
    ]
    _wait(processes, timeout)
    output = "".join((out / str(rank)).read_text() for rank in range(num_processes))
    return TrainingRun([process.exitcode for process in processes], output, run_folder(config))


def _train(path: str, prepare: Callable[[], None] | None) -> None:
    from ijepa_ds.errors import run_command
    from ijepa_ds.train import main

    if prepare is not None:
        prepare()
    sys.argv = ["run.py", "--config", path]
    run_command(main)


def launch_training(
    config: dict[str, Any],
    num_processes: int | None,
    *,
    environment: dict[str, str] | None = None,
    timeout: float = PATIENCE,
) -> TrainingRun:
    """Train as a user does: ``deepspeed --num_gpus N run.py``, or ``python run.py`` where ``num_processes`` is None.

    ``environment`` is added to that of the command.
    """
    if config["ijepa"]["data"]["train"] == str(FOLDER / "train.beton"):
        train_beton()
    launcher = [sys.executable, str(ROOT / "run.py")]
    if num_processes is not None:
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        port = str(free_port())
        launcher = [deepspeed, "--num_gpus", str(num_processes), "--master_port", port, str(ROOT / "run.py")]
    process = subprocess.Popen(
        [*launcher, "--config", str(write_config(config))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**command_environment(), **(environment or {})},
        cwd=FOLDER,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a session of its own: the launcher and its ranks
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{output[-3000:]}") from None
    return TrainingRun([process.returncode], output, run_folder(config))


@once
def bare_run(world_size: int) -> TrainingRun:
    """The tiny configuration from start to end without kNN, health, pictures and checkpoints on the way."""
    return run_training(tiny_config(ijepa__run__name=f"bare_{world_size}"), world_size)


def run_command_forked(*arguments: object) -> tuple[int, str]:
    """``python -m ijepa_ds ARGUMENTS`` in a forked process: exit code and output."""
    output = FOLDER / f"output_{time.monotonic_ns()}"
    process = _start(_run_module, (list(map(str, arguments)),), {}, output)
    _wait([process], PATIENCE)
    return process.exitcode, output.read_text()


def _run_module(arguments: list[str]) -> None:
    import runpy

    sys.argv = ["ijepa_ds", *arguments]
    runpy.run_module("ijepa_ds", run_name="__main__", alter_sys=True)


def checkpoint_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, whole, by kind and name."""
    from ijepa_ds.engine.checkpoint_files import read_weights

    checkpoint = folder / "checkpoints" / f"step_{step:09d}"
    kinds = ("master", "exp_avg", "exp_avg_sq", "target")
    return {f"{kind}/{name}": t for kind in kinds for name, t in read_weights(checkpoint, kind).items()}


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Same names, bitwise the same values."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ: {different[:5]}"


# ------------------------------------------------------------------------------ engines in the processes of run_ranks


@dataclass
class Parts:
    """A trainable and its configuration, for made-up batches, so that nothing of FFCV has to be compiled."""

    config: Any
    process: Any
    exact: dict[str, torch.Tensor]  # the initial weights
    trainable: Any
    outcome: Any = None  # of the last step

    def adam_steps(self) -> set[float]:
        """What AdamW's counters say, in all groups."""
        return {float(counter) for counters in self.trainable.state().adam_steps.values() for counter in counters}

    def save(self, folder: Path, step: int, keep: int = 3) -> Path:
        """A checkpoint of the state."""
        from ijepa_ds.engine.checkpoint_writer import save

        return save(folder, step, self.trainable.state(), self.process, keep=keep)

    def load(self, checkpoint: Path) -> int:
        """The state of a checkpoint, published."""
        from ijepa_ds.engine.checkpoint import load

        step = load(checkpoint, self.trainable.state(), self.process)
        self.trainable.publish()
        return step


def build_parts(raw: dict[str, Any], *, plain: bool = False) -> Parts:
    """What ``ijepa_ds.train.train`` builds, without the loader; ``plain``: on plain torch instead of ZeRO."""
    from ijepa_ds.build import build_ijepa, build_target, working_dtype
    from ijepa_ds.config import parse_config
    from ijepa_ds.engine.plain import Plain
    from ijepa_ds.engine.zero import init_distributed
    from ijepa_ds.train import build_trainable

    config = parse_config(raw)
    process = init_distributed()
    exact = {name: parameter.detach().clone() for name, parameter in build_ijepa(config).named_parameters()}
    if plain:
        adam = {"betas": config.ijepa.optimization.betas, "eps": config.ijepa.optimization.eps}
        trainable = Plain(build_ijepa(config), build_target(config), to_input=lambda images: images, **adam)
    else:
        trainable = build_trainable(config, process)
    # Made-up images are normalised already.
    trainable.to_input = lambda images: images.to(working_dtype(config))
    return Parts(config, process, exact, trainable)


@dataclass
class MadeUpBatch:
    """What a trainable's step takes."""

    images: torch.Tensor
    context_block: torch.Tensor
    target_blocks: torch.Tensor
    keys: torch.Tensor | None = None


def made_up_batch(
    config: Any, step: int, *, context_tokens: int = 18, target_tokens: int = 9
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global batch of a step: images [G, 3, H, W], context_block [G, K], target_blocks [M, G, T]."""
    draw = torch.Generator().manual_seed(1000 + step)
    patches = config.grid[0] * config.grid[1]
    images = torch.randn(config.global_batch, 3, *config.ijepa.data.image_size, generator=draw)
    order = torch.rand(config.global_batch, patches, generator=draw).argsort(1)
    targets = torch.rand(4, config.global_batch, patches, generator=draw).argsort(2)[..., :target_tokens]
    return images, order[:, :context_tokens].contiguous(), targets.contiguous()


def train_steps(
    parts: Parts,
    steps: range,
    *,
    momentum: float = 0.9,
    lr: float = 1e-3,
    micro_batch: Callable | None = None,
    sizes: Callable[[int], dict[str, int]] = lambda step: {},
) -> list[float]:
    """Optimizer steps on made-up batches; returns the mean loss over all ranks of each step.

    ``micro_batch(step)`` is called as each micro-batch is handed out; ``sizes(step)`` are those of its masks.
    """
    from ijepa_ds.distributed import mean_over_ranks
    from ijepa_ds.method.schedules import Hyperparameters

    trainable, config, losses = parts.trainable, parts.config, []
    size = config.micro_batch // config.ijepa.pipeline.stages

    def batches(step: int) -> Iterator[MadeUpBatch]:
        images, context, targets = made_up_batch(config, step, **sizes(step))
        for start in range(trainable.data_rank * size, config.global_batch, trainable.data_ranks * size):
            own = slice(start, start + size)
            if micro_batch is not None:
                micro_batch(step)
            yield MadeUpBatch(images[own], context[own], targets[:, own].contiguous())

    for step in steps:
        parts.outcome = trainable.step(batches(step), Hyperparameters(lr, 0.05, momentum))
        losses.append(mean_over_ranks(parts.outcome.losses.mean(), parts.process))
    return losses


def whole_tensors(slices: list, process: Any) -> dict[str, torch.Tensor]:
    """Whole fp32 parameters from the slices of all ranks, by name; every element must be there exactly once."""
    import torch.distributed as dist

    pieces = [
        (piece.name, piece.start, piece.of(values.detach().view(-1)).clone())
        for shard, values in slices
        for piece in shard.pieces()
    ]
    gathered: list = [pieces]
    if slices[0][0].process_group is not None:
        gathered = [None] * process.world_size
        dist.all_gather_object(gathered, pieces)
    shapes = {placement.name: placement.shape for shard, _ in slices for placement in shard.placements}
    whole = {name: torch.zeros(shape) for name, shape in shapes.items()}
    holders = {name: torch.zeros(shape.numel()) for name, shape in shapes.items()}
    for name, start, values in (piece for of_rank in gathered for piece in of_rank):
        whole[name].view(-1)[start : start + len(values)] = values
        holders[name][start : start + len(values)] += 1
    assert all((counts == 1).all() for counts in holders.values()), "an element is held by nobody, or twice"
    return whole


def masters_of(parts: Parts) -> dict[str, torch.Tensor]:
    """The whole fp32 master weights."""
    return whole_tensors(parts.trainable.state().slices["master"], parts.process)


def averages_of(parts: Parts) -> dict[str, torch.Tensor]:
    """The target encoder's whole fp32 average."""
    return whole_tensors(parts.trainable.state().slices["target"], parts.process)
