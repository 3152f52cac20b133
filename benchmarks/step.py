"""One optimizer step of ours, as ``python run.py`` takes it, against the method written plainly (plain_ijepa.py).

    python benchmarks/step.py --json step.json --png step.png     # a CPU, some twenty minutes
    python benchmarks/step.py --model small224 --threads 2 --precision bf16 --rounds 5
    python benchmarks/step.py --model tiny32 --compiled             # with ijepa.compile, too: a minute to compile

Same weights, images and masks; batches lie ready in memory, and their pixels are normalised within the step. All sides
are timed in turns in one process; a ratio is the median over the rounds, with quartiles. Both have the same number of
threads. In bf16, ours has bf16 weights and fp32 masters; the plain method is timed both under autocast and with bf16
weights and fp32 masters, and the ratio is to the faster of them.

Ours keeps freed memory (ijepa_ds/allocator.py); a plainly written script does not, so the plain method is timed with
glibc's thresholds as they come to stand in a long run, and once more, for comparison, with ours. Before each timed step
of a side comes one that is not timed, so that it finds the memory as it would leave it itself.

share of peak: the operations of the method as it is written (nothing left out), for both sides, per second of the step,
over those of a product of two square matrices in that precision on as many threads.
memory: the highest resident memory of a process that takes three steps, less what it had before it built the model.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import plain_ijepa
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_ds.allocator import keep_freed_memory, set_thresholds
from ijepa_ds.build import build_ijepa, build_sampler, build_target, encoder_dimensions, input_of_encoder
from ijepa_ds.config import Config, load_config
from ijepa_ds.engine.plain import Plain
from ijepa_ds.engine.trainable import ShardedTrainable
from ijepa_ds.engine.zero import init_distributed
from ijepa_ds.hardware import has_fast_bf16
from ijepa_ds.method.compiled import compile_blocks
from ijepa_ds.method.encoder import Dimensions
from ijepa_ds.method.flops import Shapes
from ijepa_ds.method.schedules import Hyperparameters
from ijepa_ds.train import build_trainable

CPU = torch.device("cpu")
NOW = Hyperparameters(lr=1e-4, weight_decay=0.05, momentum=0.99)
PLAIN, AUTOCAST = "plain", "plain, autocast"
COMPILED = "ours, compiled"
KEEPING = ", freed memory kept"  # ends the name of a plain side whose allocator is set as ours
SAME_LOSS = {"fp32": 1e-4, "bf16": 2e-2}  # relative
STEP = 1  # whose masks are taken: their number of target patches is near the mean
# A file of ds_configs/, images of a batch, and what is set.
MODELS: dict[str, tuple[str, int, list[str]]] = {
    # 128 wide, 6 deep, 32 px, patches of 4; predictor 64 wide, 3 deep
    "tiny32": ("cifar10_tiny.json", 64, []),
    # 192 wide, 12 deep, 224 px, patches of 16; predictor 96 wide, 6 deep
    "small224": ("vits16_single_gpu.json", 8, ["ijepa.model.encoder=tiny", "ijepa.model.predictor_width=96"]),
}
# Kinds of operations, by what their names begin with; the first that fits.
KINDS = {
    "products": ("addmm", "mm", "bmm", "baddbmm", "mkldnn_linear", "_linear_pointwise", "mkldnn_conv", "thnn_conv"),
    "attention in one piece": ("_scaled_dot",),
    "softmax": ("_softmax",),
    "GELU": ("gelu",),
    "LayerNorm": ("native_layer_norm",),
    "copies": ("copy_", "cat", "index", "gather", "scatter", "repeat", "_foreach_copy", "fill_", "zero_"),
    "optimizer and average": ("_foreach", "_fused", "lerp", "addcmul", "addcdiv", "sqrt"),
    "sums and other element by element": ("add", "mul", "sub", "div", "sum", "smooth_l1", "linalg"),
}


@dataclass(frozen=True)
class Batch:
    """A batch as the loader gives it out."""

    images: Tensor  # uint8 [B, H, W, 3]
    context_block: Tensor  # int64 [B, K]
    target_blocks: Tensor  # int64 [M, B, T]
    keys: Tensor | None = None


# --------------------------------------------------------------------------------------------------- what is compared


def configuration(model: str, precision: str) -> Config:
    """The shipped configuration behind a name of MODELS, in ``precision`` and with one micro-batch a step."""
    file, images, changes = MODELS[model]
    shared = [
        f"train_batch_size={images}",
        f"train_micro_batch_size_per_gpu={images}",
        f"bf16.enabled={'true' if precision == 'bf16' else 'false'}",
    ]
    return load_config(measure.ROOT / "ds_configs" / file, [*shared, *changes])


def made_up_batch(config: Config) -> Batch:
    """Noise, with masks of the configuration's own sampler."""
    sampler, draw = build_sampler(config), torch.Generator().manual_seed(0)
    contexts, targets = zip(*(sampler.draw(STEP, sample) for sample in range(config.global_batch)), strict=True)
    shape = (config.global_batch, *config.ijepa.data.image_size, 3)
    return Batch(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw),
        plain_ijepa.cut_to_shortest([torch.from_numpy(context).long() for context in contexts]),
        torch.from_numpy(np.stack(targets, axis=1)).long(),
    )


def plain_trainer(
    config: Config, kind: type[plain_ijepa.PlainTrainer] = plain_ijepa.PlainTrainer, **more: Any
) -> plain_ijepa.PlainTrainer:
    """The baseline with the initial weights of ours."""
    ours, dimensions, model = build_ijepa(config), encoder_dimensions(config), config.ijepa.model
    size = {"width": dimensions.width, "depth": dimensions.depth, "heads": dimensions.heads}
    encoder = plain_ijepa.Encoder(config.grid, model.patch_size, **size, hidden=dimensions.hidden)
    heads = model.predictor_heads or dimensions.heads
    narrow = {"width": model.predictor_width, "depth": model.predictor_depth, "heads": heads}
    predictor = plain_ijepa.Predictor(config.grid, dimensions.width, **narrow)
    encoder.load_state_dict(ours.context_encoder.state_dict())
    predictor.load_state_dict(ours.predictor.state_dict())
    return kind(encoder, predictor, **settings_of(config), **more)


def our_networks_plainly(config: Config, kind: type[plain_ijepa.PlainTrainer]) -> plain_ijepa.PlainTrainer:
    """Our networks in the baseline's step: its target encoder computes everything, its update one tensor at a time."""
    ours = build_ijepa(config)
    return kind(ours.context_encoder, ours.predictor, **settings_of(config))


def settings_of(config: Config) -> dict[str, Any]:
    """What a plain trainer is told of AdamW and the average."""
    adam = {"betas": config.ijepa.optimization.betas, "eps": config.ijepa.optimization.eps}
    return {"lr": NOW.lr, "weight_decay": NOW.weight_decay, "momentum": NOW.momentum, **adam}


def plain_step(config: Config, batch: Batch, trainer: plain_ijepa.PlainTrainer) -> Callable[[], Tensor]:
    """A step of the baseline from the same pixels."""
    data = config.ijepa.data
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    dtype = next(trainer.encoder.parameters()).dtype

    def step() -> Tensor:
        images = (batch.images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return trainer.step(images.to(dtype), batch.context_block, batch.target_blocks)

    return step


def without_deepspeed(config: Config) -> Plain:
    """Our modules on our plain engine, fp32 alone."""
    optimization = config.ijepa.optimization
    adam = {"betas": optimization.betas, "eps": optimization.eps}
    to_input = input_of_encoder(config, CPU, torch.float32)
    return Plain(build_ijepa(config), build_target(config), to_input=to_input, **adam)


def sides_of(config: Config, precision: str) -> dict[str, Callable[[], Any]]:
    """Who is timed: what makes each, by name. From the plain method to the product, by what is added."""
    in_bf16 = precision == "bf16"
    kind = plain_ijepa.HalfPrecisionTrainer if in_bf16 else plain_ijepa.PlainTrainer
    plain = functools.partial(plain_trainer, config, kind)
    sides: dict[str, Callable[[], Any]] = {PLAIN: plain, f"{PLAIN}{KEEPING}": plain}
    if in_bf16:
        sides = {AUTOCAST: functools.partial(plain_trainer, config, autocast=torch.bfloat16), **sides}
    sides["our networks, plain step"] = lambda: our_networks_plainly(config, kind)
    if not in_bf16:
        sides["ours without DeepSpeed"] = lambda: without_deepspeed(config)
    return {**sides, "ours": lambda: build_trainable(config, init_distributed()), COMPILED: lambda: compiled(config)}


def compiled(config: Config) -> ShardedTrainable:
    """The product with ``ijepa.compile``; compiled at its first step."""
    trainable = build_trainable(config, init_distributed())
    compile_blocks(trainable.module, trainable.target_encoder.encoder, num_shapes=1, backend="inductor")
    return trainable


def allocate_as(side: str) -> None:
    """Set the allocator as a side has it."""
    if side in (PLAIN, AUTOCAST):  # glibc raises its thresholds, up to these, as large allocations are freed
        set_thresholds(trim=64 * 2**20, mmap=32 * 2**20)
    else:
        keep_freed_memory()


def step_of(config: Config, batch: Batch, side: Any) -> Callable[[], Tensor]:
    """A side's step: the loss back."""
    if isinstance(side, plain_ijepa.PlainTrainer):
        return plain_step(config, batch, side)
    return lambda: side.step(iter([batch]), NOW).losses[0]


# ------------------------------------------------------------------------------------------------------------ measure


def compare(
    model: str,
    precision: str,
    threads: int,
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    memory: bool = True,
    with_compiled: bool = False,
) -> dict[str, Any]:
    """All sides of one model in one precision on so many threads."""
    config = configuration(model, precision)
    batch = made_up_batch(config)
    makers = sides_of(config, precision)
    sides = {name: make() for name, make in makers.items() if with_compiled or name != COMPILED}
    torch.set_num_threads(threads)  # an engine's start sets it, too
    steps = {name: ClockedStep(side, step_of(config, batch, side), clock) for name, side in sides.items()}
    losses = {name: float(step()) for name, step in steps.items()}
    least, most = min(losses.values()), max(losses.values())
    assert most - least < SAME_LOSS[precision] * most, losses  # the same weights, images and masks
    seconds = in_turns(steps, rounds)
    peak, flops = product_rate(precision, clock), written_flops(config, batch)
    baselines = [name for name in (PLAIN, AUTOCAST) if name in sides]
    plain = min(baselines, key=lambda name: statistics.median(seconds[name]))
    return {
        "model": model,
        "precision": precision,
        "threads": threads,
        "images": config.global_batch,
        "context_tokens": batch.context_block.shape[1],
        "target_tokens": batch.target_blocks.shape[2],
        "gflop_as_written": flops / 1e9,
        "peak_gflops": peak / 1e9,
        "compared_with": plain,
        "ratio": ratio_of(seconds, plain, "ours"),
        **({"ratio_compiled": ratio_of(seconds, plain, COMPILED)} if with_compiled else {}),
        "sides": {
            name: {
                "ms": spread(1000 * value for value in seconds[name]),
                "share_of_peak": flops / statistics.median(seconds[name]) / peak,
                "loss": losses[name],
                "parts_ms": step.parts(rounds),
                "operations_ms": operations_of_step(step),
                "memory_mb": peak_memory(model, precision, threads, name) if memory else None,
            }
            for name, step in steps.items()
        },
    }


def in_turns(steps: dict[str, ClockedStep], rounds: int) -> measure.Seconds:
    """Seconds of each side's step in each round."""
    seconds: measure.Seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            allocate_as(name)
            step()
            step()
            seconds[name].append(step.seconds)
    return seconds


def ratio_of(seconds: measure.Seconds, one: str, other: str) -> dict[str, float]:
    """How many times as fast the other is."""
    return spread(first / second for first, second in zip(seconds[one], seconds[other], strict=True))


def spread(values: Iterator[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quarter": low, "three_quarters": high}


def written_flops(config: Config, batch: Batch) -> float:
    """Operations of a step of the method as it is written."""
    model, dimensions = config.ijepa.model, encoder_dimensions(config)
    heads = model.predictor_heads or dimensions.heads
    predictor = Dimensions(model.predictor_width, model.predictor_depth, heads)
    shapes = Shapes(dimensions, predictor, model.patch_size, config.grid[0] * config.grid[1])
    blocks, images, tokens = batch.target_blocks.shape
    context = batch.context_block.shape[1]
    counts = {"context_tokens": context, "target_tokens": tokens, "num_targets": blocks}
    return images * shapes.flops(**counts, exact_savings=False).total


def product_rate(precision: str, clock: Callable[[], float], size: int = 1024) -> float:
    """The best rate of a square product, operations a second."""
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    matrix @ matrix
    fastest = float("inf")
    for _ in range(50):
        began = clock()
        matrix @ matrix
        fastest = min(fastest, clock() - began)
    return 2 * size**3 / fastest


class ClockedStep:
    """A step with a clock around the calls of its parts: some ten readings, which cost nothing."""

    def __init__(self, side: Any, step: Callable[[], Tensor], clock: Callable[[], float]) -> None:
        self.step, self.calls, self.clock = step, parts_of(side), clock
        self.spent: list[dict[str, float]] = []

    def __call__(self) -> Tensor:
        spent: dict[str, float] = defaultdict(float)
        self.spent.append(spent)
        began = self.clock()
        with clocks(self.calls, spent, self.clock):
            loss = self.step()
        spent["rest"] = self.clock() - began - sum(spent.values())
        return loss

    @property
    def seconds(self) -> float:
        """Of the last step."""
        return sum(self.spent[-1].values())

    def parts(self, rounds: int) -> dict[str, float]:
        """Median milliseconds of the parts in the timed steps; "rest" is what no part holds."""
        last = self.spent[-2 * rounds :][1::2]
        return {part: 1000 * statistics.median(spent[part] for spent in last) for part in (*self.calls, "rest")}


def parts_of(side: Any) -> dict[str, list[tuple[Any, str]]]:
    """The parts of a side's step: the calls, as (owner, attribute), that they are."""
    if isinstance(side, ShardedTrainable):
        networks = side.target_encoder.encoder, side.module.context_encoder, side.module.predictor
        optimizer, average = getattr(side, "engine", side.adam), (side.average, "update")
    else:
        networks = side.target_encoder, side.encoder, side.predictor
        optimizer, average = side.optimizer, (side, "average")
    return {
        "target encoder": [(networks[0], "forward"), (networks[0], "features_at")],
        "context encoder": [(networks[1], "forward")],
        "predictor": [(networks[2], "forward")],
        "loss": [(F, "smooth_l1_loss")],
        "backward": [(Tensor, "backward")],
        "optimizer": [(optimizer, "step")],
        "average": [average],
    }


@contextmanager
def clocks(
    calls: dict[str, list[tuple[Any, str]]], spent: dict[str, float], clock: Callable[[], float]
) -> Iterator[None]:
    """Add the seconds of ``calls`` to ``spent`` by the part they belong to; calls that do not exist are passed over."""
    before = []
    for part, owners in calls.items():
        for owner, attribute in owners:
            if function := getattr(owner, attribute, None):
                before.append((owner, attribute, vars(owner).get(attribute)))
                setattr(owner, attribute, timed(function, part, spent, clock))
    try:
        yield
    finally:
        for owner, attribute, own in before:
            if own is None:  # the class's, which shows again
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, own)


def timed(function: Callable, part: str, spent: dict[str, float], clock: Callable[[], float]) -> Callable:
    """The function; its seconds are added to ``spent[part]``."""

    def call(*arguments: Any, **more: Any) -> Any:
        began = clock()
        result = function(*arguments, **more)
        spent[part] += clock() - began
        return result

    return call


def operations_of_step(step: Callable[[], Tensor], times: int = 3) -> dict[str, float]:
    """Milliseconds of a step by kinds of operations, from torch's profiler (which slows small operations)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        for _ in range(times):
            step()
    spent: dict[str, float] = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profile.key_averages():
        name = event.key.rpartition("::")[2]
        kind = next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "other")
        spent[kind] += event.self_cpu_time_total / 1000 / times
    return spent


def peak_memory(model: str, precision: str, threads: int, side: str) -> float:
    """Highest resident memory of a process of its own, MB."""
    command = [sys.executable, __file__, "--model", model, "--precision", precision, "--threads", str(threads)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_PORT")}
    output = subprocess.check_output([*command, "--alone", side], env=environment, text=True)
    return float(output.splitlines()[-1])


def alone(model: str, precision: str, threads: int, side: str) -> float:
    """What :func:`peak_memory` starts: three steps of one side."""
    before = resident_mb("VmRSS")
    config = configuration(model, precision)
    batch = made_up_batch(config)
    step = step_of(config, batch, sides_of(config, precision)[side]())
    allocate_as(side)
    torch.set_num_threads(threads)
    for _ in range(3):
        step()
    return resident_mb("VmHWM") - before


def resident_mb(field: str) -> float:
    """This process's resident memory: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


# --------------------------------------------------------------------------------------------------------------- show


def show(result: dict[str, Any]) -> str:
    """A comparison as a paragraph and three tables."""
    sides, precision = result["sides"], result["precision"]
    ratio = result["ratio"]
    more = f", compiled {result['ratio_compiled']['median']:.2f} x" if "ratio_compiled" in result else ""
    headline = (
        f"{result['model']}, {precision}, threads: {result['threads']}: ours is {ratio['median']:.2f} x as fast as "
        f"'{result['compared_with']}' (quartiles {ratio['quarter']:.2f} to {ratio['three_quarters']:.2f}){more}; "
        f"{result['images']} images, K = {result['context_tokens']}, T = {result['target_tokens']}, "
        f"{result['gflop_as_written']:.1f} GFLOP as written, peak {result['peak_gflops']:.0f} GFLOP/s"
    )
    times = [
        [name, *side["ms"].values(), 100 * side["share_of_peak"], side["memory_mb"]] for name, side in sides.items()
    ]
    tables = [measure.table(times, ["side", "ms a step", "quarter", "three quarters", "% of peak", "memory, MB"])]
    for key in ("parts_ms", "operations_ms"):
        rows = [[part, *(side[key][part] for side in sides.values())] for part in next(iter(sides.values()))[key]]
        tables.append(measure.table(rows, [key.replace("_", ", "), *sides]))
    return "\n\n".join([headline, *tables])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds of a step from the plain method to the product, a panel for each comparison."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(7 * columns, 2.2 * rows), squeeze=False, layout="constrained")
    for panel, result in zip(panels.flat, results, strict=False):
        names = list(result["sides"])
        middles = [result["sides"][name]["ms"]["median"] for name in names]
        bars = panel.barh(names, middles, color=["tab:blue" if name == "ours" else "tab:gray" for name in names])
        panel.bar_label(bars, fmt="%.0f", padding=3)
        panel.invert_yaxis()
        panel.margins(x=0.12)
        title = f"{result['model']}, {result['precision']}, threads: {result['threads']}"
        panel.set_title(f"{title}: {result['ratio']['median']:.2f} x", fontsize=10)
        panel.set_xlabel("ms a step")
    for panel in panels.flat[len(results) :]:
        panel.remove()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Compare as the command line says, print tables, write JSON."""
    parser = measure.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], help="default: bf16 where it is fast")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--cpu-clock",
        action="store_true",
        help="count the processor's seconds of this process: for one thread on a machine with other work",
    )
    parser.add_argument("--compiled", action="store_true", help="time the product with ijepa.compile, too")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory, a process for each side")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the sides' times there")
    parser.add_argument("--alone", metavar="SIDE", help="print the memory, MB, that one side takes, and nothing else")
    options = parser.parse_args()
    precisions = options.precision or ["fp32", *(["bf16"] if has_fast_bf16(CPU) else [])]
    cases = list(itertools.product(options.model, precisions, options.threads))
    if options.alone:
        print(alone(*cases[0], options.alone))
        return
    results = []
    for case in cases:
        clock = time.process_time if options.cpu_clock else time.perf_counter
        settings = {"memory": not options.no_memory, "with_compiled": options.compiled}
        results.append(compare(*case, rounds=options.rounds, clock=clock, **settings))
        print(show(results[-1]), end="\n\n", flush=True)
    measure.save(measure.record(results, compared=__doc__, device=CPU), options.json)
    if options.png:
        draw(results, options.png)


if __name__ == "__main__":
    main()
