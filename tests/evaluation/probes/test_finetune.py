"""Fine-tuning: parameter groups against timm's, one step against plain torch, any split of the batch, two processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from distributed_runs import run_ranks
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.finetune import FineTuneRecipe, fine_tune, layer_decay_groups
from ijepa_ds.method.encoder import Dimensions, VisionTransformer, initialize

ALONE = Process(0, 1, torch.device("cpu"))
SIZE, CLASSES = (16, 16), 3
QUICK = FineTuneRecipe(epochs=3, lr=2e-3, warmup_epochs=1)


def tiny_encoder(seed: int = 0) -> VisionTransformer:
    return VisionTransformer(SIZE, 4, Dimensions(32, 2, 2), generator=torch.Generator().manual_seed(seed))


def images_of(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, brighter in the colour that is the class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (num_images,), generator=draw)
    images = torch.randn(num_images, 3, *SIZE, generator=draw)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label] += 1.0
    return images, labels


TRAIN, VAL = images_of(22, 0), images_of(31, 1)


def share(epoch: int, rank: int = 0, world_size: int = 1, batch: int = 8):
    """This process's part of each step of an epoch: 8, 8 and 6 images."""
    order = torch.randperm(len(TRAIN[0]), generator=torch.Generator().manual_seed(epoch))
    for step in order.split(batch):
        mine = step[rank::world_size]
        yield TRAIN[0][mine], TRAIN[1][mine]


def tune(encoder, recipe=QUICK, *, process=ALONE, micro_batch=64, **changes):
    options = {
        "batches": lambda epoch: share(epoch, process.rank, process.world_size),
        "validation": lambda: [tuple(part[process.rank :: process.world_size] for part in VAL)],
        "steps_per_epoch": 3, "num_classes": CLASSES, "say": [].append,
    }  # fmt: skip
    return fine_tune(encoder, process=process, recipe=recipe, micro_batch=micro_batch, **(options | changes))


def weights_of(encoder: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])


@pytest.mark.parametrize("positions_trained", [True, False])
def test_the_groups_are_timms(positions_trained):
    encoder, head = tiny_encoder(), nn.Linear(32, CLASSES)
    encoder.pos_embed.requires_grad = positions_trained
    model = TimmVisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, class_token=False, global_pool="avg",
        fc_norm=False, num_classes=CLASSES,
    )  # fmt: skip
    model.pos_embed.requires_grad = positions_trained
    theirs, name_of = {}, {id(parameter): name for name, parameter in model.named_parameters()}
    for group in param_groups_layer_decay(model, 0.4, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75):
        for parameter in group["params"]:
            theirs[name_of[id(parameter)]] = (group["lr_scale"] * 3e-5, group["weight_decay"])
    groups = layer_decay_groups(encoder, head, lr=3e-5, weight_decay=0.4, layer_decay=0.75)
    ours = {name: (group["peak_lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert ours.keys() == theirs.keys() and ("pos_embed" in ours) == positions_trained
    for name, values in ours.items():
        assert values == pytest.approx(theirs[name]), name
    assert ours["patch_embed.proj.weight"] == pytest.approx((3e-5 * 0.75**3, 0.4))


def test_the_first_step_is_torchs_adamw():
    recipe = FineTuneRecipe(epochs=1, lr=1e-3, warmup_epochs=0)
    encoder, plain, head = tiny_encoder(), tiny_encoder(), nn.Linear(32, CLASSES)
    initialize(head, torch.Generator().manual_seed(5))
    images, labels = TRAIN
    tune(encoder, recipe, batches=lambda epoch: [(images, labels)], steps_per_epoch=1, seed=5, micro_batch=7)
    loss = F.cross_entropy(head(plain(images).mean(1)), labels, label_smoothing=0.1)
    loss.backward()
    # One step of AdamW from nothing: the sign of the gradient times lr, and the decay. Cosine at step 1 of 2: half.
    weight = plain.blocks[1].mlp.fc1.weight
    lr = 1e-3 * 0.75 / 2
    expected = weight * (1 - lr * 0.4) - lr * weight.grad / (weight.grad.abs() + 1e-8)
    torch.testing.assert_close(encoder.blocks[1].mlp.fc1.weight, expected, rtol=0, atol=2e-6)
    assert torch.equal(encoder.pos_embed, plain.pos_embed) and not encoder.training


def test_it_learns_and_is_deterministic():
    encoder = tiny_encoder()
    recipe = FineTuneRecipe(epochs=20, lr=3e-3, warmup_epochs=2)
    lines = []
    first = tune(encoder, recipe, validate_epochs=8, say=lines.append)
    assert list(first.accuracy) == [8, 16, 20] and first.accuracy[20] > 85 and first.images_per_second > 0
    assert torch.equal(first.labels, VAL[1])
    assert 100 * float((first.predictions == first.labels).float().mean()) == pytest.approx(first.accuracy[20])
    assert sum("images/s" in line and "left" in line for line in lines) == 20
    again = tiny_encoder()
    second = tune(again, recipe, validate_epochs=8)
    assert second.accuracy == first.accuracy and torch.equal(weights_of(again), weights_of(encoder))
    assert not torch.equal(weights_of(encoder), weights_of(tiny_encoder()))
    other = tiny_encoder()
    tune(other, recipe, seed=1)
    assert not torch.equal(weights_of(other), weights_of(encoder))


def test_micro_batches_change_nothing():
    whole, parts = tiny_encoder(), tiny_encoder()
    tune(whole)
    tune(parts, micro_batch=3)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=0, atol=1e-4)
    assert (weights_of(whole) - weights_of(tiny_encoder())).abs().max() > 2e-3


def test_a_frozen_bf16_encoder_is_trained_in_float32():
    encoder = tiny_encoder().to(torch.bfloat16).requires_grad_(False)
    before = {name: weight.float().clone() for name, weight in encoder.named_parameters()}
    tune(encoder)
    same = [name for name, weight in encoder.named_parameters() if torch.equal(weight, before[name])]
    assert same == ["pos_embed"]
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def tune_in_a_rank() -> dict:
    from ijepa_ds.engine.zero import init_distributed

    process, encoder = init_distributed(), tiny_encoder()
    result = tune(encoder, process=process)
    late = tiny_encoder()
    shares = lambda epoch: share(epoch) if process.rank == 0 else iter(())  # noqa: E731
    validation = lambda: [(VAL[0][:1], VAL[1][:1])] if process.rank == 0 else []  # noqa: E731
    # One process has all images, the other none.
    lopsided = tune(late, process=process, batches=shares, validation=validation, validate_epochs=99).images_per_second
    return {"weights": weights_of(encoder), "result": result, "late": weights_of(late), "rate": lopsided}


def test_two_processes_take_the_same_steps():
    encoder = tiny_encoder()
    alone, ranks = tune(encoder), run_ranks(tune_in_a_rank, 2)
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], weights_of(encoder), rtol=0, atol=1e-4)
        assert torch.equal(rank["weights"], ranks[0]["weights"])
        assert torch.equal(rank["result"].labels, alone.labels)
        assert rank["result"].accuracy == pytest.approx(alone.accuracy, abs=4)  # one image is 3.2
        torch.testing.assert_close(rank["late"], weights_of(encoder), rtol=0, atol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="0 epochs trains nothing"):
        tune(tiny_encoder(), FineTuneRecipe(epochs=0))
    with pytest.raises(UserError, match=r"layer_decay is 1.5"):
        tune(tiny_encoder(), FineTuneRecipe(layer_decay=1.5))
    with pytest.raises(UserError, match="from 0 to 2 are not the 2 classes"):
        tune(tiny_encoder(), num_classes=2)
    with pytest.raises(UserError, match="fine-tuning diverged in epoch 1"):
        tune(tiny_encoder(), batches=lambda epoch: [(TRAIN[0] * float("nan"), TRAIN[1])] * 3)
    with pytest.raises(ValueError, match="more batches than its 2 steps"):
        tune(tiny_encoder(), steps_per_epoch=2)
    with pytest.raises(ValueError, match="no images for step 3"):
        tune(tiny_encoder(), steps_per_epoch=4)
