"""``python -m ijepa_ds evaluate``: what a frozen encoder's features know, beside what they would know untrained.

Every number stands beside two baselines from the same run: the same encoder at random initialisation, and raw pixels.
Weights are the target encoder's, always. Runs as one process, or as several by ``deepspeed --module ijepa_ds
evaluate ...``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

import torch

from ijepa_ds.distributed import Process, leave_to_main_process, share_cpu_threads
from ijepa_ds.engine import init_distributed
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.data import LabelledData
from ijepa_ds.evaluation.encoders import encoders_to_measure
from ijepa_ds.evaluation.measurement import combine
from ijepa_ds.evaluation.recipes import PRESETS
from ijepa_ds.evaluation.results import Results, format_table
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.evaluation.target import Target, checksum, load_target
from ijepa_ds.evaluation.tasks import DEFAULT_TASKS, TASKS
from ijepa_ds.pipeline import DecodeError
from ijepa_ds.run_folder import versions


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = build_parser().parse_args(arguments)
    try:
        check_options(options)
        target = load_target(
            Path(options.checkpoint), options.config, image_size=options.image_size, heads=options.heads
        )
        evaluate(options, target)
    except DecodeError:  # of this process's images
        raise
    except UserError:
        leave_to_main_process()
        raise
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(prog="python -m ijepa_ds evaluate", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run folder, a checkpoint, .safetensors, .pth.tar, transformers folder")
    add("--config", help="the configuration of a file, where its tensors do not tell enough")
    add("--heads", type=int, help="attention heads of a file, where nothing tells them")
    add("--task", nargs="+", choices=list(TASKS), default=list(DEFAULT_TASKS), help="default: logistic knn")
    add("--train", help="labelled .beton to fit the probes on (default: the config's data.train)")
    add("--validation", help="labelled .beton to measure on (default: the config's data.validation)")
    add("--label", action="append", default=[], help="the label field, where the file has several; may be repeated")
    add("--cached", action="store_true", help="features extracted once, without augmentation: minutes, not hours")
    add("--preset", choices=list(PRESETS), help="the recipe of --task transfer")
    add("--epochs", type=int, help="instead of the task's; steps of the learning rate keep their share")
    add("--batch", type=int, help="instead of the task's")
    add("--lr", type=float, nargs="+", help="instead of the task's grid")
    add("--weight-decay", type=float, nargs="+", help="instead of the task's grid")
    add("--bins", choices=("auto", "clevr", "equal"), default="auto", help="of a continuous label")
    add("--image-size", type=int, help="pixels, where not the encoder's own: positions are computed anew")
    add("--crop-share", type=float, help="the central crop's side over the image's shorter side")
    add("--micro-batch", type=int, default=256, help="images of one forward pass")
    add("--train-images", type=int, help="use at most so many, evenly spread")
    add("--validation-images", type=int)
    add("--random-seeds", type=int, default=3, help="how many random encoders to compare with")
    add("--seed", type=int, help="of order, crops and heads (default: the run's)")
    add("--out", help="folder for results.json (default: the run folder's evaluation/)")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers that make no sense.

    Raises:
        UserError: the first of them.
    """
    for name in ("train_images", "validation_images", "random_seeds", "micro_batch"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} = {number} must be at least 1; leave it out for the default")
    if options.crop_share is not None and not 0 < options.crop_share <= 1:
        raise UserError(f"--crop-share = {options.crop_share} must be above 0 and at most 1")


def data_paths(options: argparse.Namespace, target: Target) -> tuple[str, str]:
    """The files to fit and to measure on: those given, or the configuration's.

    Raises:
        UserError: there is nothing to measure on.
    """
    data = target.config.ijepa.data
    train, validation = options.train or data.train, options.validation or data.validation
    if validation is None:
        raise UserError("there is nothing to measure on: give --validation FILE.beton, or set ijepa.data.validation")
    return train, validation


def evaluate(options: argparse.Namespace, target: Target) -> Results | None:
    """Measure, print the table, write results.json; the results, on the main process."""
    paths = data_paths(options, target)
    process = join()
    said: set[str] = set()

    def say(line: str) -> None:
        if process.is_main and line not in said:  # what holds for one encoder holds for all
            said.add(line)
            print(line, flush=True)

    config = target.config
    seed = config.ijepa.run.seed if options.seed is None else options.seed
    data = LabelledData(
        paths,
        limits=(options.train_images, options.validation_images),
        image_size=config.ijepa.data.image_size,
        micro_batch=options.micro_batch,
        num_workers=config.ijepa.data.workers,
        process=process,
    )
    setting = Setting(
        data=data,
        process=process,
        seed=seed,
        labels=tuple(options.label),
        cached=options.cached,
        preset=options.preset,
        epochs=options.epochs,
        batch=options.batch,
        lrs=options.lr,
        weight_decays=options.weight_decay,
        bins=options.bins,
        crop_share=options.crop_share,
        say=say,
    )
    say(f"measuring {target.say()}; tasks: {', '.join(options.task)}; labels: {', '.join(data.fields)}")
    measured = []
    for encoder in encoders_to_measure(target, process, random_seeds=options.random_seeds):
        measurements = [one for task in options.task for one in TASKS[task](setting, encoder)]
        measured.append((encoder, _without_repeats(measurements)))
        say(f"{encoder}: measured in {sum(one.seconds for one in measurements):.0f} s")  # no number without baselines
        encoder = None  # the next one needs its memory
    if not process.is_main:
        return None
    results = Results(
        source=target.source,
        encoder=target.encoder,
        checkpoint_sha256=checksum(target.path),
        versions=versions(),
        config=config.as_dict(),
        options={**vars(options), "processes": process.world_size},
        tasks=combine(measured),
    )
    print(format_table(results.tasks), flush=True)
    folder = Path(options.out) if options.out else target.folder
    try:
        results.write(folder / "results.json")
        log_scalars(folder, target.step, results)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); give another with --out") from None
    print(f"\nwritten: {folder / 'results.json'}", flush=True)
    return results


def join() -> Process:
    """The processes that a launcher has started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return init_distributed()
    share_cpu_threads()
    return Process(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def log_scalars(folder: Path, step: int, results: Results) -> None:
    """TensorBoard's scalars, in a folder of their own so that they do not mix with the training's."""
    from torch.utils.tensorboard import SummaryWriter

    for name in ("trained", "random", "pixels"):
        with contextlib.closing(SummaryWriter(str(folder / "tensorboard" / name))) as writer:
            for task in results.tasks:
                values = [task.value] if name == "trained" else task.baselines[name]["values"]
                writer.add_scalar(f"evaluation/{task.task}/{task.label}", sum(values) / len(values), step)


def _without_repeats(measurements: list) -> list:
    """One of each task and label: --task linear --cached gives the logistic regression too."""
    return list({(one.task, one.label): one for one in measurements}.values())
