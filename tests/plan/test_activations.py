"""The activations by formula are those that torch saves, byte by byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ijepa_ds.method.compiled import compile_blocks
from ijepa_ds.method.encoder import Dimensions, VisionTransformer, set_attention
from ijepa_ds.method.flops import Shapes
from ijepa_ds.method.ijepa import IJEPA
from ijepa_ds.method.predictor import Predictor
from ijepa_ds.plan.activations import Kept, layers

GRID, PATCH, BATCH, CONTEXT, TARGETS, TOKENS = (6, 6), 4, 2, 10, 4, 6
SIDE = GRID[0] * PATCH
SMALL = Dimensions(48, 3, 4, 192), Dimensions(32, 3, 2)
OTHER = Dimensions(40, 2, 2, 100), Dimensions(24, 2, 3)  # a narrow MLP, more heads in the predictor
ONLY_BLOCK = Dimensions(40, 1, 2), Dimensions(32, 1, 2)


def build(
    encoder: Dimensions, predictor: Dimensions, *, fused: bool, checkpointed: bool = False, dtype=torch.float32
) -> IJEPA:
    model = IJEPA(
        VisionTransformer((SIDE, SIDE), PATCH, encoder, activation_checkpointing=checkpointed),
        Predictor(
            GRID,
            encoder.width,
            width=predictor.width,
            depth=predictor.depth,
            heads=predictor.heads,
            activation_checkpointing=checkpointed,
        ),
    ).to(dtype)
    set_attention(model, fused=fused)
    return model


def loss_of(model: IJEPA) -> Callable[[], Tensor]:
    first = next(model.parameters())
    images = torch.randn(BATCH, 3, SIDE, SIDE, dtype=first.dtype)
    context = torch.rand(BATCH, 36).argsort(1)[:, :CONTEXT]
    blocks = torch.rand(TARGETS, BATCH, 36).argsort(2)[..., :TOKENS]
    targets = torch.randn(TARGETS * BATCH, TOKENS, model.context_encoder.embed_dim)
    return lambda: model(images, context, blocks, targets)


def saved_bytes(model: IJEPA, call: Callable[[], Tensor]) -> int:
    """Of all tensors that autograd saves, each storage once and the parameters' not at all."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = tensor  # kept: a freed storage's place is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def predicted(encoder: Dimensions, predictor: Dimensions, kept: Kept, *, checkpointed: bool = False) -> float:
    of_image = layers(
        Shapes(encoder, predictor, PATCH, 36),
        kept,
        context_tokens=CONTEXT,
        target_tokens=TOKENS,
        num_targets=TARGETS,
        checkpointed=checkpointed,
    )
    return BATCH * sum(layer.kept for layer in of_image)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sizes", [SMALL, OTHER, ONLY_BLOCK])
def test_in_fp32(sizes: tuple[Dimensions, Dimensions], fused: bool, checkpointed: bool) -> None:
    model = build(*sizes, fused=fused, checkpointed=checkpointed)
    assert predicted(*sizes, Kept(4, 4, fused), checkpointed=checkpointed) == saved_bytes(model, loss_of(model))


@pytest.mark.parametrize("fused", [False, True])
def test_in_bf16(fused: bool) -> None:
    """Not to the byte: on a CPU the norms keep their statistics in bf16, on GPUs in fp32."""
    model = build(*SMALL, fused=fused, dtype=torch.bfloat16)
    assert predicted(*SMALL, Kept(2, 2, fused)) == pytest.approx(saved_bytes(model, loss_of(model)), rel=0.01)


def test_under_autocast() -> None:
    """The tokens between blocks are fp32; beside activations there are copies of the weights that products read."""
    model = build(*SMALL, fused=True)
    loss = loss_of(model)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss()

    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = saved_bytes(model, call) - 2 * weights
    assert predicted(*SMALL, Kept(2, 4)) == pytest.approx(counted, rel=0.03)


def test_a_checkpointed_block_is_computed_again_with_all_of_its_activations() -> None:
    shapes = Shapes(*SMALL, PATCH, 36)
    sizes = {"context_tokens": CONTEXT, "target_tokens": TOKENS, "num_targets": TARGETS}
    whole, again = (layers(shapes, Kept(4, 4), **sizes, checkpointed=ways) for ways in (False, True))
    block = 1  # of the encoder
    assert again[block].kept + again[block].recomputed == whole[block].kept
    assert again[block].kept == CONTEXT * SMALL[0].width * 4
    assert 0 < again[-1].recomputed < whole[-1].kept


def test_compiled_blocks_keep_as_much() -> None:
    """By torch's partitioner, which inductor takes too, without its compiler."""
    model = build(*OTHER, fused=True)
    target = VisionTransformer((SIDE, SIDE), PATCH, OTHER[0])
    compile_blocks(model, target, num_shapes=1, backend="aot_eager_decomp_partition")
    loss = loss_of(model)
    loss().backward()  # compiles both passes
    try:
        assert predicted(*OTHER, Kept(4, 4)) == pytest.approx(saved_bytes(model, loss), rel=0.03)
    finally:
        torch._dynamo.reset()
