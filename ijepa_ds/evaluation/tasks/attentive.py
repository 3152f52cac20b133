"""Task ``attentive``: attentive probes on frozen patch tokens, of the trained encoder and of random ones.

Raw pixels have no tokens of their own: beside them stands logistic regression on the pixels, as in other tasks.

Shapes: B images, N patches, D encoder width, n images in use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psutil
import torch
from torch import Tensor

from ijepa_ds.distributed import on_any_rank
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.features import extract_features
from ijepa_ds.evaluation.inputs import AugmentedInputs, CachedInputs, validation_batches
from ijepa_ds.evaluation.labels import Classes, confusion_matrix
from ijepa_ds.evaluation.probes.attentive import AttentiveGrid, attentive_probe
from ijepa_ds.evaluation.probes.supervised import Inputs, Training, Validation
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import Setting, any_classes, augmented_loader, class_fields, measurement, normalized
from ijepa_ds.evaluation.tasks.feature_probes import _logistic
from ijepa_ds.method.encoder import VisionTransformer

BATCH, EPOCHS = 256, 20  # V-JEPA's epochs for images
MEMORY_SHARE = 0.5  # of what is free, that cached tokens may take


def attentive(setting: Setting, encoder: Encoder) -> list[Measurement]:
    """A measurement for each label of classes."""
    measure = _pixels if encoder.module is None else _probe
    measured = [measure(setting, encoder, field, any_classes(setting, field)) for field in class_fields(setting)]
    return [measurement for measurement in measured if measurement is not None]


def check_cached(setting: Setting, module: VisionTransformer) -> None:
    """Refuse to hold the tokens of all images where they would not fit into memory."""
    num_images = sum(len(samples) for samples in setting.data.samples.values())
    patches = np.prod([size // module.patch_embed.patch_size[0] for size in setting.data.image_size])
    needed = num_images * int(patches) * module.embed_dim * 4 * setting.process.world_size
    free = psutil.virtual_memory().available
    if on_any_rank([needed > MEMORY_SHARE * free], setting.process)[0]:
        raise UserError(
            f"--cached with --task attentive would hold the tokens of {num_images} images, {needed / 2**30:.0f} GiB of "
            f"{free / 2**30:.0f} GiB free: leave out --cached, or take fewer with --train-images"
        )


def _probe(setting: Setting, encoder: Encoder, field: str, classes: Classes) -> Measurement | None:
    began, process, module = time.monotonic(), setting.process, encoder.module
    assert module is not None
    batch = min(setting.batch or BATCH, len(classes.train))
    setting.check_batch(batch)
    tokens_of = _tokens(setting, module)
    sources = _cached if setting.cached else _augmented
    encode, inputs, validation = sources(setting, module, tokens_of, classes, batch)
    grid = AttentiveGrid(module.embed_dim)
    probe = attentive_probe(
        encode,
        inputs,
        validation,
        num_classes=classes.num_classes,
        process=process,
        grid=AttentiveGrid(module.embed_dim, setting.lrs or grid.lrs, setting.weight_decays or grid.weight_decays),
        training=Training(setting.epochs or EPOCHS, setting.data.micro_batch),
        seed=setting.seed,
        name=f"{field}, {encoder}",
    )
    if not process.is_main:
        return None
    return measurement(
        setting,
        "attentive",
        field,
        [{"features": "tokens", **point} for point in probe.grid],
        began,
        rate=probe.images_per_second,
        extra={
            "epochs": setting.epochs or EPOCHS,
            "batch": batch,
            "augmentation": "none" if setting.cached else "random resized crop, flip",
            "class_names": classes.names if classes.num_classes <= 100 else None,
        },
        confusion=confusion_matrix(classes, probe.predictions),
    )


def _tokens(setting: Setting, module: VisionTransformer) -> Callable[[Tensor], Tensor]:
    """uint8 images [B, H, W, 3] on the device -> patch tokens [B, N, D] after the final norm."""
    prepare, dtype = normalized(setting), module.patch_embed.proj.weight.dtype
    unseen = True

    def tokens_of(images: Tensor) -> Tensor:
        nonlocal unseen
        tokens = module(prepare(images).to(dtype)).float()
        if unseen and not bool(torch.isfinite(tokens).all()):  # once: it makes the device wait
            raise UserError("the patch tokens hold NaN or infinity: the checkpoint has diverged or is damaged")
        unseen = False
        return tokens

    return tokens_of


Sources = tuple[Callable[[Tensor], Tensor], Inputs, Validation]


def _augmented(
    setting: Setting, module: VisionTransformer, tokens_of: Callable[[Tensor], Tensor], classes: Classes, batch: int
) -> Sources:
    """What the probe reads: images, augmented anew in each epoch."""
    data, images = setting.data, {"prepare": torch.clone}
    samples = data.samples["train"]
    inputs = AugmentedInputs(
        augmented_loader(setting),
        samples,
        classes.train,
        batch=batch,
        seed=setting.seed,
        process=setting.process,
        **images,
    )
    return tokens_of, inputs, lambda: validation_batches(data, classes.validation, setting.share(), **images)


def _cached(
    setting: Setting, module: VisionTransformer, tokens_of: Callable[[Tensor], Tensor], classes: Classes, batch: int
) -> Sources:
    """What the probe reads: tokens of the central crops, made once, [n, N D] float32 on the CPU."""
    check_cached(setting, module)
    data, process = setting.data, setting.process
    train, validation = (
        extract_features(
            lambda images: tokens_of(images).flatten(1),
            data.loader(split, setting.share()),
            data.samples[split],
            process,
        )
        for split in ("train", "validation")
    )
    inputs = CachedInputs(train, classes.train, batch=batch, seed=setting.seed, process=process)
    mine = slice(process.rank, None, process.world_size)
    parts = [rows[mine].split(data.micro_batch) for rows in (validation, classes.validation)]
    return lambda rows: rows.unflatten(1, (-1, module.embed_dim)), inputs, lambda: zip(*parts, strict=True)


def _pixels(setting: Setting, encoder: Encoder, field: str, classes: Classes) -> Measurement | None:
    features = setting.extracted(encoder, crop_share=setting.share())
    if not setting.process.is_main:
        return None
    return replace(_logistic(setting, encoder, field, features), task="attentive", extra={}, confusion=None)
