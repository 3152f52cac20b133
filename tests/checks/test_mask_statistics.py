"""What the masks command says of a sampler, against the sampler's own draws and what was recorded elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ijepa_ds.checks.mask_statistics import main, mask_statistics
from ijepa_ds.errors import UserError
from ijepa_ds.method.masks import MultiblockSampler, ReferenceSampler

# facebookresearch/ijepa src/masks/multiblock.py, 20,000 images of ViT-H/14 at 224, batch size 1.
RECORDED_SHAPES = {"5x7": 0.0482, "6x6": 0.01735, "6x7": 0.27845, "7x6": 0.2869, "8x6": 0.29605, "9x6": 0.07305}
RECORDED_TOKENS = 110.1857
RECORDED_ROWS = [0.775, 0.639, 0.527, 0.435]  # the context's mean coverage of the first four rows


@pytest.fixture(scope="module")
def reference() -> dict:
    return mask_statistics(ReferenceSampler(seed=3, grid=(16, 16)), 6000)


def test_the_reference_sampler_matches_what_was_recorded(reference):
    assert reference["context_tokens"]["mean"] == pytest.approx(RECORDED_TOKENS, rel=0.01)
    shares = reference["target_block_height_width"]
    assert shares.keys() == RECORDED_SHAPES.keys()
    for shape, share in RECORDED_SHAPES.items():
        assert shares[shape] == pytest.approx(share, abs=0.02)
    rows = np.mean(reference["context_coverage_by_patch"], axis=1)
    assert rows[:4] == pytest.approx(RECORDED_ROWS, abs=0.02)
    assert rows[15] == 0


def test_coverages_add_up(reference):
    """Context: tokens an image. Targets: the area of a block. Context and targets are disjoint."""
    assert np.sum(reference["context_coverage_by_patch"]) == pytest.approx(
        reference["context_tokens"]["mean"], abs=0.02
    )
    area = sum(
        share * np.prod([int(side) for side in shape.split("x")])
        for shape, share in reference["target_block_height_width"].items()
    )
    assert np.sum(reference["target_coverage_by_patch"]) == pytest.approx(area, abs=0.02)


def test_numbers_of_a_few_draws_are_those_of_the_draws():
    sampler = MultiblockSampler(seed=0, grid=(6, 9), context_tokens=10)
    statistics = mask_statistics(sampler, 5)
    covered, unions = np.zeros(54), []
    for image in range(5):
        tokens, blocks = sampler.draw(image, image)
        covered[tokens] += 0.2
        unions.append(len(set(blocks.ravel().tolist())))
    assert np.ravel(statistics["context_coverage_by_patch"]) == pytest.approx(covered, abs=1e-4)
    assert statistics["target_union_tokens"]["mean"] == pytest.approx(np.mean(unions))
    assert statistics["context_tokens"] == {"mean": 10.0, "std": 0.0, "min": 10, "max": 10} | {
        "quantiles": dict.fromkeys(statistics["context_tokens"]["quantiles"], 10.0)
    }


def test_the_command_prints_json_with_what_the_truncation_leaves(capsys, monkeypatch):
    monkeypatch.setattr("ijepa_ds.checks.mask_statistics._LEAST_GROUPS", 60)
    assert main(["--config", "ds_configs/vith14.json", "--sampler", "reference", "--images", "50", "--json"]) == 0
    statistics = json.loads(capsys.readouterr().out)
    cut = statistics["truncated"]
    assert (statistics["sampler"], statistics["images"], cut["images"]) == ("reference", 50, 60 * 128)
    assert cut["context_tokens"]["mean"] == pytest.approx(68.3, abs=4)
    lost = cut["context_lost_by_row"]
    assert lost[:3] == pytest.approx([0, 0, 0], abs=0.01) and lost[15] is None
    assert lost[12:15] == pytest.approx([0.79, 0.92, 0.98], abs=0.06)


def test_the_command_draws_a_picture(tmp_path, capsys):
    picture = tmp_path / "masks.png"
    assert main(["--config", "ds_configs/scenes_tiny.json", "--images", "20", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "multiblock on 8 x 8 patches" in out and str(picture) in out
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert min(pixels.shape[:2]) > 400 and pixels.std() > 10


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(UserError, match="--images = 0"):
        main(["--config", "ds_configs/scenes_tiny.json", "--images", "0"])
    with pytest.raises(UserError, match="--picture"):
        main(["--config", "ds_configs/scenes_tiny.json", "--images", "2", "--picture", str(tmp_path / "no" / "m.png")])
