"""``python -m ijepa_ds evaluate``: what a frozen encoder's features know, beside what they would know untrained.

Every number stands beside two baselines from the same run: the same encoder at random initialisation, and raw pixels.
Weights are the target encoder's, always. Runs as one process, or as several by ``deepspeed --module ijepa_ds
evaluate ...``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from ijepa_ds.build import working_dtype
from ijepa_ds.data.ffcv_pipeline import DecodeError
from ijepa_ds.distributed import Process, share_cpu_threads
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import candidates, computing_dtype
from ijepa_ds.evaluation.data import LabelledData
from ijepa_ds.evaluation.illustrations import illustrate, log_scalars
from ijepa_ds.evaluation.probes.recipes import PRESETS
from ijepa_ds.evaluation.results import Measurement, Results, combine, format_table
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.evaluation.subject import Subject, load_subject
from ijepa_ds.evaluation.tasks import DEFAULT_TASKS, TASKS
from ijepa_ds.files import checksum
from ijepa_ds.hardware import bf16_warning
from ijepa_ds.meeting import join as join_meeting
from ijepa_ds.meeting import own_ranks
from ijepa_ds.run.provenance import versions


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = build_parser().parse_args(arguments)
    try:
        check_options(options)
        path, size = Path(options.checkpoint), options.image_size
        evaluate(options, load_subject(path, options.config, image_size=size, heads=options.heads))
    except DecodeError:  # of this process's images
        raise
    except UserError as error:
        join_meeting().leave(error)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_ds evaluate",
        usage="%(prog)s --checkpoint RUN|FILE [--task T ...] [options]; -h lists them",
        description=__doc__.split("\n\n")[0],
    )
    _add_options_of_input(parser)
    _add_options_of_tasks(parser)
    add = parser.add_argument_group("comparison and output").add_argument
    add("--random-seeds", metavar="N", type=int, default=3, help="how many random encoders to compare with (default 3)")
    add("--seed", metavar="N", type=int, help="of order, crops and heads (default: the run's)")
    add("--out", metavar="FOLDER", help="for results.json and pictures (default: the run folder's evaluation/)")
    add("--no-pictures", dest="pictures", action="store_false", help="write no pictures")
    return parser


def _add_options_of_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is measured").add_argument
    add("--checkpoint", metavar="RUN|FILE", required=True, help="a run, a checkpoint, or a file or folder of others")
    add("--config", metavar="FILE", help="the configuration of a file, where its tensors do not tell enough")
    add("--heads", metavar="N", type=int, help="attention heads of a file, where nothing tells them")
    add("--train", metavar="FILE.beton", help="labelled images to fit on, or 'a-*.beton' (default: data.train)")
    add("--validation", metavar="FILE.beton", help="to measure on (default: the config's data.validation)")
    add("--label", metavar="L", action="append", default=[], help="which label, of several; may be given again")
    add("--train-images", metavar="N", type=int, help="use at most so many, evenly spread")
    add("--validation-images", metavar="N", type=int, help="the same for those measured on")
    add("--image-size", metavar="N", type=int, help="pixels, where not the encoder's own: positions are computed anew")
    add("--crop-share", metavar="X", type=float, help="the central crop's side over the image's shorter side")
    add("--micro-batch", metavar="N", type=int, default=256, help="images of one forward pass (default 256)")


def _add_options_of_tasks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tasks").add_argument
    tasks = f"one or several of {', '.join(TASKS)} (default: {' '.join(DEFAULT_TASKS)}); docs/evaluation.md has them"
    add("--task", metavar="T", nargs="+", choices=list(TASKS), default=list(DEFAULT_TASKS), help=tasks)
    add("--cached", action="store_true", help="features extracted once, without augmentation: minutes, not hours")
    add("--preset", choices=list(PRESETS), help="transfer: whose recipe, which --task transfer needs")
    add("--bins", choices=("auto", "clevr", "equal"), default="auto", help="of a continuous label (default auto)")
    add("--epochs", metavar="N", type=int, help="instead of the task's; steps of the learning rate keep their share")
    add("--batch", metavar="N", type=int, help="instead of the task's")
    add("--lr", metavar="X", type=float, nargs="+", help="instead of the task's grid")
    add("--weight-decay", metavar="X", type=float, nargs="+", help="instead of the task's grid")
    add = parser.add_argument_group("--task lowshot").add_argument
    add("--per-class", metavar="N", type=int, nargs="+", action="extend", help="images a class (default 13)")
    add("--draws", metavar="N", type=int, help="how often they are drawn, mean and deviation (default 3)")
    add("--split-list", metavar="FILE", help="instead: the labelled images' file names, one a line")
    add("--finetune", action="store_true", help="fine-tune the whole encoder, too")
    add("--finetune-lr", metavar="X", type=float, help="instead of 3e-5, the paper's for ImageNet")
    add = parser.add_argument_group("--task dense").add_argument
    add("--dense-data", metavar="FOLDER", help="images with masks or depth maps, in one of the layouts of the docs")
    add("--patches", metavar="N", type=int, help="of the training images, to fit on (default 65536)")


_COUNTS = "train-images validation-images random-seeds micro-batch epochs batch draws patches"
_NUMBERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (  # options, what they may be, and in words
    (_COUNTS, lambda number: number >= 1, "must be at least 1; leave it out for the default"),
    ("per-class", lambda number: number >= 1, "must be at least 1"),
    ("lr weight-decay", lambda number: 0 <= number < math.inf, "must be a number of at least 0"),
    ("finetune-lr", lambda number: 0 < number < math.inf, "must be a number above 0"),
    ("crop-share", lambda number: 0 < number <= 1, "must be above 0 and at most 1"),
)
_NEEDED = {  # by a task, which option, and what it says
    "transfer": ("preset", f"one of {', '.join(PRESETS)}, whose recipe is then used"),
    "dense": ("dense-data", "a folder of images with masks or depth maps"),
}
_LOWSHOT = ("split-list", "per-class", "draws", "finetune", "finetune-lr")  # options of that task alone
_DENSE = ("dense-data", "patches")
_DRAWN = ("per-class", "draws")  # of lowshot's, what a list makes meaningless


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers and combinations that make no sense: the first of them (:class:`UserError`)."""
    values = {name.replace("_", "-"): value for name, value in vars(options).items()}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    for names, accepts, sentence in _NUMBERS:
        for name in filter(given.__contains__, names.split()):
            numbers = given[name] if isinstance(given[name], list) else [given[name]]
            if bad := [number for number in numbers if not accepts(number)]:
                raise UserError(f"--{name} = {bad[0]} {sentence}")
    for task, (option, what) in _NEEDED.items():
        if task in options.task and option not in given:
            raise UserError(f"--task {task} needs --{option}: {what}")
    for task, own in (("lowshot", _LOWSHOT), ("dense", _DENSE)):
        if task not in options.task and (vain := [name for name in own if name in given]):
            raise UserError(f"--{vain[0]} is of --task {task}: add that task, or leave the option out")
    if "finetune-lr" in given and not options.finetune:
        raise UserError("--finetune-lr is of no use without --finetune: add it")
    if "split-list" in given:
        _check_split_list(options.split_list, given)


def _check_split_list(path: str, given: Collection[str]) -> None:
    if drawn := [name for name in _DRAWN if name in given]:
        cure = f"so --{drawn[0]} has no meaning: leave one of them out"
        raise UserError(f"--split-list names the labelled images, {cure}")
    if not Path(path).is_file():
        raise UserError(f"--split-list {path} is not a file: give one image file name per line")


def evaluate(options: argparse.Namespace, subject: Subject) -> Results | None:
    """Measure, print the table, write results.json; the results, on the main process."""
    config, process, said = subject.config, join(), set()

    def say(line: str) -> None:
        if process.is_main and line not in said:  # what holds for one candidate holds for all
            said.add(line)
            print(line, flush=True)

    data = LabelledData(options, config, process) if set(options.task) != {"dense"} else None
    setting = Setting(options, config, data, process, say)
    labels = f"; labels: {', '.join(data.fields)}" if data else ""
    say(f"measuring {subject.describe()}; tasks: {', '.join(options.task)}{labels}")
    prepared = dict[str, Any]()
    for task in options.task:  # before the first has run for hours
        prepared[task] = TASKS[task].prepare(setting)
    measured, dtype = defaultdict[str, list[Measurement]](list), computing_dtype(config, process)
    in_bf16 = working_dtype(config) == torch.bfloat16
    if warning := bf16_warning(in_bf16 and process.is_main, process.device, cure="the evaluation"):
        say(warning)
    for candidate in candidates(subject, process, dtype, random_seeds=options.random_seeds):
        began = time.monotonic()
        # One of each task and label: --task linear --cached gives the logistic regression too.
        unique = {
            (measurement.task, measurement.label): measurement
            for task, classes in prepared.items()
            for measurement in TASKS[task].measure(setting, candidate, classes)
        }
        measured[candidate.name] += unique.values()
        say(f"{candidate}: measured in {time.monotonic() - began:.0f} s")  # no number without its baselines
    if not process.is_main:
        return None
    results = Results(
        source=subject.source,
        encoder=subject.role,
        checkpoint_sha256=checksum(subject.path),
        versions=versions(),
        config=config.as_dict(),
        options={**vars(options), "processes": process.world_size},
        tasks=combine(measured),
    )
    print(format_table(results.tasks), flush=True)
    folder = Path(options.out) if options.out else subject.folder
    try:
        results.write(folder / "results.json")
        log_scalars(folder, subject.step, results)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); give another with --out") from None
    print(f"\nwritten: {folder / 'results.json'}", flush=True)
    if options.pictures:
        illustrate(results, folder, setting, step=subject.step)
    return results


def join() -> Process:
    """The processes that a launcher has started, or this one alone."""
    if not own_ranks().alone:
        from ijepa_ds.engine.zero import init_distributed  # it loads DeepSpeed, for some seconds

        return init_distributed()
    share_cpu_threads()
    return Process(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
