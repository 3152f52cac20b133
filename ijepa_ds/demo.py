"""``python -m ijepa_ds demo``: the whole job on built-in images, by the commands that a user would type.

Make scenes, convert them, pretrain, probe the target encoder beside random ones, export
it. What an earlier call finished is used again; a call that was asked to stop is taken up by the next.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from ijepa_ds.commands import Commands
from ijepa_ds.config import Config, load_config
from ijepa_ds.engine.checkpoint_files import list_checkpoints
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.results import best_of, margin, random_values, read_results
from ijepa_ds.files import PROJECT
from ijepa_ds.hardware import has_fast_bf16, why
from ijepa_ds.progress import duration
from ijepa_ds.run.folder import read_run_config

CONFIG = "ds_configs/scenes_tiny.json"
# Enough images for a probe of 512 features; random encoders enough to estimate a deviation.
PROBE = ["--train-images", "5000", "--random-seeds", "5"]


class Stopped(Exception):
    """A signal has ended a step, or the pretraining has ended before its last epoch; says how to go on."""


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds demo``."""
    parser = argparse.ArgumentParser(prog="./run.sh demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default=CONFIG, help=f"the recipe, relative to the project (default: {CONFIG})")
    parser.add_argument("--images", type=int, default=12000, help="training scenes to make")
    parser.add_argument("--validation-images", type=int, default=3000)
    parser.add_argument("--data", default="data/scenes", help="folder for the scenes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="as for run.py")
    options = parser.parse_args(arguments)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with Commands(PROJECT, {**os.environ, "PATH": path}) as commands:
        try:
            _demo(options, commands)
        except Stopped as stopped:
            print(f"\n== {stopped}", flush=True)
            return 128 + commands.stopped if commands.stopped else 1
    return 0


def _demo(options: argparse.Namespace, commands: Commands) -> None:
    began = time.monotonic()
    config = load_config(PROJECT / options.config, options.set)
    run = PROJECT / config.ijepa.run.folder / config.ijepa.run.name
    data = Path(options.data)
    _make_data(data, config.ijepa.data.image_size[0], options, commands)
    overrides = [f"ijepa.data.train={data}/train.beton", f"ijepa.data.validation={data}/val.beton"]
    export = run / "export" / "target_encoder.safetensors"
    if export.exists():
        print(f"\n== pretrain: {run} is there already")
    else:
        precision, reason = choose_precision(config, run, options.set)
        print(f"\n== precision: {reason}", flush=True)
        _pretrain(options.config, [*overrides, *precision, *options.set], commands)
        if not export.exists():
            raise Stopped(_why_unfinished(config))
    results = run / "evaluation" / "results.json"
    if not results.exists() or results.stat().st_mtime < export.stat().st_mtime:
        _call("evaluate", [sys.executable, "-m", "ijepa_ds", "evaluate", "--checkpoint", str(run), *PROBE], commands)
    _summarise(run, results, time.monotonic() - began)


def _make_data(data: Path, size: int, options: argparse.Namespace, commands: Commands) -> None:
    scenes = data / "source"
    counts = ["--train", str(options.images), "--val", str(options.validation_images)]
    _call("scenes", [sys.executable, "data_prep/make_scenes.py", str(scenes), *counts, "--size", str(size)], commands)
    for split in ("train", "val"):
        beton = data / f"{split}.beton"
        if (PROJECT / beton).exists():
            print(f"\n== convert: {beton} is there already")
        else:
            convert = ["data_prep/to_ffcv.py", str(scenes), str(beton), "--split", split, "--write-mode", "raw"]
            _call("convert", [sys.executable, *convert], commands)


def choose_precision(config: Config, run: Path, overrides: list[str]) -> tuple[list[str], str]:
    """What to set for the pretraining's precision, and the sentence that says which was taken and why.

    A run that goes on keeps the precision that it began with, whatever is measured now.
    """
    if any(override.startswith(("bf16", "torch_autocast", "data_types")) for override in overrides):
        return [], f"{_precision(config.deepspeed['bf16'])}, as --set has it"
    if list_checkpoints(run / "checkpoints"):
        bf16 = read_run_config(run).deepspeed["bf16"]
        return [_set_bf16(bool(bf16.get("enabled")))], f"{_precision(bf16)}, with which {run} was begun"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = has_fast_bf16(device)
    return [_set_bf16(fast)], (
        f"{_precision({'enabled': fast})}, because {why(device)}; --set {_set_bf16(not fast)} overrules it"
    )


def _precision(bf16: dict[str, object]) -> str:
    return "bf16" if bf16.get("enabled") else "fp32"


def _set_bf16(enabled: bool) -> str:
    return f"bf16.enabled={'true' if enabled else 'false'}"


def _pretrain(config: str, overrides: list[str], commands: Commands) -> None:
    """One process, without the launcher: two on two cores are slower, and the batch is too small for several GPUs."""
    command = [sys.executable, "run.py", "--config", config]
    _call("pretrain", [*command, *(part for override in overrides for part in ("--set", override))], commands)


def _why_unfinished(config: Config) -> str:
    end = config.ijepa.run.stop_after_steps
    if end is not None:
        return f"pretraining ends at ijepa.run.stop_after_steps = {end}; without it the same command goes on"
    return "pretraining was asked to stop before its last epoch; the same command goes on"


def _call(name: str, command: list[str], commands: Commands) -> None:
    """Run a command of the project from its root, shown as a user would type it."""
    shown = ["python" if part == sys.executable else part for part in command]
    print(f"\n== {name}: {shlex.join(shown)}", flush=True)
    code = commands.run(command)
    if commands.stopped:
        raise Stopped(f"{name} was stopped by {commands.stopped.name}; the same command goes on")
    if code:
        raise UserError(f"the demo's step '{name}' ended with exit code {code}; its reason stands above")


def _summarise(run: Path, results: Path, seconds: float) -> None:
    print(f"\n== reached in {duration(seconds)} (linear probe of the pooled features; the table above has more)")
    reached = True
    tasks = [task for task in read_results(results).tasks if task.task == "logistic"]
    for task in sorted(tasks, key=lambda task: task.label):
        trained, random = best_of(task.grid, "last")["value"], random_values(task, "last")
        points, deviations = margin(trained, random)
        assert deviations is not None, "one random encoder has no deviation"
        reached = reached and deviations > 3
        print(
            f"{task.label}: trained {trained:.1f} %, random encoders {statistics.mean(random):.1f} ± "
            f"{statistics.stdev(random):.1f} %, raw pixels {task.baselines['pixels']['values'][0]:.1f} %; "
            f"{points:+.1f} points over the random encoders' mean = {deviations:+.1f} of their standard deviations"
        )
    if not reached:
        print("The trained encoder did NOT beat the random one by three standard deviations on every label.")
    pictures = sorted((run / "pictures").glob("*.png"))[-2:] + sorted(results.parent.glob("pictures/neighbours.png"))
    print(f"pictures: {', '.join(os.path.relpath(path, PROJECT) for path in pictures)}")
    print(f"the encoder, for timm: {os.path.relpath(run / 'export' / 'target_encoder.safetensors', PROJECT)}")
    print(f"TensorBoard: ./run.sh tensorboard {os.path.relpath(run.parent, PROJECT)}")
