"""The model card beside exported weights, in the form that Hugging Face reads (front matter, then Markdown).

It says what can be read off the run: data, recipe, steps, versions, an evaluation's table, and how to load the file.
What it is good for and under which license it is given on is for people to add; a card that somebody has edited is
never written over.
"""

from __future__ import annotations

import statistics
import zlib
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from ijepa_ds.build import encoder_dimensions
from ijepa_ds.errors import UserError
from ijepa_ds.exchange.run_encoder import DESCRIPTIONS, RunEncoder
from ijepa_ds.files import replacing
from ijepa_ds.run.folder import read_run_origin, read_run_record
from ijepa_ds.validation import Checked, read_json

_MARK = "<!-- ijepa_ds export {:08x}: a card that was edited is not written over -->\n"
# Of the settings that decide what is learnt those that a reader asks for first; config.json of the run has all.
_KEY_SETTINGS = (
    "train_batch_size",
    "gradient_clipping",
    "ijepa.run.seed",
    "ijepa.data.crop_",
    "ijepa.data.flip",
    "ijepa.masks.sampler",
    "ijepa.model.predictor_",
    "ijepa.objective.",
    "ijepa.optimization.",
)
_LOAD_TIMM = """import timm
import torch

model = timm.create_model(
    "vit_tiny_patch16_224", img_size={size}, patch_size={patch}, embed_dim={width}, depth={depth}, num_heads={heads},
    mlp_ratio={mlp_ratio}, class_token=False, global_pool="avg", fc_norm=False, num_classes=0,
    checkpoint_path="{file}",  # from the folder that it is in
).eval()
"""
_LOAD_TRANSFORMERS = """import torch
from transformers import IJepaModel

model = IJepaModel.from_pretrained(".").eval()  # from this folder
"""
_LOAD_REFERENCE = """import torch

checkpoint = torch.load("{file}", weights_only=True)  # from the folder that it is in
encoder = {{name.removeprefix("module."): tensor for name, tensor in checkpoint["{key}"].items()}}
"""
_USE = """mean, std = torch.tensor({mean}), torch.tensor({std})
images = torch.rand(1, 3, {rows}, {columns})  # in place of these yours: RGB from 0 to 1
with torch.no_grad():
    patches = model{call}  # [1, {patches}, {width}]
features = patches.mean(dim=1)  # of an image
"""
_CALLS = {
    "timm": ".forward_features((images - mean[:, None, None]) / std[:, None, None])",
    "transformers": "((images - mean[:, None, None]) / std[:, None, None]).last_hidden_state",
}


class _Task(Checked):
    """A row of an evaluation, as far as the card shows it."""

    model_config = ConfigDict(extra="ignore")

    task: str
    label: str
    metric: str
    unit: str
    value: float
    train_images: int
    validation_images: int
    baselines: dict[str, dict[str, Any]]


class _Results(Checked):
    """results.json, which :mod:`ijepa_ds.evaluation.results` writes; this wing may not import that one."""

    model_config = ConfigDict(extra="ignore")

    source: str
    encoder: str
    tasks: list[_Task]


def write_card(encoder: RunEncoder, weights: Path, file_format: str) -> tuple[Path, str]:
    """Write the card of ``weights``: README.md in a transformers folder, else FILE.md beside FILE.safetensors.

    Args:
        weights: the file, or the folder, that was exported.
        file_format: "timm", "transformers" or "reference".

    Returns:
        Its path, and what there is to say of it: nothing, or why there is no table, or that the file was left alone.
    """
    path = weights / "README.md" if weights.is_dir() else weights.with_name(f"{weights.name.split('.')[0]}.md")
    if path.exists() and not _is_ours(path):
        return path, f"{path} was there and is not as this command wrote it: it stays; remove it for a new card"
    table, remark = _evaluation(encoder)
    text = _text(encoder, weights, file_format, table)
    with replacing(path) as temporary:
        temporary.write_text(text + _MARK.format(zlib.crc32(text.encode())))
    return path, remark


def _is_ours(path: Path) -> bool:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return False
    card = text[: max(0, len(text) - len(_MARK.format(0)))]
    return text == card + _MARK.format(zlib.crc32(card.encode()))


def _text(encoder: RunEncoder, weights: Path, file_format: str, table: str) -> str:
    config, size = encoder.config, encoder_dimensions(encoder.config)
    _, images = read_run_record(encoder.run)
    rows, columns = encoder.image_size
    versions, commit = read_run_origin(encoder.run)
    library = f"library_name: {file_format}\n" if file_format != "reference" else ""
    seen = encoder.step * config.global_batch
    epochs = f" ({seen / images:.4g} epochs of {images:,} images)" if images else ""
    settings = "\n".join(
        f"| `{key}` | {value} |"
        for key, value in config.recipe().items()
        if key.startswith(_KEY_SETTINGS) and value is not None
    )
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"
    return f"""---
{library}pipeline_tag: image-feature-extraction
tags:
- i-jepa
- self-supervised-learning
- vision-transformer
---

# {config.ijepa.run.name}

The **{encoder.role.upper()} encoder** of a run of I-JEPA ([arXiv 2301.08243](https://arxiv.org/abs/2301.08243)):
{DESCRIPTIONS[encoder.role]}. It makes features of images and has no classifier. No labels were used.

- Vision transformer of width {size.width}, depth {size.depth}, {size.heads} heads, MLPs of {size.hidden}; patches of
  {config.ijepa.model.patch_size} px, images of {rows} x {columns} px (trained at
  {" x ".join(map(str, config.ijepa.data.image_size))}), no class token, fixed sine-cosine positions.
- Trained for {encoder.step:,} optimizer steps of {config.global_batch:,} images{epochs}.
- Made with {made_with}; commit {commit}.
- License, intended use and limits: not known to the program that wrote this; add them.

## Load

{_how_to_load(encoder, weights, file_format)}
## Evaluation

{table}
## Recipe

| setting | value |
|---|---|
{settings}

"""


def _how_to_load(encoder: RunEncoder, weights: Path, file_format: str) -> str:
    data, size, (rows, columns) = encoder.config.ijepa.data, encoder_dimensions(encoder.config), encoder.image_size
    ratio = size.hidden / size.width
    values = {
        "size": (rows, columns),
        "patch": encoder.config.ijepa.model.patch_size,
        "width": size.width,
        "depth": size.depth,
        "heads": size.heads,
        # timm takes int(width * ratio), which may fall short of a whole number.
        "mlp_ratio": ratio if int(size.width * ratio) == size.hidden else (size.hidden + 0.5) / size.width,
        "file": weights.name,
        "key": "target_encoder" if encoder.role == "target" else "encoder",
    }
    template = {"timm": _LOAD_TIMM, "transformers": _LOAD_TRANSFORMERS, "reference": _LOAD_REFERENCE}[file_format]
    code = template.format(**values)
    if call := _CALLS.get(file_format):
        use = {"mean": data.mean, "std": data.std, "rows": rows, "columns": columns, "width": size.width}
        code += "\n" + _USE.format(**use, call=call, patches=encoder.grid[0] * encoder.grid[1])
    others = " and ".join(f"`--format {other}`" for other in ("timm", "transformers") if other != file_format)
    return f"```python\n{code}```\n\nFor other libraries: `python -m ijepa_ds export RUN` with {others}.\n"


def _evaluation(encoder: RunEncoder) -> tuple[str, str]:
    """The table of the run's newest evaluation of this encoder, and why there is none."""
    path = encoder.run / "evaluation" / "results.json"
    none = "None is in the run's folder yet: `python -m ijepa_ds evaluate --checkpoint RUN`, then export again.\n"
    if not path.is_file():
        return none, ""
    try:
        results = read_json(_Results, path, "is not the results of an evaluation", "evaluate again", nan=True)
    except UserError as error:
        return none, f"the card has no evaluation: {error}"
    if results.encoder != encoder.role:
        return none, f"the card has no evaluation: {path} is of the {results.encoder} encoder"
    rows = [
        f"| {_title(task)} | {task.metric}, {task.unit} | {task.value:.2f} | {_mean(task, 'random')} | "
        f"{_mean(task, 'pixels')} | {task.train_images:,} / {task.validation_images:,} |"
        for task in results.tasks
    ]
    _, has_step, step = results.source.rpartition(" at step ")
    return (
        f"Of the encoder at step {step if has_step else 'unknown'}, beside the same encoder at random initialisation "
        "and raw pixels.\n\n| task | metric | this encoder | random | pixels | images: training / validation |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    ), ""


def _title(task: _Task) -> str:
    return task.task if task.label in ("label", task.task) else f"{task.task}, {task.label}"


def _mean(task: _Task, name: str) -> str:
    values = task.baselines.get(name, {}).get("values")
    return f"{statistics.mean(values):.2f}" if isinstance(values, list) and values else "-"
