"""The health signals against what they are defined to be on features whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from ijepa_ds.run.health import feature_std, health, mean_cosine, rankme, token_variance


@pytest.fixture
def spread() -> torch.Tensor:
    """Features without any collapse: 512 images, 32 independent features."""
    return torch.randn(512, 32, generator=torch.Generator().manual_seed(0))


def test_rankme_counts_the_directions_that_are_used(spread):
    orthogonal = torch.linalg.qr(spread).Q  # equal singular values: the entropy of a uniform distribution
    assert rankme(orthogonal) == pytest.approx(32, rel=1e-3)
    assert rankme(orthogonal[:, :5] @ torch.randn(5, 32)) <= 5.01
    assert rankme(torch.ones(512, 32)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(512, 32)) == pytest.approx(1, abs=1e-3)


def test_rankme_is_the_formula_of_the_paper(spread):
    s = torch.linalg.svdvals(spread.double())
    p = s / s.sum()
    assert rankme(spread) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-4)


def test_feature_std_tells_spread_from_collapse(spread):
    assert feature_std(spread) == pytest.approx(1 / math.sqrt(32), rel=0.02)
    assert feature_std(torch.ones(512, 32) * torch.rand(512, 1)) == pytest.approx(0, abs=1e-6)


def test_mean_cosine_is_the_mean_over_pairs_of_different_images(spread):
    few = spread[:7] + 0.5
    pairs = [torch.cosine_similarity(few[i], few[j], dim=0) for i in range(7) for j in range(7) if i != j]
    assert mean_cosine(few) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert mean_cosine(torch.ones(9, 4)) == pytest.approx(1, abs=1e-6)


def test_token_variance_looks_within_an_image_only():
    same_within_an_image = torch.randn(8, 1, 16).expand(8, 10, 16)
    assert token_variance(same_within_an_image) == pytest.approx(0, abs=1e-9)
    assert token_variance(torch.tensor([[[0.0], [2.0]]])) == 1.0


def test_scale_changes_token_variance_alone(spread):
    tokens = spread.reshape(32, 16, 32)
    before, after = health(tokens), health(tokens * 1e-3)
    assert after.pop("token_variance") == pytest.approx(before.pop("token_variance") * 1e-6, rel=1e-4)
    assert after == pytest.approx(before, rel=1e-3)


def test_bfloat16_gives_the_float32_answer(spread):
    tokens = spread.reshape(32, 16, 32).bfloat16()
    assert health(tokens) == health(tokens.float())


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_scales_neither_overflow_nor_vanish(spread, scale):
    assert rankme(spread * scale) == pytest.approx(rankme(spread), rel=1e-3)
    assert feature_std(spread * scale) == pytest.approx(feature_std(spread), rel=1e-3)
    assert mean_cosine(spread * scale) == pytest.approx(mean_cosine(spread), abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_give_nan(bad):
    tokens = torch.randn(4, 6, 8)
    tokens[1, 2, 3] = bad
    answer = health(tokens)
    assert set(answer) == {"rankme", "feature_std", "mean_cosine", "token_variance"}
    assert all(math.isnan(value) for value in answer.values())


def test_one_image_has_no_other_to_compare_with():
    assert math.isnan(feature_std(torch.ones(1, 4))) and math.isnan(mean_cosine(torch.ones(1, 4)))


def test_no_gradient_is_kept():
    tokens = torch.randn(4, 6, 8, requires_grad=True)
    assert all(isinstance(value, float) for value in health(tokens).values())
