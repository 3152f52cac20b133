"""Variance and covariance of the mean context, against numpy, and what a group is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ijepa_ds.method.vicreg import VarianceCovariance, variance_and_covariance


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**changes) -> VarianceCovariance:
    settings = {"hidden": 12, "group": 4, "variance": 25.0, "covariance": 1.0, "generator": generator(0)}
    return VarianceCovariance(8, **{**settings, **changes})


def test_the_terms_are_those_of_numpys_covariance():
    features = torch.randn(2, 6, 5, generator=generator(1)) * torch.tensor([0.1, 0.5, 1.0, 1.5, 0.7])
    variances, covariances = [], []
    for group in features.double().numpy():
        matrix = np.cov(group, rowvar=False)
        variances.append(np.maximum(0, 1 - np.sqrt(np.diag(matrix) + 1e-4)).mean())
        covariances.append((matrix**2)[~np.eye(5, dtype=bool)].sum() / 5)
    terms = variance_and_covariance(features)
    assert terms.variance.item() == pytest.approx(np.mean(variances), rel=1e-5)
    assert terms.covariance.item() == pytest.approx(np.mean(covariances), rel=1e-5)


def test_features_that_are_alike_cost_most_and_independent_ones_that_vary_nothing():
    alike = variance_and_covariance(torch.ones(1, 8, 4))
    assert alike.variance.item() == pytest.approx(0.99) and alike.covariance == 0
    independent = variance_and_covariance(2 * torch.tensor([[[1.0, 1], [1, -1], [-1, 1], [-1, -1]]]))
    assert independent.variance == 0 and independent.covariance == 0


def test_a_group_knows_nothing_of_the_others():
    """So a micro-batch of several groups has the mean of their terms, whoever computes them."""
    regulariser, context = make(), torch.randn(12, 3, 8, generator=generator(2))
    whole = regulariser(context)
    parts = torch.stack([regulariser(part) for part in context.split(4)])
    assert whole.item() == pytest.approx(parts.mean().item(), rel=1e-6)
    assert parts.std() > 1e-4


def test_without_a_projection_the_mean_context_itself_is_taken():
    regulariser, context = make(hidden=0, variance=3.0, covariance=0.5), torch.randn(4, 3, 8, generator=generator(2))
    terms = variance_and_covariance(context.mean(1)[None])
    assert not list(regulariser.parameters())
    assert regulariser(context).item() == pytest.approx(3 * terms.variance.item() + terms.covariance.item() / 2)


def test_under_autocast_the_statistics_are_in_fp32():
    regulariser, context = make(hidden=0), torch.randn(8, 3, 8, generator=generator(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert regulariser(context) == regulariser(context.float())
    with torch.no_grad():
        assert regulariser.bfloat16()(context.bfloat16()).dtype == torch.float32


def test_its_gradient_spreads_features_that_are_nearly_alike():
    regulariser = make(hidden=0)
    context = (1e-2 * torch.randn(4, 1, 8, generator=generator(4))).requires_grad_()
    regulariser(context).backward()
    assert context.grad is not None
    moved = (context - 1e-2 * context.grad).detach()
    assert moved.std(dim=0).mean() > context.std(dim=0).mean()
