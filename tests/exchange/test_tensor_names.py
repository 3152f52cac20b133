"""Names of other projects: there and back, and against the library's own file."""

from __future__ import annotations

import torch
from distributed_runs import assert_same_tensors
from released_files import SMALL
from safetensors.torch import load_file
from transformers import IJepaConfig, IJepaModel

from ijepa_ds.exchange.tensor_names import from_reference, from_transformers, to_reference, to_transformers
from ijepa_ds.method.encoder import VisionTransformer

WEIGHTS = {name: torch.randn(t.shape) for name, t in VisionTransformer((32, 16), 4, SMALL).state_dict().items()}


def test_there_and_back() -> None:
    assert_same_tensors(from_transformers(to_transformers(WEIGHTS)), WEIGHTS)
    assert_same_tensors(from_reference(to_reference(WEIGHTS)), WEIGHTS)
    assert_same_tensors(from_reference(WEIGHTS), WEIGHTS)
    assert all(name.startswith("module.") for name in to_reference(WEIGHTS))


def test_names_and_shapes_are_those_of_the_librarys_own_file(tmp_path) -> None:
    config = IJepaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=(32, 16),
        patch_size=4,
    )  # fmt: skip
    IJepaModel(config).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    ours = to_transformers(WEIGHTS)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_what_has_no_counterpart_keeps_its_name() -> None:
    theirs = to_transformers(WEIGHTS)
    del theirs["encoder.layer.1.attention.attention.key.weight"]
    theirs["pooler.dense.weight"] = torch.ones(2)
    back = from_transformers(theirs)
    assert "blocks.1.attn.qkv.weight" not in back and "blocks.1.attn.qkv.bias" in back
    assert back.keys() - WEIGHTS.keys() == {
        "encoder.layer.1.attention.attention.query.weight",
        "encoder.layer.1.attention.attention.value.weight",
        "pooler.dense.weight",
    }
