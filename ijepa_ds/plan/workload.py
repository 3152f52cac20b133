"""What a configuration asks of the devices, in numbers.

Shapes: N patches, K context tokens, M target blocks, T tokens of a target block, D encoder width, P predictor width.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ijepa_ds.build import (
    autocast_dtype,
    build_sampler,
    computing_dtype,
    encoder_dimensions,
    layer_costs,
    shapes_of,
    working_dtype,
)
from ijepa_ds.config import Config
from ijepa_ds.method.encoder import Dimensions
from ijepa_ds.method.flops import CHANNELS, Flops, Shapes
from ijepa_ds.method.masks import MultiblockSampler
from ijepa_ds.plan.activations import Kept, Layer, layers

_STEPS = 2000  # of a run, over whose masks a mean is taken
_GROUPS = 64  # of images, in search of the reference sampler's numbers of context tokens


@dataclass(frozen=True)
class Tokens:
    """Of an image: ``targets`` counts the steps of each T; ``most_context`` is the largest K, ``context`` the mean.

    Of each of its ``contexts``, where it has several.
    """

    context: int
    most_context: int
    targets: Counter[int]
    most_target: int
    num_targets: int
    contexts: int = 1

    @property
    def mean_target(self) -> float:
        """T on average over the steps."""
        return sum(tokens * steps for tokens, steps in self.targets.items()) / self.targets.total()


@dataclass(frozen=True)
class Workload:
    """A run without its devices. ``settings``: DeepSpeed's; ``dtype``: of the products."""

    shapes: Shapes
    tokens: Tokens
    settings: dict[str, Any]
    dtype: torch.dtype
    kept: Kept
    weight_bytes: int
    pixels: int
    global_batch: int
    micro_batch: int
    stages: int
    checkpointed: bool
    epochs: float
    workers: int
    layer_costs: list[float]  # by which the layers are cut into stages
    regulariser_parameters: int = 0  # of the projection whose statistics the loss asks for

    @property
    def zero_stage(self) -> int:
        """What ZeRO shards: 0, 1 or 2."""
        return int(self.settings["zero_optimization"].get("stage", 0))

    @property
    def is_bf16(self) -> bool:
        """Whether the weights that compute are bf16."""
        return self.weight_bytes == 2

    @property
    def sums_bytes(self) -> int:
        """Of an element of the gradients' sums over micro-batches."""
        if self.is_bf16 and not self.zero_stage:
            return 4  # copies of all gradients, while the step is taken
        sums = self.settings["data_types"].get("grad_accum_dtype")
        return {"fp32": 4, "bf16": 2}.get(str(sums), self.weight_bytes)

    @property
    def has_separate_sums(self) -> bool:
        """Whether whole gradients are summed in another precision than they are computed in."""
        return self.is_bf16 and (self.sums_bytes > self.weight_bytes or not self.zero_stage)

    @property
    def reduced_bytes(self) -> int:
        """Of an element of the gradients on their way between processes."""
        told = str(self.settings.get("communication_data_type"))
        usual = 4 if self.stages > 1 else self.weight_bytes
        return {"fp32": 4, "bf16": 2, "bfp16": 2, "fp16": 2}.get(told, usual)

    @property
    def layer_parameters(self) -> list[int]:
        """Trained parameters of the embedding, each of the encoder's blocks, its norm, and the predictor."""
        encoder, predictor = self.shapes.encoder, self.shapes.predictor
        embedding = CHANNELS * self.shapes.patch_size**2 * encoder.width + encoder.width
        between = 2 * encoder.width * predictor.width + encoder.width + predictor.width  # the two projections
        last = predictor.depth * _block_parameters(predictor) + 2 * predictor.width + between + predictor.width
        last += self.regulariser_parameters
        return [embedding, *[_block_parameters(encoder)] * encoder.depth, 2 * encoder.width, last]

    @property
    def parameters(self) -> int:
        """All that are trained; the fixed positions are not."""
        return sum(self.layer_parameters)

    @property
    def encoder_parameters(self) -> int:
        """Those of the context encoder, and so of the average and the target encoder."""
        return sum(self.layer_parameters[:-1])

    @cached_property
    def flops(self) -> Flops:
        """Operations of an image, on average over the run's masks."""
        counts = [(self.flops_at(tokens), steps) for tokens, steps in self.tokens.targets.items()]
        total = self.tokens.targets.total()
        names = ("target", "context_encoder", "predictor")
        return Flops(*(sum(getattr(flops, name) * steps for flops, steps in counts) / total for name in names))

    def flops_at(self, target_tokens: int) -> Flops:
        """Operations of an image of a step with this T."""
        return self.shapes.flops(
            context_tokens=self.tokens.context,
            target_tokens=target_tokens,
            num_targets=self.tokens.num_targets,
            contexts=self.tokens.contexts,
        )

    def activations(self, *, checkpointed: bool) -> list[Layer]:
        """Of each layer, at the largest numbers of tokens; bytes of one context of an image."""
        return layers(
            self.shapes,
            self.kept,
            context_tokens=self.tokens.most_context,
            target_tokens=self.tokens.most_target,
            num_targets=self.tokens.num_targets,
            checkpointed=checkpointed,
        )


def workload_of(config: Config, num_steps: int) -> Workload:
    """Of a configuration that trains for ``num_steps``, on GPUs: attention is fused."""
    product = computing_dtype(config).itemsize
    working = working_dtype(config)
    rows, columns = config.ijepa.data.image_size
    return Workload(
        shapes=shapes_of(config),
        tokens=_tokens(config, num_steps),
        settings=config.deepspeed,
        dtype=computing_dtype(config),
        kept=Kept(product, working.itemsize if autocast_dtype(config) else product),
        weight_bytes=working.itemsize,
        pixels=rows * columns,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        stages=config.ijepa.pipeline.stages,
        checkpointed=config.ijepa.model.activation_checkpointing,
        epochs=config.ijepa.optimization.epochs,
        workers=config.ijepa.data.workers,
        layer_costs=layer_costs(config),
        regulariser_parameters=_regulariser_parameters(config),
    )


def _tokens(config: Config, num_steps: int) -> Tokens:
    sampler = build_sampler(config)
    steps = np.unique(np.linspace(0, max(num_steps - 1, 0), _STEPS).astype(int))
    targets = Counter(sampler.block_sizes(int(step)).target_tokens for step in steps)
    if isinstance(sampler, MultiblockSampler):
        contexts = [sampler.context_tokens]
    else:
        group = np.arange(sampler.truncation_group)
        contexts = [sampler.context_count(int(step), group) for step in steps[:: max(1, len(steps) // _GROUPS)]]
    mean = round(sum(contexts) / len(contexts))
    each = config.ijepa.objective.contexts
    return Tokens(mean, max(contexts), targets, sampler.max_target_tokens(), sampler.num_targets, each)


def _regulariser_parameters(config: Config) -> int:
    objective, width = config.ijepa.objective, encoder_dimensions(config).width
    hidden = objective.vicreg_width if objective.vicreg else 0
    return (width + 1) * hidden + (hidden + 1) * hidden


def _block_parameters(size: Dimensions) -> int:
    width, hidden = size.width, size.hidden
    attention = 4 * width * width + 4 * width
    return attention + 2 * width * hidden + hidden + width + 4 * width  # and two norms
