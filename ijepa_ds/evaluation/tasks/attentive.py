"""Task ``attentive``: attentive probes on frozen patch tokens, of the trained encoder and of random ones.

Raw pixels have no tokens of their own: beside them stands logistic regression on the pixels, as in other tasks.

Shapes: B images, N patches, D encoder width, n images in use.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ijepa_ds.distributed import on_any_rank
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.features import extract_features
from ijepa_ds.evaluation.inputs import AugmentedBatches, step_positions, validation_batches
from ijepa_ds.evaluation.labels import Classes, confusion_matrix
from ijepa_ds.evaluation.probes.attentive import LRS, WEIGHT_DECAYS, AttentiveProbe, attentive_probe
from ijepa_ds.evaluation.probes.logistic import linear_probe
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import Setting, any_classes, augmented_loader, class_fields, measurement, normalized

BATCH, EPOCHS = 256, 20
MEMORY_SHARE = 0.5  # of what is free, that cached tokens may take


def attentive(setting: Setting, encoder: Encoder) -> list[Measurement]:
    """A measurement for each label of classes."""
    found = [
        (_probe if encoder.module is not None else _pixels)(setting, encoder, field, any_classes(setting, field))
        for field in class_fields(setting)
    ]
    return [one for one in found if one is not None]


def check_cached(setting: Setting, encoder: Encoder) -> None:
    """Raises:
    UserError: with --cached, the tokens of all images would not fit into memory.
    """
    data, module = setting.data, encoder.module
    height, width = (size // module.patch_embed.proj.kernel_size[0] for size in data.image_size)
    num_images = sum(len(samples) for samples in data.samples.values())
    needed = num_images * height * width * module.embed_dim * 4 * setting.process.world_size
    free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    if on_any_rank([needed > MEMORY_SHARE * free], setting.process)[0]:
        raise UserError(
            f"--cached with --task attentive would hold the tokens of {num_images} images, {needed / 2**30:.0f} GiB of "
            f"{free / 2**30:.0f} GiB free: leave out --cached, or take fewer with --train-images"
        )


def _probe(setting: Setting, encoder: Encoder, field: str, classes: Classes) -> Measurement | None:
    data, began, share = setting.data, time.monotonic(), setting.share()
    num_images = len(data.samples["train"])
    batch = min(setting.batch or BATCH, num_images)
    setting.check_batch(batch)
    tokens_of = _tokens(setting, encoder)
    if setting.cached:
        check_cached(setting, encoder)
        encode, batches, validation = _cached(setting, tokens_of, classes, batch=batch)
    else:
        encode = tokens_of

        def copied(images: Tensor) -> Tensor:
            return images.clone()

        batches = AugmentedBatches(
            data,
            augmented_loader(setting),
            torch.arange(num_images).numpy(),
            classes.train,
            batch=batch,
            seed=setting.seed,
            prepare=copied,
        )

        def validation() -> Iterator[tuple[Tensor, Tensor]]:
            return validation_batches(data, classes.validation, crop_share=share, prepare=copied)

    probe: AttentiveProbe = attentive_probe(
        encode,
        width=encoder.module.embed_dim,
        batches=batches,
        validation=validation,
        steps_per_epoch=max(1, num_images // batch),
        num_classes=classes.num_classes,
        process=setting.process,
        lrs=setting.lrs or LRS,
        weight_decays=WEIGHT_DECAYS if setting.weight_decays is None else setting.weight_decays,
        epochs=setting.epochs or EPOCHS,
        micro_batch=data.micro_batch,
        seed=setting.seed,
        say=setting.progress(f"{field}, {encoder}"),
    )
    if not setting.process.is_main:
        return None
    return measurement(
        setting,
        "attentive",
        field,
        [{"features": "tokens", **point} for point in probe.grid],
        began,
        rate=probe.images_per_second if probe.images_per_second == probe.images_per_second else None,
        extra={
            "epochs": setting.epochs or EPOCHS,
            "batch": batch,
            "augmentation": "none" if setting.cached else "random resized crop, flip",
            "class_names": classes.names if classes.num_classes <= 100 else None,
        },
        confusion=confusion_matrix(classes, probe.predictions),
    )


def _tokens(setting: Setting, encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """uint8 images [B, H, W, 3] on the device -> patch tokens [B, N, D] after the final norm."""
    prepare, dtype = normalized(setting), encoder.module.patch_embed.proj.weight.dtype
    unseen = True

    def tokens(images: Tensor) -> Tensor:
        nonlocal unseen
        found = encoder.module(prepare(images).to(dtype)).float()
        if unseen and not bool(torch.isfinite(found).all()):  # once: it makes the device wait
            raise UserError("the patch tokens hold NaN or infinity: the checkpoint has diverged or is damaged")
        unseen = False
        return found

    return tokens


def _cached(
    setting: Setting, tokens_of: Callable[[Tensor], Tensor], classes: Classes, *, batch: int
) -> tuple[Callable, Callable, Callable]:
    """The probe's three sources where tokens are made once, of the central crops: [n, N, D] float32 on the CPU."""
    data, process = setting.data, setting.process
    shape: tuple[int, ...] = ()

    def flat(images: Tensor) -> Tensor:
        nonlocal shape
        tokens = tokens_of(images)
        shape = tuple(tokens.shape[1:])
        return tokens.flatten(1)

    train, validation = (
        extract_features(flat, data.loader(split, setting.share()), data.samples[split], process)
        for split in ("train", "validation")
    )

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for positions in step_positions(len(train), epoch, batch=batch, seed=setting.seed):
            mine = torch.from_numpy(positions[process.rank :: process.world_size])
            yield train[mine], classes.train[mine]

    def held_out() -> Iterator[tuple[Tensor, Tensor]]:
        mine = slice(process.rank, None, process.world_size)
        return zip(
            validation[mine].split(data.micro_batch), classes.validation[mine].split(data.micro_batch), strict=True
        )

    return lambda rows: rows.unflatten(1, shape), batches, held_out


def _pixels(setting: Setting, encoder: Encoder, field: str, classes: Classes) -> Measurement | None:
    began = time.monotonic()
    train, validation = setting.extracted(encoder, crop_share=setting.share())
    if not setting.process.is_main:
        return None
    fit = linear_probe(
        train.to(setting.process.device),
        classes.train,
        validation,
        classes.validation,
        num_classes=classes.num_classes,
        seed=0,
    )
    grid = [{"features": "pixels", "l2": fit.l2, "value": fit.accuracy}]
    return measurement(setting, "attentive", field, grid, began)
