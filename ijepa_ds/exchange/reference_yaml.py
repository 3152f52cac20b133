"""``python -m ijepa_ds convert-config``: our JSON from a YAML of the released code.

Every key of that code is either translated, or listed with the reason why it has no place here, or refused.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import yaml

from ijepa_ds.config import parse_config
from ijepa_ds.errors import UserError
from ijepa_ds.method.masks import default_context_tokens

WORLD_SIZE = 16  # of the released configurations for 224 pixels: their batch_size is the images of one GPU
MODELS = ("tiny", "small", "base", "large", "huge", "giant")
_DATA = ("data/imagenet/train.beton", "data/imagenet/val.beton")

# What is translated: section.key -> what kind of value it must be.
_TRANSLATED = {
    "data.batch_size": "count",
    "data.crop_scale": "pair",
    "data.crop_size": "count",
    "data.num_workers": "count",
    "mask.aspect_ratio": "pair",
    "mask.enc_mask_scale": "pair",
    "mask.min_keep": "number",
    "mask.num_pred_masks": "count",
    "mask.patch_size": "count",
    "mask.pred_mask_scale": "pair",
    "meta.model_name": "string",
    "meta.pred_depth": "count",
    "meta.pred_emb_dim": "count",
    "meta.use_bfloat16": "switch",
    "optimization.ema": "pair",
    "optimization.epochs": "number",
    "optimization.final_lr": "number",
    "optimization.final_weight_decay": "number",
    "optimization.ipe_scale": "number",
    "optimization.lr": "number",
    "optimization.start_lr": "number",
    "optimization.warmup": "number",
    "optimization.weight_decay": "number",
}
# What must have one value: that value, and why no other is supported.
_FIXED = {
    "data.use_color_distortion": (False, "I-JEPA is trained without colour augmentation, and the loader has none"),
    "data.use_gaussian_blur": (False, "I-JEPA is trained without blur, and the loader has none"),
    "data.use_horizontal_flip": (False, "I-JEPA is trained without flips, and the loader has none"),
    "mask.allow_overlap": (False, "here the context block never overlaps a target block, as in the paper"),
    "mask.num_enc_masks": (1, "here an image has one context block, as in the paper"),
}
# What has no place here, and why.
_DROPPED = {
    "data.color_jitter_strength": "it only acts with use_color_distortion",
    "data.image_folder": "images come from a .beton file: --train",
    "data.root_path": "images come from a .beton file: --train",
    "data.pin_mem": "the loader decides about its own buffers",
    "logging.folder": "a run's folder is ijepa.run.folder/ijepa.run.name",
    "logging.write_tag": "a run's folder is ijepa.run.folder/ijepa.run.name",
    "meta.copy_data": "a .beton is read where it is",
    "meta.load_checkpoint": "the same command goes on from the newest checkpoint by itself",
    "meta.read_checkpoint": "to start from a checkpoint of that code: python -m ijepa_ds import",
}
_KINDS = {
    "count": ("a whole number of at least 1", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1),
    "number": ("a number of at least 0", lambda v: _is_number(v) and v >= 0),
    "pair": ("a list of two numbers", lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_number, v))),
    "switch": ("true or false", lambda v: isinstance(v, bool)),
    "string": ("a string", lambda v: isinstance(v, str)),
}
_HELP = """
Keys that have no place here are listed with the reason; values that cannot be had are refused.
docs/recipe.md has the whole table, and where the released code and this project differ.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds convert-config``."""
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_ds convert-config",
        description="Write our configuration from a YAML of the released I-JEPA code.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("yaml", metavar="REFERENCE.yaml")
    parser.add_argument("--out", metavar="FILE.json", help="default: print it")
    parser.add_argument("--train", metavar="X.beton", help=f"training images (default: {_DATA[0]})")
    parser.add_argument("--validation", metavar="Y.beton", help="labelled images for kNN during training")
    parser.add_argument(
        "--world-size", type=int, metavar="N",
        help=f"GPUs that the YAML was meant for: its batch_size is per GPU (default: {WORLD_SIZE})",
    )  # fmt: skip
    parser.add_argument(
        "--sampler",
        choices=("multiblock", "reference"),
        default="multiblock",
        help="multiblock (default): the paper's masks; reference: the released code's, defects included",
    )
    options = parser.parse_args(arguments)
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world-size {options.world_size} must be at least 1")
    data = (options.train or _DATA[0], options.validation or (None if options.train else _DATA[1]))
    config, notes = convert(
        read_yaml(options.yaml), source=options.yaml, world_size=options.world_size, sampler=options.sampler, data=data
    )
    text = json.dumps(config, indent=2) + "\n"
    if options.out is None:
        print(text, end="")
    else:
        out = Path(options.out)
        if out.exists():
            raise UserError(f"--out {out} exists already and is not overwritten; choose another name or remove it")
        try:
            out.write_text(text)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written ({error}); choose another place") from None
        notes.append(f"written: {out}; train with: deepspeed run.py --config {out}")
    print("\n".join(notes), file=sys.stderr if options.out is None else sys.stdout)
    return 0


def read_yaml(path: str) -> dict[str, Any]:
    """``section.key`` -> value of a YAML file of sections; :class:`UserError` where it is none."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); mend it there") from None
    if not isinstance(raw, dict) or not all(isinstance(section, dict) for section in raw.values()):
        raise UserError(f"{path} must hold sections as the released code's do: data, logging, mask, meta, optimization")
    return {f"{section}.{key}": value for section, values in raw.items() for key, value in values.items()}


def convert(
    values: dict[str, Any],
    *,
    source: str,
    world_size: int | None,
    sampler: str,
    data: tuple[str, str | None],
) -> tuple[dict[str, Any], list[str]]:
    """(configuration as it would stand in a file, notes for the user, a sentence each).

    Args:
        values: ``section.key`` -> value, as :func:`read_yaml` gives it.
        source: the file's name, for messages.
        world_size: GPUs that the YAML was meant for; None takes 16 and notes it.
        sampler: "multiblock" or "reference".
        data: .beton files of training and validation images.

    Raises:
        UserError: naming all unknown and missing keys and unsupported values.
    """
    values = {key: _number_of_text(value, key) for key, value in values.items()}
    _check(values, source)
    world_size_given, world_size = world_size is not None, world_size or WORLD_SIZE
    batch, size, patch = values["data.batch_size"], values["data.crop_size"], values["mask.patch_size"]
    encoder = values["meta.model_name"].removeprefix("vit_")
    masks: dict[str, Any] = {
        "sampler": sampler,
        "num_targets": values["mask.num_pred_masks"],
        "target_scale": values["mask.pred_mask_scale"],
        "target_aspect_ratio": values["mask.aspect_ratio"],
        "context_scale": values["mask.enc_mask_scale"],
    }
    if sampler == "reference":
        masks |= {"min_keep": int(values["mask.min_keep"]), "truncation_group": batch}
    elif size % patch == 0:  # else parse_config says what is wrong with it
        masks["context_tokens"] = default_context_tokens((size // patch, size // patch))
    config = {
        "train_batch_size": batch * world_size,
        "train_micro_batch_size_per_gpu": batch,
        "bf16": {"enabled": values["meta.use_bfloat16"]},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "ijepa": {
            "run": {"name": f"vit{encoder[0]}{patch}" + (f"_{size}" if size != 224 else "")},
            "data": {
                "train": data[0],
                **({"validation": data[1]} if data[1] is not None else {}),
                "image_size": size,
                "crop_scale": values["data.crop_scale"],
                "workers": values["data.num_workers"],
            },
            "model": {
                "encoder": encoder,
                "patch_size": patch,
                "predictor_width": values["meta.pred_emb_dim"],
                "predictor_depth": values["meta.pred_depth"],
            },
            "masks": masks,
            "optimization": {
                "epochs": values["optimization.epochs"],
                "warmup_epochs": values["optimization.warmup"],
                "schedule_scale": values["optimization.ipe_scale"],
                "lr_start": values["optimization.start_lr"],
                "lr_peak": values["optimization.lr"],
                "lr_final": values["optimization.final_lr"],
                "weight_decay": [values["optimization.weight_decay"], values["optimization.final_weight_decay"]],
                "momentum": values["optimization.ema"],
            },
        },
    }
    parse_config(config, source=f"{source}, converted,")
    return config, _notes(values, config, world_size, world_size_given)


def _check(values: dict[str, Any], source: str) -> None:
    known = {*_TRANSLATED, *_FIXED, *_DROPPED}
    problems = [f"{key} is not a key of the released code" for key in values if key not in known]
    for key, kind in _TRANSLATED.items():
        expected, fits = _KINDS[kind]
        if key not in values:
            problems.append(f"{key} is missing")
        elif not fits(values[key]):
            problems.append(f"{key} = {values[key]!r} must be {expected}")
    for key, (supported, reason) in _FIXED.items():
        if key in values and values[key] != supported:
            problems.append(f"{key} = {values[key]!r} is not supported, only {supported!r}: {reason}")
    model = values.get("meta.model_name")
    if isinstance(model, str) and model.removeprefix("vit_") not in MODELS:
        problems.append(f"meta.model_name = {model!r} must be one of {', '.join(f'vit_{name}' for name in MODELS)}")
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"{source} cannot be converted, {len(problems)} problem{'s' * (len(problems) > 1)}:{lines}")


def _notes(values: dict[str, Any], config: dict[str, Any], world_size: int, given: bool) -> list[str]:
    batch = values["data.batch_size"]
    notes = [
        f"batch: {batch} images a GPU there x {world_size} GPUs = {config['train_batch_size']} a step"
        + ("" if given else f"; {world_size} GPUs are those of the released configurations, give --world-size if not")
    ]
    masks = config["ijepa"]["masks"]
    if masks["sampler"] == "multiblock":
        notes.append(
            f"masks: the paper's (multiblock) with {masks['context_tokens']} context tokens an image, not that code's, "
            "which depend on the images a GPU and never use the last row and column; those: --sampler reference "
            f"(mask.min_keep = {values['mask.min_keep']} acts there alone)"
        )
    else:
        notes.append(f"masks: that code's, the context cut to the smallest of {batch} images: its images of one GPU")
    if values["meta.use_bfloat16"]:
        notes.append(
            "precision: bf16 weights with fp32 masters; that code's autocast of fp32 weights is "
            '"torch_autocast": {"enabled": true, "dtype": "bfloat16"} in place of "bf16"'
        )
    notes += [f"{key} has no counterpart: {reason}" for key, reason in _DROPPED.items() if key in values]
    return notes


def _number_of_text(value: Any, key: str) -> Any:
    """YAML reads 1e-6, without a point, as a string."""
    if isinstance(value, str) and _TRANSLATED.get(key) == "number":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
