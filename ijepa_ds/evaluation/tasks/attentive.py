"""Task ``attentive``: attentive probes on frozen patch tokens, of the trained encoder and of random ones.

Raw pixels have no tokens of their own: beside them stands logistic regression on the pixels, as in other tasks.

Shapes: B images, N patches, D encoder width, n images in use.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from ijepa_ds.distributed import on_any_rank
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.features import extract_features
from ijepa_ds.evaluation.inputs import CachedInputs, Inputs, central_crops
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.attentive import attentive_probe
from ijepa_ds.evaluation.probes.supervised import Course
from ijepa_ds.evaluation.results import Measurement, best_of
from ijepa_ds.evaluation.setting import Setting, any_classes, class_fields
from ijepa_ds.evaluation.tasks.feature_probes import logistic
from ijepa_ds.method.encoder import VisionTransformer

LRS, WEIGHT_DECAYS = (3e-4, 1e-3, 3e-3), (0.01, 0.1, 0.4)
BATCH, EPOCHS = 256, 20
MEMORY_SHARE = 0.5  # of what is free, that cached tokens may take


def attentive(setting: Setting, candidate: Candidate) -> list[Measurement]:
    """A measurement for each label of classes."""
    fields = class_fields(setting)
    if candidate.module is None:
        return [replace(measurement, task="attentive") for measurement in logistic(setting, candidate, fields)]
    return [
        measurement
        for field in fields
        for measurement in _probe(setting, candidate, candidate.module, field, any_classes(setting, field))
    ]


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
) -> list[Measurement]:
    began, options, process, samples = time.monotonic(), setting.options, setting.process, setting.data.samples
    batch = min(options.batch or BATCH, len(classes.train))
    setting.check_batch(batch)
    tokens, share = _tokens(setting, module), setting.share()
    if options.cached:
        check_cached(setting, module)
        train, validation = (
            extract_features(
                tokens,
                setting.data.loader(split, crop_share=share),
                samples[split],
                process,
                progress=setting.progress(f"tokens of {split}, {candidate}", len(samples[split])),
            )
            for split in ("train", "validation")
        )
        inputs: Inputs = CachedInputs(train, classes.train, batch=batch, seed=setting.seed, process=process)
        held_out = iter(validation[process.rank :: process.world_size].split(options.micro_batch))
    else:
        inputs = setting.augmented(classes.train, tokens, batch=batch)
        loader = setting.data.loader("validation", crop_share=share)
        held_out = central_crops(loader, samples["validation"], tokens, process)
    points = list(itertools.product(options.lr or LRS, options.weight_decay or WEIGHT_DECAYS))
    course = Course(options.epochs or EPOCHS, micro_batch=options.micro_batch)
    predictions, rate = attentive_probe(
        inputs,
        held_out,
        width=module.embed_dim,
        num_classes=classes.num_classes,
        grid=points,
        course=course,
        seed=setting.seed,
        process=process,
        progress=setting.progress(f"attentive probe {field}, {candidate}", course.epochs * inputs.steps * batch),
    )
    if not process.is_main:
        return []
    grid = [
        {"features": "tokens", "lr": lr, "weight_decay": decay, "value": classes.accuracy(predictions[number])}
        for number, (lr, decay) in enumerate(points)
    ]
    extra = {
        "epochs": course.epochs,
        "batch": batch,
        "augmentation": "none" if options.cached else "random resized crop, flip",
    }
    confusion = classes.confusion(predictions[grid.index(best_of(grid))].clamp_min(0))
    measurement = setting.measurement("attentive", field, grid, began, classes, extra=extra, confusion=confusion)
    return [replace(measurement, images_per_second=rate)]


def _tokens(setting: Setting, module: VisionTransformer) -> Callable[[Tensor], Tensor]:
    """Make the function from uint8 images on the device [B, H, W, 3] to patch tokens [B, N, D] after the final norm."""
    prepare, dtype = setting.normalize(), module.patch_embed.proj.weight.dtype

    @torch.no_grad()
    def tokens(images: Tensor) -> Tensor:
        return module(prepare(images).to(dtype)).float()

    return tokens
