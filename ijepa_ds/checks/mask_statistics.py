"""What a mask sampler draws, in numbers and as a picture: ``python -m ijepa_ds masks``.

Shapes: N patches (rows x columns of the grid), K context tokens, M target blocks, T tokens of a target block.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ijepa_ds.build import build_sampler
from ijepa_ds.config import load_config
from ijepa_ds.errors import UserError
from ijepa_ds.method.masks import MaskSampler, ReferenceSampler

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# A group's smallest context spreads by about 9 tokens: fewer groups would not tell the mean to half a token.
_LEAST_GROUPS = 1000
_EXAMPLES = 8


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds masks``."""
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_ds masks",
        description="Draw masks as a configuration has them and say what they look like. Every image has block sizes "
        "of its own here, as the recorded statistics of the released code have; for the reference sampler also what "
        "is left after the cut to the smallest context of a truncation group.",
    )
    parser.add_argument("--config", required=True, help="a file of ds_configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="as for run.py")
    parser.add_argument("--sampler", choices=("multiblock", "reference"), help="instead of the configuration's")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--json", action="store_true", help="all numbers, coverage of every patch included")
    parser.add_argument("--picture", metavar="OUT.png", help="examples and coverage maps")
    options = parser.parse_args(arguments)
    if options.images < 1:
        raise UserError(f"--images = {options.images} must be at least 1")
    config = load_config(options.config, options.set)
    if options.sampler:
        config = config.changed("masks", sampler=options.sampler)
    sampler = build_sampler(config)
    statistics = mask_statistics(sampler, options.images)
    if isinstance(sampler, ReferenceSampler):
        statistics["truncated"] = truncated_statistics(sampler, options.images)
    statistics = {"sampler": config.ijepa.masks.sampler, **statistics}
    print(json.dumps(statistics) if options.json else _table(statistics))
    if options.picture:
        _draw(sampler, statistics, Path(options.picture))
        if not options.json:
            print(f"written: {options.picture}")
    return 0


def mask_statistics(sampler: MaskSampler, num_images: int) -> dict[str, Any]:
    """Statistics of images that each have a step, so block sizes, of their own; nothing is truncated.

    ``context_coverage_by_patch`` is the share of images whose context holds a patch, ``target_coverage_by_patch`` the
    share of target blocks that hold it, ``target_union_tokens`` the patches in any target block of an image.
    """
    num_patches = sampler.grid[0] * sampler.grid[1]
    context, target = np.zeros(num_patches, np.int64), np.zeros(num_patches, np.int64)
    counts, unions = np.empty(num_images, np.int64), np.empty(num_images, np.int64)
    shapes: Counter[str] = Counter()
    for image in range(num_images):
        tokens, blocks = sampler.draw(image, image)
        context[tokens] += 1
        target += np.bincount(blocks.ravel(), minlength=num_patches)
        counts[image], unions[image] = len(tokens), len(np.unique(blocks))
        rows, columns = sampler.block_sizes(image).target
        shapes[f"{rows}x{columns}"] += 1
    return {
        "images": num_images,
        "grid": list(sampler.grid),
        "context_scale": list(sampler.context_scale),
        "target_scale": list(sampler.target_scale),
        "target_aspect_ratio": list(sampler.target_aspect_ratio),
        "targets": sampler.num_targets,
        "min_keep": sampler.min_keep if isinstance(sampler, ReferenceSampler) else None,
        "context_tokens": {
            **_summary(counts),
            "min": int(counts.min()),
            "max": int(counts.max()),
            "quantiles": {str(q): float(np.quantile(counts, q)) for q in QUANTILES},
        },
        "target_union_tokens": _summary(unions),
        "target_block_height_width": {shape: shapes[shape] / num_images for shape in sorted(shapes)},
        "context_coverage_by_patch": _map(context / num_images, sampler),
        "target_coverage_by_patch": _map(target / (num_images * sampler.num_targets), sampler),
    }


def truncated_statistics(sampler: ReferenceSampler, num_images: int) -> dict[str, Any]:
    """The context that is left where each group of ``truncation_group`` images keeps its smallest number of tokens.

    A group shares its block sizes and loses the last tokens in row order, as the images of one GPU did in the released
    code. At least a thousand groups are drawn. ``context_lost_by_row`` is the share of a row's tokens that the cut
    took.
    """
    group = sampler.truncation_group
    num_groups = max(_LEAST_GROUPS, num_images // group)
    whole, left = (np.zeros(sampler.grid[0] * sampler.grid[1], np.int64) for _ in range(2))
    kept = np.empty(num_groups, np.int64)
    for step in range(num_groups):
        drawn = [sampler.draw(step, sample)[0] for sample in range(group)]
        kept[step] = min(map(len, drawn))
        whole += np.bincount(np.concatenate(drawn), minlength=len(whole))
        left += np.bincount(np.concatenate([tokens[: kept[step]] for tokens in drawn]), minlength=len(left))
    by_row = whole.reshape(sampler.grid).sum(1), left.reshape(sampler.grid).sum(1)
    return {
        "truncation_group": group,
        "images": num_groups * group,
        "context_tokens": {**_summary(kept), "min": int(kept.min()), "max": int(kept.max())},
        "context_lost_by_row": [float(1 - b / a) if a else None for a, b in zip(*by_row, strict=True)],
        "context_coverage_by_patch": _map(left / (num_groups * group), sampler),
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std())}


def _map(shares: np.ndarray, sampler: MaskSampler) -> list[list[float]]:
    return [[round(float(share), 4) for share in row] for row in shares.reshape(sampler.grid)]


def _table(statistics: dict[str, Any]) -> str:
    tokens, union = statistics["context_tokens"], statistics["target_union_tokens"]
    rows, columns = statistics["grid"]
    lines = [
        f"{statistics['sampler']} on {rows} x {columns} patches, {statistics['images']:,} images",
        f"context tokens      {tokens['mean']:.2f} ± {tokens['std']:.2f} ({tokens['min']} to {tokens['max']})",
        "  quantiles         " + "  ".join(f"{name}: {value:.0f}" for name, value in tokens["quantiles"].items()),
        f"in any target block {union['mean']:.2f} ± {union['std']:.2f}",
        "target blocks, rows x columns",
        *(f"  {shape:<8}{share:>8.4f}" for shape, share in statistics["target_block_height_width"].items()),
        "coverage by row     context " + _line(statistics["context_coverage_by_patch"], 1),
        "                    target  " + _line(statistics["target_coverage_by_patch"], 1),
        "coverage by column  context " + _line(statistics["context_coverage_by_patch"], 0),
        "                    target  " + _line(statistics["target_coverage_by_patch"], 0),
    ]
    if "truncated" in statistics:
        cut = statistics["truncated"]
        tokens = cut["context_tokens"]
        lost = ["-" if share is None else f"{share:.0%}" for share in cut["context_lost_by_row"]]
        lines += [
            f"cut to the smallest context of {cut['truncation_group']} images, {cut['images']:,} images",
            f"  context tokens    {tokens['mean']:.2f} ± {tokens['std']:.2f} ({tokens['min']} to {tokens['max']})",
            f"  lost by row       {' '.join(lost)}",
        ]
    return "\n".join(lines)


def _line(coverage: list[list[float]], axis: int) -> str:
    return " ".join(f"{share:.2f}" for share in np.mean(coverage, axis=axis))


def _draw(sampler: MaskSampler, statistics: dict[str, Any], path: Path) -> None:
    """Eight examples above, coverage maps with their row and column means below."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # not pyplot: nothing here is to be shown in a window

    maps = {"context": statistics["context_coverage_by_patch"], "targets": statistics["target_coverage_by_patch"]}
    if "truncated" in statistics:
        group = statistics["truncated"]["truncation_group"]
        maps = {
            "context, not cut": maps["context"],
            f"context, cut in groups of {group}": statistics["truncated"]["context_coverage_by_patch"],
            "targets": maps["targets"],
        }
    figure = Figure(figsize=(16, 8.5), layout="constrained")
    figure.suptitle(f"{statistics['sampler']} masks on {sampler.grid[0]} x {sampler.grid[1]} patches")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 2.6))
    above, below = parts
    above.suptitle(
        "examples: context (dark), target blocks (a colour each; where they overlap, the last one)", fontsize=10
    )
    colours = ListedColormap(["#e6e6e6", "#333333", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#0072b2"])
    for image, axes in enumerate(above.subplots(1, _EXAMPLES)):
        tokens, blocks = sampler.draw(image, image)
        drawn = np.zeros(sampler.grid[0] * sampler.grid[1])
        drawn[tokens] = 1
        for number, block in enumerate(blocks):
            drawn[block] = 2 + number % 6
        axes.imshow(drawn.reshape(sampler.grid), cmap=colours, vmin=0, vmax=7, interpolation="nearest")
        axes.set(xticks=[], yticks=[], title=f"{len(tokens)} for {len(blocks)} x {blocks.shape[1]}")
    for axes, (title, coverage) in zip(below.subplots(2, len(maps), height_ratios=(2, 1)).T, maps.items(), strict=True):
        shown = axes[0].imshow(coverage, cmap="viridis", vmin=0)
        axes[0].set(title=f"share of {'blocks' if title == 'targets' else 'images'}: {title}")
        below.colorbar(shown, ax=axes[0])
        axes[1].plot(np.mean(coverage, axis=1), "o-", label="mean of each row")
        axes[1].plot(np.mean(coverage, axis=0), "s--", label="mean of each column")
        axes[1].set(xlabel="row, column", ylabel="coverage", ylim=(0, None))
        axes[1].legend()
    try:
        figure.savefig(path, dpi=90, format="png")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); give another --picture") from None
