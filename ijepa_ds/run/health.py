"""Label-free health of a run, from the target encoder's features BEFORE the target layer norm.

The loss of a joint-embedding method says little about progress (it may rise while features improve, and dips when they
collapse), so these numbers watch the features themselves. The layer norm of the targets would hide a collapse of scale:
do not apply it first.

Shapes: B images, N patches, D encoder width.

Every function computes in float32 whatever the dtype it is given, takes no gradient, and answers NaN (never an
exception) for features that are not finite, so that a diverging run still gets its log line.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RANKME_EPSILON = 1e-7  # RankMe, arXiv 2210.02885, eq. 1


@torch.no_grad()
def health(tokens: Tensor) -> dict[str, float]:
    """All signals of this file for one batch of patch features.

    Args:
        tokens: [B, N, D], the target encoder's output before the target layer norm.

    Returns:
        ``rankme``, ``feature_std``, ``mean_cosine`` of the features averaged over patches [B, D], and
        ``token_variance``.
    """
    tokens = tokens.float()
    features = tokens.mean(dim=1)  # [B, D]
    return {
        "rankme": rankme(features),
        "feature_std": feature_std(features),
        "mean_cosine": mean_cosine(features),
        "token_variance": token_variance(tokens),
    }


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (RankMe, arXiv 2210.02885, eq. 1).

    Between 1 (all features on one line through the origin) and min(B, D). It grows with B until B is well above D, so
    compare values of equal B only.

    Args:
        features: [B, D], not centred (as in the paper).
    """
    features = features.float()
    if not _is_finite(features):
        return math.nan
    try:
        singular_values = torch.linalg.svdvals(_scaled_to_one(features))
    except torch.linalg.LinAlgError:
        return math.nan  # the iteration did not converge, which is no reason to stop a run
    shares = singular_values / (singular_values.sum() + RANKME_EPSILON) + RANKME_EPSILON
    return torch.exp(-(shares * shares.log()).sum()).item()


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Standard deviation over images of each l2-normalised feature, mean over features.

    About 1/sqrt(D) where features spread over the sphere, 0 where all images have the same one (SimSiam, arXiv
    2011.10566, section 4.1). NaN for fewer than two images.

    Args:
        features: [B, D].
    """
    features = features.float()
    if len(features) < 2 or not _is_finite(features):
        return math.nan
    return _unit_rows(features).std(dim=0, correction=0).mean().item()


@torch.no_grad()
def mean_cosine(features: Tensor) -> float:
    """Mean cosine over all pairs of two different images; 1 where all point the same way. NaN for fewer than two.

    Args:
        features: [B, D]. A feature of length zero counts as orthogonal to every other.
    """
    features = features.float()
    num_images = len(features)
    if num_images < 2 or not _is_finite(features):
        return math.nan
    unit = _unit_rows(features)
    # The sum of all B * B cosines is the squared length of the sum of the vectors; the diagonal is taken off again.
    different_pairs = unit.sum(dim=0).square().sum() - unit.square().sum()
    return (different_pairs / (num_images * (num_images - 1))).item()


@torch.no_grad()
def token_variance(tokens: Tensor) -> float:
    """Variance of the tokens within an image, mean over images and features; 0 where all patches have one feature.

    Args:
        tokens: [B, N, D].
    """
    tokens = tokens.float()
    if not _is_finite(tokens):
        return math.nan
    return tokens.var(dim=1, correction=0).mean().item()


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _scaled_to_one(features: Tensor) -> Tensor:
    """``features`` divided by their largest magnitude, so that squares neither overflow nor vanish in float32."""
    return features / features.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)


def _unit_rows(features: Tensor) -> Tensor:
    """Every row of ``features`` [B, D] divided by its l2 length; a row of zeros stays one."""
    largest = features.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return F.normalize(features / largest, dim=1)
