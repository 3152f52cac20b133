"""From a configuration to the parts of a run, after everything that can be refused has been refused."""

from __future__ import annotations

import dataclasses

import torch

from ijepa_ds.config import Config
from ijepa_ds.distributed import Process
from ijepa_ds.encoder import Dimensions, VisionTransformer, dimensions_of, set_attention
from ijepa_ds.errors import UserError
from ijepa_ds.ijepa import IJEPA
from ijepa_ds.loader import Dataset, PretrainingLoader, inspect_dataset
from ijepa_ds.masks import MaskSampler, MultiblockSampler, ReferenceSampler, default_context_tokens
from ijepa_ds.predictor import Predictor
from ijepa_ds.run_folder import RunFolder
from ijepa_ds.schedules import Schedules, build_schedules


def check_before_building(config: Config) -> tuple[Dataset, MaskSampler]:
    """Everything that can be refused before a model is built or a process joins."""
    data = config.ijepa.data
    dataset = inspect_dataset(data.train)
    if data.validation is not None:
        inspect_dataset(data.validation)
    if dataset.num_samples < config.global_batch:
        raise UserError(
            f"{data.train} holds {dataset.num_samples} images, fewer than one global batch; lower train_batch_size = "
            f"{config.global_batch}"
        )
    encoder_dimensions(config)
    sampler = build_sampler(config)
    folder = RunFolder(config)
    folder.check_writable()
    folder.check_belongs(config, dataset.num_samples)
    return dataset, sampler


def encoder_dimensions(config: Config) -> Dimensions:
    """The encoder's size: the named one with what the config overrides."""
    model = config.ijepa.model
    overrides = {key: getattr(model, key) for key in ("width", "depth", "heads", "mlp_ratio")}
    dimensions = dataclasses.replace(
        dimensions_of(model.encoder), **{key: value for key, value in overrides.items() if value is not None}
    )
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
    shared = {
        "seed": config.ijepa.run.seed,
        "grid": config.grid,
        "num_targets": masks.num_targets,
        "target_scale": masks.target_scale,
        "target_aspect_ratio": masks.target_aspect_ratio,
        "context_scale": masks.context_scale,
    }
    if masks.sampler == "reference":
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
    set_attention(ijepa, fused=torch.cuda.is_available())  # the target encoder has no backward: fused everywhere
    if config.ijepa.compile:
        for block in [*encoder.blocks, *predictor.predictor_blocks]:
            block.compile()
    return ijepa


def build_target(config: Config) -> VisionTransformer:
    """The target encoder's architecture, without weights."""
    with torch.device("meta"):
        encoder = build_encoder(config)
    if config.ijepa.compile:
        for block in encoder.blocks:
            block.compile()
    return encoder


def build_loader(config: Config, dataset: Dataset, sampler: MaskSampler, process: Process) -> PretrainingLoader:
    """The pretraining loader of this process."""
    data = config.ijepa.data
    return PretrainingLoader(
        dataset,
        sampler,
        image_size=data.image_size,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        seed=config.ijepa.run.seed,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        rank=process.rank,
        world_size=process.world_size,
        num_workers=data.workers,
    )


def schedules_of(config: Config, steps_per_epoch: int) -> Schedules:
    """The schedules of a config in steps."""
    recipe = dataclasses.asdict(config.ijepa.optimization)
    del recipe["betas"], recipe["eps"]
    return build_schedules(steps_per_epoch=steps_per_epoch, **recipe)
