"""``python -m ijepa_ds evaluate``: what a frozen encoder's features know, beside what they would know untrained.

Frozen features are extracted once, without augmentation, and probed: linear (logistic regression; ridge for continuous
labels) and weighted kNN. Every number stands beside two baselines from the same run: the same encoder at random
initialisation, over several seeds, and raw pixels. Weights are the target encoder's (METHOD: always).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ijepa_ds.build import build_encoder
from ijepa_ds.checkpoint import checkpoint_step, list_checkpoints
from ijepa_ds.config import Config, load_config
from ijepa_ds.distributed import Process, share_cpu_threads
from ijepa_ds.encoder import VisionTransformer
from ijepa_ds.engine import working_dtype
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.features import Features, extract_features, spread_samples
from ijepa_ds.evaluation.knn import knn_accuracy
from ijepa_ds.evaluation.linear import bin_edges, linear_probe, ridge_regression, to_bins
from ijepa_ds.exchange import target_encoder_weights
from ijepa_ds.ijepa import normalize_images
from ijepa_ds.loader import EvaluationLoader, inspect_dataset
from ijepa_ds.run_folder import read_run_config, versions

DEPTH_BINS = 6
_PIXELS = 16  # raw pixels are compared at 16 x 16


@dataclass(frozen=True)
class Score:
    """One probe of one encoder on one label: accuracy in percent; the error where the label is continuous."""

    encoder: str  # "trained", "random" or "pixels"
    seed: int
    label: str
    features: str  # "last", "last4" or "pixels"
    linear: float
    knn: float
    mean_absolute_error: float | None = None


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds evaluate``."""
    parser = argparse.ArgumentParser(prog="python -m ijepa_ds evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run folder, one of its checkpoints, or a .safetensors")
    parser.add_argument("--config", help="the configuration, where --checkpoint is a .safetensors")
    parser.add_argument("--train", help="labelled .beton to fit the probes on (default: the config's data.train)")
    parser.add_argument("--validation", help="labelled .beton to measure on (default: the config's data.validation)")
    parser.add_argument("--train-images", type=int, help="use at most so many, evenly spread")
    parser.add_argument("--validation-images", type=int)
    parser.add_argument("--random-seeds", type=int, default=3, help="how many random encoders to compare with")
    parser.add_argument("--out", help="folder for results.json (default: the run folder's evaluation/)")
    options = parser.parse_args(arguments)
    if options.random_seeds < 2:
        raise UserError("--random-seeds must be at least 2: a standard deviation needs two")
    for name in ("train_images", "validation_images"):
        count = getattr(options, name)
        if count is not None and count < 1:
            raise UserError(f"--{name.replace('_', '-')} = {count} must be at least 1; leave it out to use all")
    evaluate(options)
    return 0


def evaluate(options: argparse.Namespace) -> list[Score]:
    """Probe, print the table, write results.json."""
    share_cpu_threads()
    config, weights, source = load_target(Path(options.checkpoint), options.config)
    process = Process(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    data = config.ijepa.data
    paths = (options.train or data.train, options.validation or data.validation)
    if paths[1] is None:
        raise UserError("there is nothing to measure on: give --validation FILE.beton, or set ijepa.data.validation")
    limits = (options.train_images, options.validation_images)
    loaders = [_loader(config, path) for path in paths]
    fields = [name for name in loaders[0].label_fields if name in loaders[1].label_fields]
    if not fields:
        raise UserError(
            f"{paths[0]} and {paths[1]} share no label field; convert labelled images with data_prep/to_ffcv.py"
        )

    def extract(forward: Callable[[Tensor], Tensor]) -> list[Features]:
        return [
            extract_features(forward, loader, spread_samples(loader.dataset.num_samples, limit), process)
            for loader, limit in zip(loaders, limits, strict=True)
        ]

    scores: list[Score] = []
    print(f"measuring the TARGET encoder of {source}; labels: {', '.join(fields)}", flush=True)
    encoders = [("trained", 0, weights)] + [("random", seed, None) for seed in range(options.random_seeds)]
    for name, seed, state in encoders:
        encoder = build_encoder(config, torch.Generator().manual_seed(config.ijepa.run.seed + seed))
        if state is not None:
            encoder.load_state_dict(state)
        train, validation = extract(_forward(encoder, config, process))
        width = encoder.embed_dim
        for features, columns in (("last", slice(-width, None)), ("last4", slice(None))):
            scores += _probe(name, seed, features, columns, train, validation, fields)
        _show_progress(scores, name, seed)
    scores += _probe("pixels", 0, "pixels", slice(None), *extract(_pixels), fields)
    table = format_table(scores, fields)
    print(table, flush=True)
    out = Path(options.out) if options.out else _default_out(Path(options.checkpoint))
    _write_results(out, source, config, scores, options)
    return scores


def load_target(path: Path, config_path: str | None) -> tuple[Config, dict[str, Tensor], str]:
    """Configuration, the target encoder's state dict, and what it is, from a run folder, a checkpoint or a file."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder, such as runs/scenes_tiny")
    if path.is_file():
        if config_path is None:
            raise UserError(f"{path} is a file of weights: name its configuration with --config FILE.json")
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error})") from error
        config = load_config(config_path)
        _check_fits(weights, config, path)
        return config, weights, str(path)
    run = path.resolve().parent.parent if (path / "state.json").exists() else path
    config = read_run_config(run)
    checkpoint = path
    if run == path:
        found = list_checkpoints(run / "checkpoints")
        if not found:
            raise UserError(f"{run} has no checkpoint yet; train first: deepspeed run.py --config FILE.json")
        checkpoint = found[-1]
    weights = target_encoder_weights(checkpoint, config.grid)
    return config, weights, f"{run} at step {checkpoint_step(checkpoint)}"


def format_table(scores: list[Score], fields: list[str]) -> str:
    """The comparison a reader wants: trained, random (mean and deviation over seeds), pixels, and the margin."""
    lines = ["", f"{'label':<10}{'probe':<8}{'features':<10}{'trained':>9}{'random':>16}{'pixels':>9}{'margin':>28}"]
    for label in fields:
        for probe in ("linear", "knn"):
            pixels = _values(scores, "pixels", label, "pixels", probe)[0]
            for features in ("last", "last4"):
                trained = _values(scores, "trained", label, features, probe)[0]
                random = _values(scores, "random", label, features, probe)
                mean, deviation = statistics.mean(random), statistics.stdev(random)
                margin = f"{trained - mean:+.1f} points = {(trained - mean) / max(deviation, 1e-3):+.1f} sd"
                lines.append(
                    f"{label:<10}{probe:<8}{features:<10}{trained:>8.2f}%{mean:>8.2f} ± {deviation:.2f}%"
                    f"{pixels:>8.2f}%{margin:>28}"
                )
    return "\n".join(lines)


def margins(scores: list[Score], label: str, features: str = "last") -> tuple[float, float]:
    """Of the linear probe: trained minus mean random accuracy in points, and in deviations of the random encoders."""
    random = _values(scores, "random", label, features, "linear")
    difference = _values(scores, "trained", label, features, "linear")[0] - statistics.mean(random)
    return difference, difference / max(statistics.stdev(random), 1e-3)


def _forward(encoder: VisionTransformer, config: Config, process: Process) -> Callable[[Tensor], Tensor]:
    """uint8 images -> the last four blocks' normed features, averaged over patches and concatenated: [B, 4 D]."""
    dtype, data = working_dtype(config), config.ijepa.data
    encoder.to(process.device, dtype).eval()
    mean, std = (torch.tensor(values, device=process.device) for values in (data.mean, data.std))

    def forward(images: Tensor) -> Tensor:
        blocks = encoder(
            normalize_images(images, mean=mean, std=std, dtype=dtype), blocks_out=min(4, len(encoder.blocks))
        )
        return torch.cat([block.float().mean(1) for block in (blocks if isinstance(blocks, list) else [blocks])], dim=1)

    return forward


def _pixels(images: Tensor) -> Tensor:
    small = F.interpolate(images.permute(0, 3, 1, 2).float() / 255, size=(_PIXELS, _PIXELS), mode="area")
    return small.flatten(1)


def _probe(name, seed, features, columns, train: Features, validation: Features, fields) -> list[Score]:
    scores = []
    for label in fields:
        bank, queries = train.values[:, columns], validation.values[:, columns]
        train_labels, labels, error = train.labels[label], validation.labels[label], None
        if train_labels.is_floating_point():
            error = ridge_regression(bank, train_labels, queries, labels, seed=0).mean_absolute_error
            edges = bin_edges(train_labels, DEPTH_BINS)
            train_labels, labels = to_bins(train_labels, edges), to_bins(labels, edges)
        else:
            classes = torch.unique(torch.cat([train_labels, labels]))  # 3 to 10 objects are classes 0 to 7
            train_labels, labels = torch.searchsorted(classes, train_labels), torch.searchsorted(classes, labels)
        num_classes = int(max(train_labels.max(), labels.max())) + 1
        linear = linear_probe(bank, train_labels, queries, labels, num_classes=num_classes, seed=0).accuracy
        knn = max(knn_accuracy(bank, train_labels, queries, labels, num_classes=num_classes).values())
        scores.append(Score(name, seed, label, features, linear, knn, error))
    return scores


def _loader(config: Config, path: str) -> EvaluationLoader:
    data = config.ijepa.data
    return EvaluationLoader(inspect_dataset(path), image_size=data.image_size, batch_size=256, num_workers=data.workers)


def _values(scores: list[Score], encoder: str, label: str, features: str, probe: str) -> list[float]:
    return [
        getattr(score, probe)
        for score in scores
        if (score.encoder, score.label, score.features) == (encoder, label, features)
    ]


def _show_progress(scores: list[Score], name: str, seed: int) -> None:
    own = [score for score in scores if (score.encoder, score.seed) == (name, seed)]
    print(f"{name} {seed}: " + "  ".join(f"{s.label}/{s.features} {s.linear:.1f}%" for s in own), flush=True)


def _check_fits(weights: dict[str, Tensor], config: Config, path: Path) -> None:
    with torch.device("meta"):
        expected = build_encoder(config).state_dict()
    wrong = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in weights or name not in expected or weights[name].shape != expected[name].shape
    )
    if wrong:
        raise UserError(f"{path} does not fit the configuration: {len(wrong)} tensors differ, such as {wrong[0]}")


def _default_out(checkpoint: Path) -> Path:
    if checkpoint.is_file():
        return checkpoint.parent / "evaluation"
    return (checkpoint if (checkpoint / "config.json").exists() else checkpoint.parent.parent) / "evaluation"


def _write_results(out: Path, source: str, config: Config, scores: list[Score], options: argparse.Namespace) -> None:
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "source": source,
        "encoder": "target",
        "options": vars(options),
        "versions": versions(),
        "config": config.as_dict(),
        "scores": [asdict(score) for score in scores],
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten: {out / 'results.json'}", flush=True)
