"""Compiled blocks: how many graphs there are, that nothing is compiled anew, and that eager blocks agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ijepa_ds.method.compiled import compile_blocks
from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.method.ijepa import IJEPA, normalize_targets
from ijepa_ds.method.masks import MultiblockSampler
from ijepa_ds.method.predictor import Predictor

IMAGE_SIZE, PATCH, GRID, WIDTH, BATCH = (32, 32), 4, (8, 8), 16, 2
SAMPLER = MultiblockSampler(seed=0, grid=GRID, context_tokens=18)
SIZES = SAMPLER.target_token_counts()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, a limit below what the sampler needs; both and the stance as they were after."""
    with torch._dynamo.config.patch(recompile_limit=len(SIZES) - 1):
        torch.compiler.reset()
        yield
        torch.compiler.set_stance("default")
        torch.compiler.reset()


def networks(*, depths: tuple[int, int] = (3, 4), checkpointing: bool = False) -> tuple[IJEPA, VisionTransformer]:
    draw, more = torch.Generator().manual_seed(0), {"activation_checkpointing": checkpointing}
    size = Dimensions(WIDTH, depths[0], 2)
    encoder, target = (VisionTransformer(IMAGE_SIZE, PATCH, size, generator=draw, **more) for _ in range(2))
    predictor = Predictor(GRID, WIDTH, width=8, depth=depths[1], heads=2, generator=draw, **more)
    return IJEPA(encoder, predictor), target.requires_grad_(False).eval()


def step(model: IJEPA, target: VisionTransformer, target_tokens: int) -> list[torch.Tensor]:
    """The loss and all gradients of made-up images and masks."""
    draw = torch.Generator().manual_seed(target_tokens)
    images = torch.randn(BATCH, 3, *IMAGE_SIZE, generator=draw)
    context_block = torch.rand(BATCH, 64, generator=draw).argsort(1)[:, : SAMPLER.context_tokens].contiguous()
    target_blocks = torch.rand(4, BATCH, 64, generator=draw).argsort(2)[..., :target_tokens].contiguous()
    with torch.no_grad():
        targets = normalize_targets(target.features_at(images, target_blocks))
    loss = model(images, context_block, target_blocks, targets)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


class Counting:
    """A backend that runs what it is given as it is, and notes the shapes that it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[Any, ...]] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        inputs = [node.meta["example_value"].shape for node in graph.graph.nodes if node.op == "placeholder"]
        self.shapes.append(tuple(inputs))
        return graph.forward


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_every_shape_is_compiled_once_for_all_blocks_and_never_again(checkpointing):
    counting, (model, target) = Counting(), networks(checkpointing=checkpointing)
    compile_blocks(model, target, num_shapes=len(SIZES), backend=counting)
    for target_tokens in SIZES:
        step(model, target, target_tokens)
    # One of each encoder, the predictor's three for each T, and the target's last block where it leaves patches out.
    assert len(counting.shapes) == 2 + 3 * len(SIZES) + sum(4 * target_tokens < 64 for target_tokens in SIZES)
    assert all(isinstance(length, int) for shapes in counting.shapes for shape in shapes for length in shape)
    torch.compiler.set_stance("fail_on_recompile")
    drawn = [SAMPLER.block_sizes(number).target_tokens for number in range(50)]
    assert len(set(drawn)) > 1
    for target_tokens in [*drawn, *SIZES]:  # of which some are rare
        step(model, target, target_tokens)


def test_a_shape_that_was_not_compiled_is_noticed_by_the_test_above():
    model, target = networks()
    compile_blocks(model, target, num_shapes=2, backend=Counting())
    step(model, target, SIZES[0])
    torch.compiler.set_stance("fail_on_recompile")
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        step(model, target, SIZES[1])


def test_other_shapes_run_uncompiled_once_all_are_there():
    """Pictures, the probe and health have batches of their own."""
    counting, (model, target) = Counting(), networks()
    compile_blocks(model, target, num_shapes=1, backend=counting)
    step(model, target, SIZES[0])
    torch.compiler.set_stance("eager_on_recompile")
    compiled = len(counting.shapes)
    images = torch.randn(5, 3, *IMAGE_SIZE)
    with torch.no_grad():
        features = target(images)
        assert len(counting.shapes) == compiled
        target.compiled = {}
        assert torch.equal(features, target(images))


@pytest.mark.parametrize("depths", [(1, 1), (2, 3)], ids=str)
def test_compiled_and_eager_agree(depths):
    """Up to the last compiler: torch's own would take minutes here."""
    model, target = networks(depths=depths)
    eager = step(model, target, SIZES[1])
    compile_blocks(model, target, num_shapes=1, backend="aot_eager")
    for ours, expected in zip(step(model, target, SIZES[1]), eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
