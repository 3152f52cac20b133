"""``python -m ijepa_ds convert-config``: our JSON from a YAML of the released code.

Every key of that code is either translated, or listed with the reason why it has no place here, or refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo

from ijepa_ds.config import parse_config
from ijepa_ds.errors import UserError, listing
from ijepa_ds.method.encoder import NAMED_DIMENSIONS
from ijepa_ds.method.masks import default_context_tokens
from ijepa_ds.validation import Checked, Count, Pair, check, check_levels, must, read_bytes, reason

WORLD_SIZE = 16  # of the released configurations for 224 pixels: their batch_size is the images of one GPU
_DATA = ("data/imagenet/train.beton", "data/imagenet/val.beton")
_BETON = "images come from a .beton file: --train"
_FOLDER = "a run's folder is ijepa.run.folder/ijepa.run.name"
_HELP = """
Keys that have no place here are listed with the reason; values that cannot be had are refused.
docs/configuration.md has the whole table, docs/recipe.md where the released code and this project differ.
"""


def _number_of_text(value: Any) -> Any:
    """YAML reads 1e-6, without a point, as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


ModelName = Annotated[
    str,
    must(
        lambda name: name.removeprefix("vit_") in NAMED_DIMENSIONS,
        f"must be one of {', '.join(f'vit_{name}' for name in NAMED_DIMENSIONS)}",
    ),
    AfterValidator(lambda name: name.removeprefix("vit_")),
]
Number = Annotated[float, Field(ge=0), BeforeValidator(_number_of_text)]


def _becomes(key: str, note: str = "") -> Any:
    """A key whose value goes into ``key`` of ours."""
    return Field(description=note, json_schema_extra={"ours": key})


def _dropped(reason: str) -> Any:
    """A key that has no place here."""
    return Field(None, description=reason)


def _only(value: Any, reason: str) -> Any:
    """A key that may be left out, and has this value where it is not."""
    return Field(value, description=reason)


class _Section(Checked):
    unknown: ClassVar[str] = "is not a key of the released code"


class _Data(_Section):
    batch_size: Count = _becomes("train_micro_batch_size_per_gpu", "times the GPUs it is train_batch_size")
    color_jitter_strength: Any = _dropped("it only acts with use_color_distortion")
    crop_scale: Pair[float] = _becomes("ijepa.data.crop_scale")
    crop_size: Count = _becomes("ijepa.data.image_size")
    image_folder: Any = _dropped(_BETON)
    num_workers: Count = _becomes("ijepa.data.workers", "processes there, threads here")
    pin_mem: Any = _dropped("the loader decides about its own buffers")
    root_path: Any = _dropped(_BETON)
    use_color_distortion: Literal[False] = _only(False, "the method has no colour augmentation, nor has the loader")
    use_gaussian_blur: Literal[False] = _only(False, "the method has no blur, nor has the loader")
    use_horizontal_flip: Literal[False] = _only(False, "the method has no flips, nor has the loader")


class _Logging(_Section):
    folder: Any = _dropped(_FOLDER)
    write_tag: Any = _dropped(_FOLDER)


class _Mask(_Section):
    allow_overlap: Literal[False] = _only(False, "the context block never overlaps a target block, as in the paper")
    aspect_ratio: Pair[float] = _becomes("ijepa.masks.target_aspect_ratio")
    enc_mask_scale: Pair[float] = _becomes("ijepa.masks.context_scale")
    min_keep: Number = _becomes("ijepa.masks.min_keep", "multiblock has context_tokens in its place")
    num_enc_masks: Literal[1] = _only(1, "an image has one context block, as in the paper")
    num_pred_masks: Count = _becomes("ijepa.masks.num_targets")
    patch_size: Count = _becomes("ijepa.model.patch_size")
    pred_mask_scale: Pair[float] = _becomes("ijepa.masks.target_scale")


class _Meta(_Section):
    copy_data: Any = _dropped("a .beton is read where it is")
    load_checkpoint: Any = _dropped("the same command goes on from the newest checkpoint by itself")
    model_name: ModelName = _becomes("ijepa.model.encoder", "vit_huge is huge")
    pred_depth: Count = _becomes("ijepa.model.predictor_depth")
    pred_emb_dim: Count = _becomes("ijepa.model.predictor_width")
    read_checkpoint: Any = _dropped("to start from a checkpoint of that code: python -m ijepa_ds import")
    use_bfloat16: bool = _becomes("bf16.enabled", "torch_autocast has that code's own numerics")


class _Optimization(_Section):
    ema: Pair[float] = _becomes("ijepa.optimization.momentum")
    epochs: Number = _becomes("ijepa.optimization.epochs")
    final_lr: Number = _becomes("ijepa.optimization.lr_final")
    final_weight_decay: Number = _becomes("ijepa.optimization.weight_decay", "the second")
    ipe_scale: Number = _becomes("ijepa.optimization.schedule_scale")
    lr: Number = _becomes("ijepa.optimization.lr_peak")
    start_lr: Number = _becomes("ijepa.optimization.lr_start")
    warmup: Number = _becomes("ijepa.optimization.warmup_epochs")
    weight_decay: Number = _becomes("ijepa.optimization.weight_decay", "the first")


class Released(_Section):
    """A configuration of the released code."""

    data: _Data
    logging: _Logging
    mask: _Mask
    meta: _Meta
    optimization: _Optimization

    @classmethod
    def fields(cls) -> Iterator[tuple[str, str, FieldInfo, str]]:
        """Section, key and field of all that it may hold, and the key of ours."""
        for name, section in cls.model_fields.items():
            for key, field in getattr(section.annotation, "model_fields", {}).items():
                yield name, key, field, (field.json_schema_extra or {}).get("ours", "")


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
    released = read_yaml(options.yaml)
    config, notes = convert(
        released, source=options.yaml, world_size=options.world_size, sampler=options.sampler, data=data
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


def read_yaml(path: str) -> Released:
    """The released code's configuration in a YAML file; what is unknown, missing or not supported is all named."""
    try:
        raw = yaml.safe_load(read_bytes(path))
        check_levels(raw)
    except (OSError, ValueError, yaml.YAMLError) as error:  # a date that is none, or a number of 4,300 digits
        raise UserError(f"{path} cannot be read as YAML ({reason(error)}); mend it there") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read as YAML (its lists are too deep); mend it there") from None
    if not isinstance(raw, dict) or not all(isinstance(section, dict) for section in raw.values()):
        raise UserError(f"{path} must hold sections as the released code's do: {', '.join(Released.model_fields)}")
    released, problems = check(Released, raw)
    if released is None:
        number = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise UserError(f"{path} cannot be converted, {number}:{listing(problems)}")
    return released


def convert(
    released: Released, *, source: str, world_size: int | None, sampler: str, data: tuple[str, str | None]
) -> tuple[dict[str, Any], list[str]]:
    """(configuration as it would stand in a file, notes for the user, a sentence each); refuses values we cannot have.

    Args:
        released: the configuration of the released code.
        source: the file's name, for messages.
        world_size: GPUs that the YAML was meant for; None takes 16 and notes it.
        sampler: "multiblock" or "reference".
        data: .beton files of training and validation images.
    """
    batch, size, patch = released.data.batch_size, released.data.crop_size, released.mask.patch_size
    ours: dict[str, dict[str, Any]] = {
        "run": {"name": f"vit{released.meta.model_name[0]}{patch}" + (f"_{size}" if size != 224 else "")},
        "data": {key: path for key, path in zip(("train", "validation"), data, strict=True) if path is not None},
        "model": {},
        "masks": {"sampler": sampler},
        "optimization": {},
    }
    for section, key, _, target in Released.fields():
        if target.startswith("ijepa."):
            _, place, name = target.split(".")
            ours[place][name] = getattr(getattr(released, section), key)
    ours["optimization"]["weight_decay"] = [
        released.optimization.weight_decay,
        released.optimization.final_weight_decay,
    ]
    min_keep = int(ours["masks"].pop("min_keep"))
    if sampler == "reference":
        ours["masks"] |= {"min_keep": min_keep, "truncation_group": batch}
    elif size % patch == 0:  # else parse_config says what is wrong with it
        ours["masks"]["context_tokens"] = default_context_tokens((size // patch, size // patch))
    config = {
        "train_batch_size": batch * (world_size or WORLD_SIZE),
        "train_micro_batch_size_per_gpu": batch,
        "bf16": {"enabled": released.meta.use_bfloat16},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "ijepa": ours,
    }
    parse_config(config, source=f"{source}, converted,")
    return config, _notes(released, config, world_size)


def _notes(released: Released, config: dict[str, Any], world_size: int | None) -> list[str]:
    batch, masks = released.data.batch_size, config["ijepa"]["masks"]
    notes = [
        f"batch: {batch} images a GPU there x {world_size or WORLD_SIZE} GPUs = {config['train_batch_size']} a step"
    ]
    if world_size is None:
        notes[0] += f"; {WORLD_SIZE} GPUs are those of the released configurations, give --world-size if not"
    if masks["sampler"] == "multiblock":
        notes.append(
            f"masks: the paper's (multiblock) with {masks['context_tokens']} context tokens an image, not that code's, "
            "which depend on the images a GPU and never use the last row and column; those: --sampler reference "
            f"(mask.min_keep = {released.mask.min_keep:g} acts there alone)"
        )
    else:
        notes.append(f"masks: that code's, the context cut to the smallest of {batch} images: its images of one GPU")
    if released.meta.use_bfloat16:
        notes.append(
            "precision: bf16 weights with fp32 masters; that code's autocast of fp32 weights is "
            '"torch_autocast": {"enabled": true, "dtype": "bfloat16"} in place of "bf16"'
        )
    for section, key, field, _ in Released.fields():
        if field.annotation is Any and key in getattr(released, section).model_fields_set:
            notes.append(f"{section}.{key} has no counterpart: {field.description}")
    return notes
