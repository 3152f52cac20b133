"""``python -m ijepa_ds demo``: the whole job on built-in images, by the commands that a user would type.

Make scenes, convert them, pretrain through ``deepspeed run.py``, probe the target encoder beside random ones, export
it. What an earlier call finished is used again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ijepa_ds.config import load_config
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.results import best_of, margin, random_values, read_results
from ijepa_ds.files import PROJECT
from ijepa_ds.progress import duration

CONFIG = "ds_configs/scenes_tiny.json"
# Enough images for a probe of 512 features, in half the time of all; random encoders enough to estimate a deviation.
PROBE = ["--train-images", "8000", "--random-seeds", "5"]


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds demo``."""
    parser = argparse.ArgumentParser(prog="./run.sh demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=15000, help="training scenes to make")
    parser.add_argument("--validation-images", type=int, default=3000)
    parser.add_argument("--data", default="data/scenes", help="folder for the scenes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="as for run.py")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    config = load_config(PROJECT / CONFIG, options.set)
    run = PROJECT / config.ijepa.run.folder / config.ijepa.run.name
    data = Path(options.data)
    _make_data(data, config.ijepa.data.image_size[0], options)
    overrides = [f"ijepa.data.train={data}/train.beton", f"ijepa.data.validation={data}/val.beton", *options.set]
    export = run / "export" / "target_encoder.safetensors"
    if export.exists():
        print(f"\n== pretrain: {run} is there already")
    else:
        command = ["deepspeed", "run.py", "--config", CONFIG]
        _call("pretrain", [*command, *(part for override in overrides for part in ("--set", override))])
    results = run / "evaluation" / "results.json"
    if not results.exists() or results.stat().st_mtime < export.stat().st_mtime:
        _call("evaluate", [sys.executable, "-m", "ijepa_ds", "evaluate", "--checkpoint", str(run), *PROBE])
    _summarise(run, results, time.monotonic() - began)
    return 0


def _make_data(data: Path, size: int, options: argparse.Namespace) -> None:
    scenes = data / "source"
    counts = ["--train", str(options.images), "--val", str(options.validation_images)]
    _call("scenes", [sys.executable, "data_prep/make_scenes.py", str(scenes), *counts, "--size", str(size)])
    for split in ("train", "val"):
        beton = data / f"{split}.beton"
        if (PROJECT / beton).exists():
            print(f"\n== convert: {beton} is there already")
        else:
            convert = ["data_prep/to_ffcv.py", str(scenes), str(beton), "--split", split, "--write-mode", "raw"]
            _call("convert", [sys.executable, *convert])


def _call(name: str, command: list[str]) -> None:
    """Run a command of the project from its root, shown as a user would type it."""
    shown = ["python" if part == sys.executable else part for part in command]
    print(f"\n== {name}: {shlex.join(shown)}", flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    code = subprocess.run(command, cwd=PROJECT, env={**os.environ, "PATH": path}).returncode
    if code:
        raise UserError(f"the demo's step '{name}' ended with exit code {code}; its reason stands above")


def _summarise(run: Path, results: Path, seconds: float) -> None:
    print(f"\n== reached in {duration(seconds)} (linear probe of the pooled features; the table above has more)")
    reached = True
    tasks = [task for task in read_results(results).tasks if task.task == "logistic"]
    for task in sorted(tasks, key=lambda task: task.label):
        trained, random = best_of(task.grid, "last")["value"], random_values(task, "last")
        points, deviations = margin(trained, random)
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
