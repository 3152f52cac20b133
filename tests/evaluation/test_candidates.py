"""What is measured: pooled features against timm's, the random encoders, and pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from distributed_runs import tiny_config

from ijepa_ds.build import build_encoder
from ijepa_ds.config import Config, parse_config
from ijepa_ds.distributed import Process
from ijepa_ds.evaluation import candidates as candidates_module
from ijepa_ds.evaluation.candidates import PIXELS, candidates, pooled_features, small_pixels
from ijepa_ds.evaluation.subject import Subject

ALONE = Process(0, 1, torch.device("cpu"))
IMAGES = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def config_of(depth: int) -> Config:
    return parse_config(tiny_config(ijepa__model__depth=depth, bf16={}))


def test_pooled_features_are_timms_intermediates_with_norm():
    config = config_of(6)
    module = build_encoder(config, torch.Generator().manual_seed(3)).eval()
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=6, num_heads=2, class_token=False,
        global_pool="avg", fc_norm=False, num_classes=0,
    ).eval()  # fmt: skip
    model.load_state_dict(module.state_dict())
    mean, std = (torch.tensor(values) for values in (config.ijepa.data.mean, config.ijepa.data.std))
    images = ((IMAGES / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        ours = pooled_features(module, config)(IMAGES)
        theirs = model.forward_intermediates(images, indices=4, norm=True, output_fmt="NLC", intermediates_only=True)
        last = model(images)
    torch.testing.assert_close(ours, torch.cat([block.mean(1) for block in theirs], dim=1))
    torch.testing.assert_close(ours[:, -32:], last)


@pytest.mark.parametrize("depth", [1, 3])
def test_an_encoder_of_fewer_blocks_gives_all_it_has(depth):
    config = config_of(depth)
    assert pooled_features(build_encoder(config).eval(), config)(IMAGES).shape == (5, depth * 32)


def test_trained_random_and_pixels_in_order():
    config = config_of(5)
    trained = build_encoder(config, torch.Generator().manual_seed(99))
    subject = Subject(config, trained.state_dict(), "here", Path("x"), Path("y"))
    measured = list(candidates(subject, ALONE, random_seeds=2))
    assert [str(candidate) for candidate in measured] == ["trained", "random 0", "random 1", "pixels"]
    rows = [candidate.forward(IMAGES) for candidate in measured]
    assert [row.shape[1] for row in rows] == [128, 128, 128, 3 * PIXELS**2]
    torch.testing.assert_close(rows[0], pooled_features(trained.eval(), config)(IMAGES))
    assert not any(torch.allclose(rows[a], rows[b], atol=1e-2) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert measured[0].views == {"last": slice(-32, None), "last4": slice(None)}
    assert not any(p.requires_grad for p in measured[0].module.parameters()) and measured[3].module is None
    small = small_pixels(IMAGES).view(5, 3, PIXELS, PIXELS)
    expected = IMAGES.float().view(5, 16, 2, 16, 2, 3).mean(dim=(2, 4)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(small, expected)


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_is_measured_in_fp32_where_it_would_be_emulated(monkeypatch, fast, dtype):
    monkeypatch.setattr(candidates_module, "has_fast_bf16", lambda device: fast)
    config = parse_config(tiny_config(bf16={"enabled": True}))
    subject = Subject(config, build_encoder(config).state_dict(), "here", Path("x"), Path("y"))
    trained, random, _ = candidates(subject, ALONE, random_seeds=1)
    assert trained.module.patch_embed.proj.weight.dtype == random.module.patch_embed.proj.weight.dtype == dtype
    assert trained.forward(IMAGES).dtype == torch.float32
    assert {parameter.dtype for parameter in trained.build().parameters()} == {torch.float32}  # to be trained
