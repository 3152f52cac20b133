"""A configuration for weights that come without one, and whether given weights fit a given configuration."""

from __future__ import annotations

from typing import Any

from ijepa_ds.build import encoder_dimensions
from ijepa_ds.config import Config, load_config
from ijepa_ds.errors import UserError
from ijepa_ds.exchange.read import ForeignEncoder
from ijepa_ds.exchange.sizes import TensorSizes, name_of
from ijepa_ds.files import PROJECT
from ijepa_ds.validation import load_json

_RECIPES = PROJECT / "ds_configs"
_DEFAULT = {
    "train_batch_size": 2048,
    "train_micro_batch_size_per_gpu": 128,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "overlap_comm": True},
}
_TRAIN = "data/imagenet/train.beton"


def infer_config(encoder: ForeignEncoder, predictor: TensorSizes | None = None) -> tuple[dict[str, Any], str]:
    """A configuration as it would stand in a file, and in words where its recipe is from.

    Sizes are the weights' own: the image size is the grid times the patch size. The recipe is that of the file of
    ds_configs/ with the same sizes if there is one, else the default one (the released ViT-H/14's schedules, batch
    2048). It lacks ``ijepa.run``, and its data are ImageNet's where docs/data.md puts them.
    """
    dimensions, patch = encoder.dimensions, encoder.patch_size
    rows, columns = (side * patch for side in encoder.grid)
    data = {"train": _TRAIN, "image_size": rows if rows == columns else [rows, columns]}
    model: dict[str, Any] = {"encoder": name_of(dimensions), "patch_size": patch}
    if model["encoder"] is None:
        ratio = dimensions.hidden / dimensions.width
        if int(ratio * dimensions.width) != dimensions.hidden:  # as the configuration is read
            ratio = (dimensions.hidden + 0.5) / dimensions.width
        sizes = {"width": dimensions.width, "depth": dimensions.depth, "heads": dimensions.heads, "mlp_ratio": ratio}
        model |= {"encoder": "tiny", **sizes}
    if predictor is not None:
        model |= {"predictor_width": predictor.width, "predictor_depth": predictor.depth}
    for file in sorted(_RECIPES.glob("*.json")):
        try:
            load_config(file)
        except UserError:
            continue  # the schema, or somebody's own that is not finished
        raw = load_json(file)
        recipe = raw["ijepa"]
        same_size = recipe["data"].get("image_size", 224) == data["image_size"]
        if same_size and all(recipe["model"].get(key) == value for key, value in model.items()):
            del recipe["run"]
            raw.pop("$schema", None)
            return raw, f"the recipe is that of ds_configs/{file.name}"
    return {**_DEFAULT, "ijepa": {"data": data, "model": model}}, (
        "no file of ds_configs/ has these sizes: the recipe is the default one (schedules of the released ViT-H/14)"
    )


def size_differences(config: Config, encoder: ForeignEncoder, predictor: TensorSizes | None = None) -> list[str]:
    """Each size in which the weights are not what the configuration says; the grid may differ, positions are fixed.

    Heads cannot be compared: the configuration's count, unless a transformers configuration tells them.
    """
    theirs, ours, model = encoder.dimensions, encoder_dimensions(config), config.ijepa.model
    sizes = {
        "width": (theirs.width, ours.width),
        "depth": (theirs.depth, ours.depth),
        "hidden width of the MLPs": (theirs.hidden, ours.hidden),
        "patch_size": (encoder.patch_size, model.patch_size),
    }
    if encoder.format == "transformers":
        sizes["heads"] = (theirs.heads, ours.heads)
    if predictor is not None:
        sizes["predictor_width"] = (predictor.width, model.predictor_width)
        sizes["predictor_depth"] = (predictor.depth, model.predictor_depth)
    return [f"{key}: {a} in the file, {b} in the configuration" for key, (a, b) in sizes.items() if a != b]
