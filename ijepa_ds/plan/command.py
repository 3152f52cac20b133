"""``python -m ijepa_ds plan``: memory, time and cost of a run on GPUs that need not be there."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from ijepa_ds.build import check_batch, check_stages, computing_dtype
from ijepa_ds.config import Config, load_config
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.plan.gpus import GPUS, NETWORKS, NO_NETWORK, USUAL_NETWORK, Gpu, build_cluster, check_network
from ijepa_ds.plan.images import IMAGENET, Images, images_of
from ijepa_ds.plan.predict import Plan, Terms, numbers
from ijepa_ds.plan.table import table
from ijepa_ds.plan.workload import workload_of


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds plan``."""
    options = _parser().parse_args(arguments)
    _check_options(options)
    config = load_config(options.config, options.set)
    images = images_of(config.ijepa.data.train, options.images)
    terms = Terms(options.efficiency, options.price, options.host_memory)
    plan = plan_of(config, images, terms, options)
    told = numbers(plan)
    if options.json or options.png:
        from ijepa_ds.plan.figure import draw, over_gpus  # matplotlib takes a second

        told["over_gpus"] = over_gpus(plan)
        if options.png:
            draw(plan, told["over_gpus"], Path(options.png))
    if options.json == "-":
        print(json.dumps(told, indent=1))
        return 0
    print(table(told))
    if options.json:
        _write(Path(options.json), json.dumps(told, indent=1) + "\n")
    for path in filter(None, (options.json, options.png)):
        print(f"written: {path}")
    return 0


def plan_of(config: Config, images: Images, terms: Terms, options: argparse.Namespace) -> Plan:
    """The plan of a configuration on the cluster that the command line names.

    Raises:
        UserError: the run would be refused on such processes, or computes in what the GPU lacks.
    """
    cluster = build_cluster(options.gpu, options.gpus, nodes=options.nodes, network=options.interconnect)
    _check_precision(config, cluster.gpu)
    check_stages(config)
    check_batch(config, Process(0, cluster.gpus, torch.device("cpu")))
    if images.count < config.global_batch:
        raise UserError(
            f"{images.count:,} images ({images.told}) are fewer than one global batch; lower train_batch_size = "
            f"{config.global_batch}"
        )
    steps = max(1, math.floor(images.count / config.global_batch * config.ijepa.optimization.epochs))
    work = workload_of(config, steps)
    return Plan(work, cluster, images, terms, config.ijepa.pipeline.largest_bubble)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_ds plan",
        description="Predict memory, time and cost of a run, and what of it fits. Arithmetic alone: no GPU is needed, "
        "nothing has been measured on one yet, and every assumption is printed.",
    )
    parser.add_argument("--config", required=True, help="a file of ds_configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="as for run.py")
    parser.add_argument("--gpus", type=int, default=1, help="of all nodes together (1)")
    parser.add_argument("--gpu", default="a100-80", metavar="NAME", help=f"{', '.join(GPUS)} (a100-80)")
    parser.add_argument("--nodes", type=int, help="default: of eight GPUs each")
    parser.add_argument(
        "--interconnect",
        metavar="NAME",
        help=f"between nodes: {', '.join([NO_NETWORK, *NETWORKS])} ({USUAL_NETWORK} where there are several)",
    )
    parser.add_argument(
        "--images", type=int, help=f"of the training set; default: those of the .beton, or ImageNet's {IMAGENET:,}"
    )
    parser.add_argument(
        "--efficiency", type=float, default=0.5, help="share of the GPU's peak that the products reach (0.5)"
    )
    parser.add_argument("--price", type=float, help="of a GPU hour, in any currency: the run's cost")
    parser.add_argument("--host-memory", type=float, metavar="GB", help="of a node: does the .beton stay in it?")
    parser.add_argument("--json", metavar="FILE", help="all numbers; - writes them in place of the table")
    parser.add_argument("--png", metavar="FILE", help="memory and time over 1 to 64 GPUs")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    check_network(options.interconnect)
    for name, least in (("images", 1), ("price", 0), ("host_memory", 0)):
        value = getattr(options, name)
        if value is not None and not (least <= value < math.inf):
            raise UserError(f"--{name.replace('_', '-')} = {value} must be a number of at least {least}")
    if not 0 < options.efficiency <= 1:
        raise UserError(f"--efficiency = {options.efficiency} must be above 0 and at most 1: a share of the peak")


def _check_precision(config: Config, gpu: Gpu) -> None:
    if gpu.bf16 or computing_dtype(config) != torch.bfloat16:
        return
    key = "bf16" if config.deepspeed["bf16"].get("enabled") else "torch_autocast"
    others = ", ".join(name for name, other in GPUS.items() if other.bf16)
    raise UserError(
        f"{gpu.name} has no arithmetic for bf16: --set {key}.enabled=false computes in fp32; or use {others}"
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); give another --json") from error
