"""A plan as text."""

from __future__ import annotations

import textwrap
from typing import Any

_WIDTH = 110
_LABEL = 18
_MEMORY = {
    "weights": "weights that compute",
    "gradients": "gradients",
    "optimizer": "fp32 weights and moments",
    "average": "average, fp32",
    "target": "target encoder",
    "buckets": "buckets",
    "activations": "activations",
    "working": "gradients of activations, or the target's pass",
    "images": "images",
    "outside": "CUDA and libraries",
}
_TIME = {
    "target": "target encoder",
    "context_encoder": "context encoder",
    "predictor": "predictor",
    "recomputed": "checkpointed blocks again",
    "bubble": "stages waiting",
    "update": "AdamW and average",
    "reduce_exposed": "gradients summed",
    "weights_exposed": "weights gathered",
    "average_exposed": "average gathered",
    "stages_exposed": "tokens between stages",
}


def table(numbers: dict[str, Any]) -> str:
    """The numbers of :func:`~ijepa_ds.plan.predict.numbers`, advice and assumptions below."""
    lines = [_heading(numbers), ""]
    for label, text in [*_what_it_takes(numbers), *_what_it_costs(numbers), *_what_fits(numbers)]:
        lines += _wrapped(text, f"{label:<{_LABEL}}")
    for title, sentences in (("advice", numbers["advice"]), ("assumed", numbers["assumptions"])):
        lines += ["", f"{title}:" if sentences else f"{title}: none, it is well set"]
        for sentence in sentences:
            lines += _wrapped(sentence, "  - ")
    return "\n".join(lines)


def _heading(numbers: dict[str, Any]) -> str:
    cluster, batch = numbers["cluster"], numbers["batch"]
    nodes = f" on {cluster['nodes']} nodes ({cluster['interconnect']})" if cluster["interconnect"] else ""
    split = f"{batch['stages']} stages x {batch['replicas']}" if batch["stages"] > 1 else f"{batch['replicas']}"
    return (
        f"prediction for {cluster['gpus']} x {cluster['gpu']}{nodes}\n"
        f"batch {batch['global']} = {split} x {batch['micro']} images x {batch['micro_batches']}, ZeRO "
        f"{batch['zero_stage']}"
    )


def _what_it_takes(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    of, gflop, tokens = numbers["parameters_of"], numbers["gflop_of"], numbers["tokens"]
    stages = numbers["memory_of_stages"]
    memory = {name: value for name, value in numbers["memory_of"].items() if value >= 0.05}
    parts = ", ".join(f"{_MEMORY[name]} {value:.1f}" for name, value in memory.items())
    kinds = ", ".join(f"{name} {value:.1f}" for name, value in numbers["activations_gb"].items())
    verdict = "fits" if numbers["fits"] else "DOES NOT FIT"
    return [
        (
            "parameters",
            f"{numbers['parameters'] / 1e6:,.1f} million trained: context encoder "
            f"{of['context_encoder'] / 1e6:,.1f}, predictor {of['predictor'] / 1e6:,.1f}",
        ),
        (
            "memory of a GPU",
            f"{numbers['memory_gb']:.1f} GB of {numbers['cluster']['usable_memory_gb']:.1f}: {verdict}",
        ),
        ("", parts + (f"; by stage {', '.join(f'{value:.1f}' for value in stages)}" if len(stages) > 1 else "")),
        ("activations", f"{kinds} GB at T = {tokens['target_largest']}"),
        (
            "GFLOP an image",
            f"{numbers['gflop_per_image']:.1f}: target encoder {gflop['target']:.1f}, context encoder "
            f"{gflop['context_encoder']:.1f}, predictor {gflop['predictor']:.1f} (K = {tokens['context']}, T = "
            f"{tokens['target_mean']:.1f} on average)",
        ),
    ]


def _what_it_costs(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, cluster = numbers["step_seconds"], numbers["cluster"]
    taken = {name: 1e3 * seconds[name] for name in _TIME if seconds[name] >= 5e-5}
    cost = "" if numbers["cost"] is None else f", cost {numbers['cost']:,.0f}"
    rows = [
        (
            "step",
            f"{1e3 * seconds['total']:.0f} ms: "
            + ", ".join(f"{_TIME[name]} {value:.1f}" for name, value in taken.items()),
        ),
        ("traffic of a step", _traffic(numbers["traffic_gb"], seconds) if cluster["gpus"] > 1 else "none"),
        ("speed", f"{numbers['images_per_second']:,.0f} images/s, {numbers['share_of_peak']:.0%} of the peak"),
        (
            "run",
            f"{numbers['steps']:,} steps: {numbers['hours']:,.1f} hours, {numbers['gpu_hours']:,.0f} GPU hours{cost}",
        ),
    ]
    if numbers["batch"]["stages"] > 1:
        rows.insert(1, ("bubble", f"{numbers['batch']['bubble']:.1%} of the time of what is trained"))
    return rows


def _traffic(gigabytes: dict[str, float], seconds: dict[str, float]) -> str:
    text = (
        f"{gigabytes['reduced']:.2f} GB of gradients summed ({1e3 * seconds['reduce_hidden']:.1f} ms of it beside the "
        f"backward pass), {gigabytes['gathered_weights']:.2f} GB of weights gathered "
        f"({1e3 * seconds['weights_hidden']:.1f} ms beside the target's pass), {gigabytes['gathered_average']:.2f} GB "
        "of the average"
    )
    between = gigabytes["between_stages"]
    return text + (f", {between:.2f} GB between stages" if between else "")


def _what_fits(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    loader, largest = numbers["loader"], numbers["largest_micro_batch"]
    in_memory = loader["beton_stays_in_memory"]
    stays = "" if in_memory is None else f" of {loader['host_memory_gb']:g}: {'enough' if in_memory else 'NOT enough'}"
    needed = [f"{what} {'needed' if numbers[f'{key}_needed'] else 'not needed'}" for what, key in _NEEDS.items()]
    return [
        (
            "loader of a node",
            f"{loader['images_per_second_of_a_node']:,.0f} images/s: {loader['cores_of_a_node']} "
            f"core{'s' * (loader['cores_of_a_node'] > 1)} at {loader['measured_images_per_second_of_a_core']:,} a core "
            "(measured on an AMD EPYC; decoding alone "
            f"{loader['measured_decoding_per_second_of_a_core']:,})",
        ),
        (
            "host memory",
            f"{loader['host_memory_needed_gb']:.0f} GB{stays}, {loader['beton_gb']:.1f} of them the .beton, so that it "
            "is read from the disk once",
        ),
        ("what fits", f"micro-batches of up to {largest if largest else 'nothing'}; {', '.join(needed)}"),
    ]


_NEEDS = {"checkpointing": "checkpointing", "stages": "stages"}


def _wrapped(text: str, label: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=label, subsequent_indent=" " * len(label))
