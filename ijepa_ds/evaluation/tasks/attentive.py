"""Task ``attentive``: attentive probes on frozen patch tokens, of the trained encoder and of random ones.

Raw pixels have no tokens of their own: beside them stands logistic regression on the pixels, as in other tasks.

Shapes: B images, H x W pixels, N patches, D encoder width.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor

from ijepa_ds.build import input_of_encoder
from ijepa_ds.distributed import on_any_rank
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.data import SPLITS
from ijepa_ds.evaluation.features import extract_features
from ijepa_ds.evaluation.inputs import Inputs, central_crops
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.attentive import attentive_probe
from ijepa_ds.evaluation.probes.supervised import Course
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.evaluation.tasks.feature_probes import logistic
from ijepa_ds.method.encoder import VisionTransformer

LRS, WEIGHT_DECAYS = (3e-4, 1e-3, 3e-3), (0.01, 0.1, 0.4)
BATCH, EPOCHS = 256, 20
MEMORY_SHARE = 0.5  # of what is free, that cached tokens may take


def attentive(setting: Setting, candidate: Candidate, classes: dict[str, Classes]) -> Iterator[Measurement]:
    """A grid of probes for each label."""
    if candidate.module is None:
        for measurement in logistic(setting, candidate, classes):
            yield dataclasses.replace(measurement, task="attentive")
        return
    for field in classes:
        yield from _probe(setting, candidate, candidate.module, field, classes[field])


def check_cached(setting: Setting, module: VisionTransformer) -> None:
    """Refuse --cached where the tokens of all images would not fit into memory (:class:`UserError`)."""
    num_images = sum(len(samples) for samples in setting.data.samples.values())
    tokens = module.patch_embed.num_patches * module.embed_dim
    needed, free = num_images * tokens * 4 * setting.process.world_size, psutil.virtual_memory().available
    if on_any_rank([needed > MEMORY_SHARE * free], setting.process)[0]:
        raise UserError(
            f"--cached with --task attentive would hold the tokens of {num_images} images, {needed / 2**30:.0f} GiB of "
            f"{free / 2**30:.0f} GiB free: leave out --cached, or take fewer with --train-images"
        )


def _probe(
    setting: Setting, candidate: Candidate, module: VisionTransformer, field: str, classes: Classes
) -> Iterator[Measurement]:
    began, options, process, data = time.monotonic(), setting.options, setting.process, setting.data
    prepare = input_of_encoder(setting.config, process.device, module.patch_embed.proj.weight.dtype)
    batch = min(options.batch or BATCH, len(classes.train))

    @torch.no_grad()
    def tokens(images: Tensor) -> Tensor:
        """Uint8 images on the device [B, H, W, 3] -> patch tokens [B, N, D] after the final norm."""
        return module(prepare(images)).float()

    loaders = {split: data.loader(split, crop_share=setting.share()) for split in SPLITS}
    if options.cached:
        check_cached(setting, module)
        rows = {}
        for split, samples in data.samples.items():
            shown = setting.progress(f"tokens of {split}, {candidate}", len(samples))
            rows[split] = extract_features(tokens, loaders[split], samples, process, progress=shown)
        inputs: Inputs = setting.cached(rows["train"], classes.train, batch)
        validation = iter(rows["validation"][process.rank :: process.world_size].split(options.micro_batch))
    else:
        inputs = setting.augmented(classes.train, batch, tokens)
        validation = central_crops(loaders["validation"], data.samples["validation"], tokens, process)
    grid = list(itertools.product(options.lr or LRS, options.weight_decay or WEIGHT_DECAYS))
    course = Course(options.epochs or EPOCHS, micro_batch=options.micro_batch)
    progress = setting.progress(f"attentive probe {field}, {candidate}", course.epochs * inputs.steps * batch)
    predictions, rate = attentive_probe(inputs, validation, module.embed_dim, grid, course, progress)
    if not process.is_main:
        return
    heads = [{"features": "tokens", "lr": lr, "weight_decay": weight_decay} for lr, weight_decay in grid]
    augmentation = "none" if options.cached else "random resized crop, flip"
    extra = {"epochs": course.epochs, "batch": batch, "augmentation": augmentation}
    yield setting.measurement("attentive", field, classes, heads, predictions, began, extra=extra, rate=rate)
