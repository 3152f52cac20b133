"""From a configuration to the parts of a run, after everything that can be refused has been refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ijepa_ds.config import Config
from ijepa_ds.data.beton import Dataset
from ijepa_ds.data.pretraining_loader import PretrainingLoader
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.method.encoder import Dimensions, VisionTransformer, dimensions_of, set_attention
from ijepa_ds.method.flops import Shapes
from ijepa_ds.method.ijepa import IJEPA, normalize_images
from ijepa_ds.method.masks import MaskSampler, MultiblockSampler, ReferenceSampler, default_context_tokens
from ijepa_ds.method.predictor import Predictor
from ijepa_ds.method.schedules import Schedules, build_schedules


class Reader(Protocol):
    """Whose share of a batch this process reads: an engine, that is."""

    data_rank: int
    data_ranks: int


def encoder_dimensions(config: Config) -> Dimensions:
    """The encoder's size: the named one with what the config overrides."""
    model, named = config.ijepa.model, dimensions_of(config.ijepa.model.encoder)
    width, ratio = model.width or named.width, model.mlp_ratio or named.hidden / named.width
    hidden = max(1, int(width * ratio))
    dimensions = Dimensions(width, model.depth or named.depth, model.heads or named.heads, hidden)
    heads = model.predictor_heads or dimensions.heads
    for key, width, count in (
        ("width", dimensions.width, dimensions.heads),
        ("predictor_width", model.predictor_width, heads),
    ):
        if width % count or width % 4:
            raise UserError(
                f"ijepa.model.{key} = {width} must divide by its {count} heads and by 4; change one of them"
            )
    return dimensions


def build_sampler(config: Config) -> MaskSampler:
    """The mask sampler; refuses a grid on which no valid draw exists."""
    masks = config.ijepa.masks
    shared: dict[str, Any] = {
        "seed": config.ijepa.run.seed,
        "grid": config.grid,
        "num_targets": masks.num_targets,
        "target_scale": masks.target_scale,
        "target_aspect_ratio": masks.target_aspect_ratio,
        "context_scale": masks.context_scale,
    }
    if masks.sampler == "reference":
        if config.ijepa.compile:
            raise UserError(
                "ijepa.compile = true needs context blocks of one length, which masks.sampler = 'reference' does not "
                "give; leave one of them out"
            )
        return ReferenceSampler(**shared, min_keep=masks.min_keep, truncation_group=masks.truncation_group)
    return MultiblockSampler(**shared, context_tokens=masks.context_tokens or default_context_tokens(config.grid))


def build_encoder(config: Config, generator: torch.Generator | None = None) -> VisionTransformer:
    """The vision transformer of a config, initialised from ``generator``."""
    model = config.ijepa.model
    return VisionTransformer(
        config.ijepa.data.image_size,
        model.patch_size,
        encoder_dimensions(config),
        activation_checkpointing=model.activation_checkpointing,
        generator=generator,
    )


def build_ijepa(config: Config) -> IJEPA:
    """Context encoder and predictor; their initial weights are a pure function of ``run.seed``."""
    generator = torch.Generator().manual_seed(config.ijepa.run.seed)
    model = config.ijepa.model
    encoder = build_encoder(config, generator)
    predictor = Predictor(
        config.grid,
        encoder.embed_dim,
        width=model.predictor_width,
        depth=model.predictor_depth,
        heads=model.predictor_heads or encoder_dimensions(config).heads,
        activation_checkpointing=model.activation_checkpointing,
        generator=generator,
    )
    ijepa = IJEPA(encoder, predictor)
    set_attention(ijepa, fused=torch.cuda.is_available())
    return ijepa


def build_target(config: Config) -> VisionTransformer:
    """The target encoder's architecture, without weights."""
    with torch.device("meta"):
        encoder = build_encoder(config)
    # It has no backward pass, for which fused attention is slow on a CPU; in bf16 its forward pass is slow there, too.
    set_attention(encoder, fused=torch.cuda.is_available() or computing_dtype(config) == torch.float32)
    return encoder


def input_of_encoder(config: Config, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Make the function from uint8 images on the device [B, H, W, 3] to the encoder's input [B, 3, H, W]."""
    mean, std = (torch.tensor(values, device=device) for values in (config.ijepa.data.mean, config.ijepa.data.std))
    return functools.partial(normalize_images, mean=mean, std=std, dtype=dtype)


def build_loader(config: Config, dataset: Dataset, sampler: MaskSampler, reader: Reader) -> PretrainingLoader:
    """The pretraining loader of this process's share of each batch."""
    data = config.ijepa.data
    return PretrainingLoader(
        dataset,
        sampler,
        image_size=data.image_size,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        share=(reader.data_rank, reader.data_ranks),
        num_workers=data.workers,
    )


def is_compiled(config: Config, device: torch.device) -> bool:
    """Whether the blocks run compiled: where the config does not say, on GPUs and with contexts of one length."""
    if config.ijepa.compile is not None:
        return config.ijepa.compile
    return device.type == "cuda" and config.ijepa.masks.sampler == "multiblock"


def schedules_of(config: Config, steps_per_epoch: int) -> Schedules:
    """The schedules of a config in steps."""
    recipe = config.ijepa.optimization.model_dump(exclude={"betas", "eps"})
    return build_schedules(steps_per_epoch=steps_per_epoch, **recipe)


def check_batch(config: Config, process: Process) -> None:
    """Refuse a global batch that the processes cannot share."""
    share = config.micro_batch * process.world_size
    if config.global_batch % share:
        usable = [n for n in range(1, config.micro_batch + 1) if config.global_batch % (n * process.world_size) == 0]
        cure = (
            f"set train_micro_batch_size_per_gpu to {usable[-1]}"
            if usable
            else "use a number of processes that divides train_batch_size"
        )
        raise UserError(
            f"train_batch_size = {config.global_batch} does not divide into {process.world_size} processes with "
            f"train_micro_batch_size_per_gpu = {config.micro_batch}; {cure}"
        )


def working_dtype(config: Config) -> torch.dtype:
    """The dtype of the weights that compute: bf16, or fp32 (also under torch_autocast)."""
    return torch.bfloat16 if config.deepspeed["bf16"].get("enabled") else torch.float32


def autocast_dtype(config: Config) -> torch.dtype | None:
    """The dtype of torch_autocast, if it is on."""
    autocast = config.deepspeed["torch_autocast"]
    return getattr(torch, autocast.get("dtype", "bfloat16").split(".")[-1]) if autocast.get("enabled") else None


def shapes_of(config: Config) -> Shapes:
    """The sizes by which a training step's arithmetic is counted."""
    model, encoder = config.ijepa.model, encoder_dimensions(config)
    predictor = Dimensions(model.predictor_width, model.predictor_depth, model.predictor_heads or encoder.heads)
    return Shapes(encoder, predictor, model.patch_size, config.grid[0] * config.grid[1])


def computing_dtype(config: Config) -> torch.dtype:
    """The dtype of the products: that of torch_autocast where it is on, else that of the weights."""
    return autocast_dtype(config) or working_dtype(config)
