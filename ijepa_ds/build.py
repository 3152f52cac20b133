"""From a configuration to the parts of a run, after everything that can be refused has been refused."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ijepa_ds.config import Config
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.method.encoder import Dimensions, VisionTransformer, dimensions_of, set_attention
from ijepa_ds.method.flops import Shapes
from ijepa_ds.method.ijepa import IJEPA, normalize_images
from ijepa_ds.method.masks import MaskSampler, MultiblockSampler, ReferenceSampler, default_context_tokens
from ijepa_ds.method.predictor import Predictor
from ijepa_ds.method.schedules import Schedules, build_schedules
from ijepa_ds.method.vicreg import VarianceCovariance
from ijepa_ds.stage_balance import bubble

if TYPE_CHECKING:  # ffcv need not be there to plan a run
    from ijepa_ds.data.beton import Dataset
    from ijepa_ds.data.pretraining_loader import PretrainingLoader


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
        "predict_share": config.ijepa.objective.predict_share,
    }
    if masks.sampler == "reference":
        if config.ijepa.compile:
            raise UserError(
                "ijepa.compile = true needs context blocks of one length, which masks.sampler = 'reference' does not "
                "give; leave one of them out"
            )
        return ReferenceSampler(
            **shared,
            min_keep=masks.min_keep,
            truncation_group=masks.truncation_group,
            corrections=frozenset(masks.corrections),
        )
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
        stochastic_positions=model.stochastic_positions,
        generator=generator,
    )
    ijepa = IJEPA(encoder, predictor, build_regulariser(config, encoder.embed_dim, generator))
    set_attention(ijepa, fused=torch.cuda.is_available())
    return ijepa


def build_regulariser(config: Config, width: int, generator: torch.Generator) -> VarianceCovariance | None:
    """What the loss adds to the prediction, if anything; its weights are drawn after all others."""
    objective = config.ijepa.objective
    if not objective.vicreg:
        return None
    return VarianceCovariance(
        width,
        hidden=objective.vicreg_width,
        group=objective.vicreg_group,
        variance=objective.vicreg * objective.vicreg_variance,
        covariance=objective.vicreg * objective.vicreg_covariance,
        generator=generator,
    )


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
    from ijepa_ds.data.crops import Crops
    from ijepa_ds.data.ffcv_pipeline import Draws
    from ijepa_ds.data.pretraining_loader import PretrainingLoader

    data = config.ijepa.data
    return PretrainingLoader(
        dataset,
        sampler,
        image_size=data.image_size,
        crops=Crops(data.crop_scale, data.crop_ratio, data.flip),
        global_batch=config.global_batch,
        micro_batch=config.micro_batch // config.ijepa.pipeline.stages,
        share=(reader.data_rank, reader.data_ranks),
        num_workers=data.workers,
        draws=Draws(config.ijepa.objective.contexts, config.ijepa.model.stochastic_positions > 0),
    )


def is_compiled(config: Config, device: torch.device) -> bool:
    """Whether the blocks run compiled: where the config does not say, on GPUs and with contexts of one length."""
    if config.ijepa.compile is not None:
        return config.ijepa.compile
    return device.type == "cuda" and is_multiblock(config)


def is_multiblock(config: Config) -> bool:
    """Whether all contexts have one length."""
    return config.ijepa.masks.sampler == "multiblock"


def schedules_of(config: Config, steps_per_epoch: int) -> Schedules:
    """The schedules of a config in steps."""
    optimization = config.ijepa.optimization
    recipe = optimization.model_dump(exclude={"betas", "eps", "schedule", "cooldown_epochs"})
    schedules = build_schedules(steps_per_epoch=steps_per_epoch, **recipe)
    if optimization.schedule == "cosine":
        return schedules
    return dataclasses.replace(schedules, cooldown_steps=int(optimization.cooldown_epochs * steps_per_epoch))


def check_target_layers(config: Config) -> None:
    """Refuse targets of more blocks than the encoder has."""
    layers, depth = config.ijepa.objective.target_layers, encoder_dimensions(config).depth
    if layers > depth:
        raise UserError(
            f"ijepa.objective.target_layers = {layers} is more than the encoder's {depth} blocks; set at most {depth}"
        )


def check_stages(config: Config) -> None:
    """Refuse more pipeline stages than the model has layers."""
    stages, layers = config.ijepa.pipeline.stages, encoder_dimensions(config).depth + 3
    if stages > layers:
        raise UserError(
            f"ijepa.pipeline.stages = {stages} is more than the model's {layers} layers (embedding, blocks, norm, "
            f"predictor); set at most {layers}"
        )


def check_batch(config: Config, process: Process) -> None:
    """Refuse a global batch that the processes cannot share, or stages that would wait too long for one another."""
    stages = config.ijepa.pipeline.stages
    if process.world_size % stages:
        raise UserError(
            f"ijepa.pipeline.stages = {stages} does not divide {process.world_size} processes; use another number of "
            "one or the other"
        )
    replicas = process.world_size // stages
    share = config.micro_batch * replicas
    if config.global_batch % share:
        sizes = range(stages, config.micro_batch + 1, stages)
        usable = [n for n in sizes if config.global_batch % (n * replicas) == 0]
        cure = (
            f"set train_micro_batch_size_per_gpu to {usable[-1]}"
            if usable
            else "use a number of processes that divides train_batch_size"
        )
        raise UserError(
            f"train_batch_size = {config.global_batch} does not divide into {process.world_size} processes with "
            f"train_micro_batch_size_per_gpu = {config.micro_batch}; {cure}"
        )
    check_bubble(config, config.global_batch // share)


def check_bubble(config: Config, micro_batches: int) -> None:
    """Refuse a pipeline that waits for a larger share of its time than the config allows."""
    pipeline = config.ijepa.pipeline
    waits = bubble(pipeline.stages, micro_batches)
    if waits > pipeline.largest_bubble:
        raise UserError(
            f"{micro_batches} micro-batches a step keep {pipeline.stages} pipeline stages waiting for {waits:.0%} of "
            f"their time, more than ijepa.pipeline.largest_bubble = {pipeline.largest_bubble:g}; lower "
            "train_micro_batch_size_per_gpu, or allow more"
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


def layer_costs(config: Config) -> list[float]:
    """By what the trained layers are cut into pipeline stages: their operations for a mean number of tokens."""
    sampler = build_sampler(config)
    tokens = statistics.fmean(sampler.block_sizes(step).target_tokens for step in range(256))
    return shapes_of(config).trained_layers(
        context_tokens=config.ijepa.masks.context_tokens or default_context_tokens(config.grid),
        target_tokens=round(tokens),
        num_targets=config.ijepa.masks.num_targets,
    )


def computing_dtype(config: Config) -> torch.dtype:
    """The dtype of the products: that of torch_autocast where it is on, else that of the weights."""
    return autocast_dtype(config) or working_dtype(config)
