"""Fine-tuning: parameter groups against timm's, one step against plain torch, any split of the batch, two processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from distributed_runs import run_ranks
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.inputs import CachedInputs
from ijepa_ds.evaluation.probes.finetune import FineTuneRecipe, fine_tune, layer_decay_groups
from ijepa_ds.method.encoder import Dimensions, VisionTransformer, initialize
from ijepa_ds.progress import Progress

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


def tune(encoder, recipe=QUICK, *, process=ALONE, train=TRAIN, batch=8, micro_batch=64, seed=0) -> torch.Tensor:
    inputs = CachedInputs(*train, batch=batch, seed=seed, process=process)
    validation = [VAL[0][process.rank :: process.world_size]]
    progress = Progress(1, name="fine-tuning", enabled=False)
    recipe = dataclasses.replace(recipe, micro_batch=micro_batch)
    predictions = fine_tune(encoder, inputs, validation, recipe, progress)
    assert predictions.shape == (len(VAL[1]),)
    return predictions


def weights_of(encoder: nn.Module) -> torch.Tensor:
    """Of the encoder, without its head."""
    named = encoder.named_parameters()
    return torch.cat([parameter.detach().flatten() for name, parameter in named if not name.startswith("head.")])


@pytest.mark.parametrize("positions_trained", [True, False])
def test_the_groups_are_those_of_timms_own_model(positions_trained):
    encoder = tiny_encoder()
    encoder.head = nn.Linear(32, CLASSES)
    model = TimmVisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, class_token=False, global_pool="avg",
        fc_norm=False, num_classes=CLASSES,
    )  # fmt: skip
    expected, values = {}, {}
    model.pos_embed.requires_grad = encoder.pos_embed.requires_grad = positions_trained
    names = {id(parameter): name for part in (encoder, model) for name, parameter in part.named_parameters()}
    for group in param_groups_layer_decay(model, 0.4, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75):
        for parameter in group["params"]:
            expected[names[id(parameter)]] = (group["lr_scale"] * 3e-5, group["weight_decay"])
    for group in layer_decay_groups(encoder, FineTuneRecipe()):
        values |= {names[id(parameter)]: (group["peak_lr"], group["weight_decay"]) for parameter in group["params"]}
    assert values == expected and ("pos_embed" in values) == positions_trained
    assert values["patch_embed.proj.weight"] == pytest.approx((3e-5 * 0.75**3, 0.4))
    assert values["blocks.0.attn.qkv.bias"] == pytest.approx((3e-5 * 0.75**2, 0.0))
    assert values["norm.weight"] == pytest.approx((3e-5 * 0.75, 0.0))  # with the last block
    assert values["head.weight"] == (3e-5, 0.4) and values["head.bias"] == (3e-5, 0.0)


def test_the_first_step_is_torchs_adamw():
    recipe = FineTuneRecipe(epochs=1, lr=1e-3, warmup_epochs=0)
    encoder, plain, head = tiny_encoder(), tiny_encoder(), nn.Linear(32, CLASSES)
    initialize(head, torch.Generator().manual_seed(5))
    images, labels = TRAIN
    tune(encoder, recipe, batch=22, seed=5, micro_batch=7)
    loss = F.cross_entropy(head(plain(images).mean(1)), labels, label_smoothing=0.1)
    loss.backward()
    # One step of AdamW from nothing: the sign of the gradient times lr, and the decay. Cosine at step 1 of 2: half.
    weight = plain.blocks[1].mlp.fc1.weight
    lr = 1e-3 * 0.75 / 2
    expected = weight * (1 - lr * 0.4) - lr * weight.grad / (weight.grad.abs() + 1e-8)
    torch.testing.assert_close(encoder.blocks[1].mlp.fc1.weight, expected, rtol=0, atol=2e-6)
    assert torch.equal(encoder.pos_embed, plain.pos_embed) and not encoder.training


def test_it_learns_and_is_deterministic():
    encoder, again, other = tiny_encoder(), tiny_encoder(), tiny_encoder()
    recipe = FineTuneRecipe(epochs=30, lr=3e-3, warmup_epochs=2)
    predictions = tune(encoder, recipe)
    assert float((predictions == VAL[1]).double().mean()) > 0.85
    assert torch.equal(tune(again, recipe), predictions) and torch.equal(weights_of(again), weights_of(encoder))
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
    same = [name for name, weight in encoder.named_parameters() if name in before and torch.equal(weight, before[name])]
    assert same == ["pos_embed"]
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def tune_in_a_rank() -> dict:
    from ijepa_ds.engine.zero import init_distributed

    process, encoder = init_distributed(), tiny_encoder()
    predictions = tune(encoder, process=process)
    return {"weights": weights_of(encoder), "predictions": predictions}


def test_two_processes_take_the_same_steps():
    encoder = tiny_encoder()
    alone, ranks = tune(encoder), run_ranks(tune_in_a_rank, 2)
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], weights_of(encoder), rtol=0, atol=1e-4)
        assert torch.equal(rank["weights"], ranks[0]["weights"])
        assert int((rank["predictions"] != alone).sum()) <= 1


def test_training_that_diverges_is_refused():
    with pytest.raises(UserError, match="fine-tuning diverged in epoch 1"):
        tune(tiny_encoder(), train=(TRAIN[0] * float("nan"), TRAIN[1]))
