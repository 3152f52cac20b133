"""docs/minimal.md: the page's code has the loss of the real thing, and trains."""

from __future__ import annotations

import functools
import re
import types
from pathlib import Path

import torch
from made_up_images import smooth_image
from PIL import Image

from ijepa_ds.build import build_ijepa, build_target
from ijepa_ds.config import load_config
from ijepa_ds.method.ijepa import normalize_targets

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def page() -> types.ModuleType:
    """The page's code as a module."""
    code = (ROOT / "docs" / "minimal.md").read_text().partition("```python\n")[2].partition("```\n")[0]
    assert len(code.splitlines()) <= 120
    module = types.ModuleType("minimal")
    exec(compile(code, "minimal.py", "exec"), module.__dict__)
    return module


def test_a_batch_has_the_loss_of_the_real_thing() -> None:
    minimal, config = page(), load_config(ROOT / "ds_configs" / "cifar10_tiny.json", [])
    model, target = build_ijepa(config), build_target(config)
    encoder, predictor, target_encoder = minimal.Encoder(), minimal.Predictor(), minimal.Encoder()
    torch.manual_seed(0)
    weights = {name: torch.randn_like(tensor) / 20 for name, tensor in encoder.state_dict().items()}
    weights["pos_embed"] = encoder.pos_embed
    target_encoder.load_state_dict(weights)
    target = target.to_empty(device="cpu")
    target.load_state_dict(weights)
    encoder.load_state_dict(model.context_encoder.state_dict())
    predictor.load_state_dict(model.predictor.state_dict())  # names, shapes and positions are the same
    torch.testing.assert_close(minimal.positions(128), model.context_encoder.pos_embed)
    images, (keep, blocks) = torch.randn(6, 3, 32, 32), minimal.draw_masks(6)
    with torch.no_grad():
        expected = model(images, keep, blocks, normalize_targets(target.features_at(images, blocks)))
        loss = minimal.loss_of(encoder, predictor, target_encoder, images, keep, blocks)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_its_masks_are_the_papers() -> None:
    for _ in range(20):
        keep, blocks = page().draw_masks(4)
        assert keep.shape == (4, 18) and blocks.shape[:2] == (4, 4) and 9 <= blocks.shape[2] <= 13
        for image in range(4):
            assert not set(keep[image].tolist()) & set(blocks[:, image].flatten().tolist())
            assert len(set(keep[image].tolist())) == 18 and keep[image].max() < 64


def test_it_trains(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(page(), "BATCH", 4)
    monkeypatch.setattr(page(), "WORKERS", 0)
    for number in range(8):
        path = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_image(number, (32, 32))).save(path)
    told: list[str] = []
    monkeypatch.setattr(page(), "print", told.append, raising=False)
    torch.manual_seed(0)
    page().train(str(tmp_path / "images"), str(tmp_path / "images"), epochs=3)
    losses = [float(re.fullmatch(r"epoch \d: loss (\d\.\d+), kNN \d+\.\d%", line)[1]) for line in told]
    assert len(losses) == 3 and losses[2] < losses[0] < 1
