"""Encoders of other projects: read, checked tensor by tensor, with the features that the other library gives."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from distributed_runs import assert_same_tensors
from released_files import SMALL, released_checkpoint, save_released
from safetensors.torch import load_file, save_file
from transformers import IJepaConfig, IJepaModel

from ijepa_ds.errors import UserError
from ijepa_ds.exchange.read import read_encoder, read_reference
from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.method.positions import sine_cosine_positions


def test_parameters_and_16_bit_weights_are_taken(tmp_path) -> None:
    encoder = VisionTransformer((32, 32), 4, SMALL).bfloat16()
    torch.save(dict(encoder.named_parameters()), tmp_path / "x.pth")
    foreign = read_encoder(tmp_path / "x.pth", heads=2)
    expected = {name: p.detach().float() for name, p in encoder.named_parameters() if name != "pos_embed"}
    assert_same_tensors(foreign.weights, expected)
    assert not any(tensor.requires_grad for tensor in foreign.weights.values())
    assert torch.equal(foreign.state_dict()["pos_embed"][0], sine_cosine_positions(32, (8, 8)))  # not its rounding


def build(foreign, image_size):
    """Our encoder with the weights that were read, at any image size."""
    encoder = VisionTransformer(image_size, foreign.patch_size, foreign.dimensions)
    encoder.load_state_dict(foreign.state_dict(encoder.grid))
    return encoder.eval()


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_a_released_checkpoint(tmp_path, encoder) -> None:
    content = released_checkpoint((32, 16))
    path = save_released(tmp_path / "x.pth.tar", content)
    foreign = read_encoder(path, encoder=encoder, heads=2)
    assert (foreign.format, foreign.role, foreign.grid, foreign.patch_size) == ("reference", encoder, (8, 4), 4)
    assert foreign.dimensions == SMALL and f"the {encoder.upper()} encoder" in foreign.describe()
    key = {"target": "target_encoder", "context": "encoder"}[encoder]
    expected = {name.removeprefix("module."): tensor for name, tensor in content[key].items()}
    assert_same_tensors(foreign.state_dict(), expected)


def test_the_target_encoder_is_the_default(tmp_path) -> None:
    path = save_released(tmp_path / "x.pth.tar")
    assert_same_tensors(read_encoder(path, heads=2).weights, read_encoder(path, encoder="target", heads=2).weights)
    assert read_encoder(path, heads=2).role == "target"


def test_a_named_width_needs_no_heads_and_others_do(tmp_path) -> None:
    named = save_released(tmp_path / "named.pth.tar", dimensions=Dimensions(192, 1, 3), predictor_width=48)
    assert read_encoder(named).dimensions.heads == 3
    other = save_released(tmp_path / "other.pth.tar")
    with pytest.raises(UserError, match="width of 32, which is none of the named sizes, and heads cannot be read"):
        read_encoder(other)


@pytest.mark.parametrize("image_size", [(32, 32), (32, 16), (48, 48)])
def test_features_of_timms_file_are_timms(tmp_path, image_size) -> None:
    """The weights were stored at 32 px, and are used at that size and others: the positions are computed again."""
    stored = VisionTransformer((32, 32), 4, SMALL).state_dict()
    stored = {name: t + 0.1 * torch.randn(t.shape) * (name != "pos_embed") for name, t in stored.items()}
    save_file(stored, tmp_path / "x.safetensors")
    torch.save(stored, tmp_path / "x.pth")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=image_size, patch_size=4, embed_dim=32, depth=2, num_heads=2,
        class_token=False, global_pool="avg", fc_norm=False, num_classes=0,
    ).eval()  # fmt: skip
    grid = image_size[0] // 4, image_size[1] // 4
    model.load_state_dict({**stored, "pos_embed": sine_cosine_positions(32, grid)[None]})
    images = torch.randn(3, 3, *image_size)
    for path in (tmp_path / "x.safetensors", tmp_path / "x.pth"):
        foreign = read_encoder(path, heads=2)
        assert (foreign.format, foreign.role, foreign.grid) == ("timm", "unknown", (8, 8))
        with torch.no_grad():
            torch.testing.assert_close(
                build(foreign, image_size)(images), model.forward_features(images), rtol=0, atol=1e-5
            )


def transformers_folder(path, image_size=(32, 32), **changes):
    """A folder as the library saves it, from random weights and fixed positions."""
    config = IJepaConfig(**{
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
        "image_size": image_size, "patch_size": 4, "layer_norm_eps": 1e-6, **changes,
    })  # fmt: skip
    model = IJepaModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        grid = image_size[0] // 4, image_size[1] // 4
        model.embeddings.position_embeddings.copy_(sine_cosine_positions(32, grid)[None])
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("image_size", [(32, 32), (32, 16), (16, 32)])
def test_features_of_a_transformers_folder_are_the_librarys(tmp_path, image_size) -> None:
    model = transformers_folder(tmp_path, image_size)
    foreign = read_encoder(tmp_path)
    assert (foreign.format, foreign.role) == ("transformers", "unknown")
    assert foreign.dimensions == Dimensions(32, 2, 2, 96) and foreign.grid == (image_size[0] // 4, image_size[1] // 4)
    images = torch.randn(3, 3, *image_size)
    with torch.no_grad():
        theirs = model(images).last_hidden_state
        torch.testing.assert_close(build(foreign, image_size)(images), theirs, rtol=0, atol=1e-5)


def test_a_transformers_folder_that_is_not_whole_or_of_another_kind(tmp_path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_encoder(tmp_path)
    transformers_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, expected in (
        ({"model_type": "vit"}, 'is not of an I-JEPA encoder:\n  - model_type = "vit" must be ijepa'),
        ({"hidden_act": "relu", "qkv_bias": False}, "must be gelu\n  - qkv_bias = false must be true"),
        ({"num_attention_heads": "2"}, 'num_attention_heads = "2" must be a whole number'),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3, 2 in the tensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=expected):
            read_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--heads 4 is not the 2 of"):
        read_encoder(tmp_path, heads=4)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_encoder(tmp_path)


def test_every_problem_of_a_checkpoint_is_named_at_once(tmp_path) -> None:
    content = released_checkpoint()
    del content["encoder"]["module.norm.bias"]
    content["encoder"]["module.cls_token"] = torch.zeros(1, 1, 32)
    content["target_encoder"]["module.blocks.1.norm1.weight"] = torch.ones(28)
    content["target_encoder"]["module.norm.weight"][3] = float("nan")
    del content["predictor"]["module.mask_token"]
    content["predictor"]["module.predictor_proj.bias"] = 3
    with pytest.raises(UserError) as error:
        read_reference(save_released(tmp_path / "x.pth.tar", content), heads=2)
    for expected in (
        "6 problems", "encoder: norm.bias is missing", "encoder: cls_token is unknown",
        "target_encoder: blocks.1.norm1.weight is [28], not [32]", "target_encoder: norm.weight holds NaN",
        "predictor: mask_token is missing", "predictor: predictor_proj.bias is a int, not a tensor",
    ):  # fmt: skip
        assert expected in str(error.value)


def test_parts_that_are_missing_or_do_not_fit_each_other(tmp_path) -> None:
    content = released_checkpoint()
    path = save_released(tmp_path / "x.pth.tar", {key: content[key] for key in ("encoder", "target_encoder")})
    with pytest.raises(UserError, match="lacks predictor: a run goes on from both"):
        read_reference(path, heads=2)
    deeper = released_checkpoint(dimensions=Dimensions(32, 3, 2))
    path = save_released(tmp_path / "y.pth.tar", {**content, "encoder": deeper["encoder"]})
    with pytest.raises(UserError, match="encoder and target_encoder differ in size"):
        read_reference(path, heads=2)
    wider = released_checkpoint(dimensions=Dimensions(48, 2, 2))
    path = save_released(tmp_path / "z.pth.tar", {**content, "predictor": wider["predictor"]})
    with pytest.raises(UserError, match="takes features of width 48, the encoder's are 32"):
        read_reference(path, heads=2)
    other_grid = released_checkpoint((16, 32))
    path = save_released(tmp_path / "g.pth.tar", {**content, "predictor": other_grid["predictor"]})
    with pytest.raises(UserError, match="positions of several grids"):
        read_reference(path, heads=2)


def test_learned_positions_are_refused(tmp_path) -> None:
    content = released_checkpoint()
    content["target_encoder"]["module.pos_embed"] = 0.02 * torch.randn(1, 64, 32)
    path = save_released(tmp_path / "x.pth.tar", content)
    for read in (read_encoder, read_reference):
        with pytest.raises(UserError, match="other positions than the fixed sine-cosine ones") as error:
            read(path, heads=2)
        assert "\n" not in str(error.value)


def test_another_encoder_than_the_files_cannot_be_had(tmp_path) -> None:
    weights = VisionTransformer((32, 32), 4, SMALL).state_dict()
    save_file(weights, tmp_path / "x.safetensors", metadata={"encoder": "context (what the optimizer trains)"})
    assert read_encoder(tmp_path / "x.safetensors", heads=2).role == "context"
    with pytest.raises(UserError, match="holds the context encoder, not the target encoder"):
        read_encoder(tmp_path / "x.safetensors", encoder="target", heads=2)
    with pytest.raises(UserError, match="does not exist"):
        read_encoder(tmp_path / "nowhere.pth")


def test_what_holds_no_encoder_at_all(tmp_path) -> None:
    torch.save({"weights": torch.ones(3)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="to tell a size"):
        read_encoder(tmp_path / "x.pth")
    torch.save({"encoder": {"module.norm.weight": torch.ones(3)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no state dict under 'target_encoder'; it holds encoder"):
        read_encoder(tmp_path / "x.pth")
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="lacks encoder, predictor, target_encoder"):
        read_reference(tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")  # it is a sound file
