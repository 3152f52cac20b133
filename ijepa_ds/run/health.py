"""Label-free health of a run, from the target encoder's features BEFORE the target layer norm.

The loss of a joint-embedding method says little about progress (it may rise while features improve, and dips when they
collapse), so these numbers watch the features themselves. The layer norm of the targets would hide a collapse of scale:
do not apply it first.

Shapes: B images, N patches, D encoder width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RANKME_EPSILON = 1e-7  # RankMe, arXiv 2210.02885, eq. 1


@torch.no_grad()
def health(tokens: Tensor) -> dict[str, float]:
    """All signals of this file for one batch of patch features, computed in float32.

    All are NaN where a feature is not finite, so that a diverging run still gets its log line.

    Args:
        tokens: [B, N, D], the target encoder's output before the target layer norm, of any float dtype.

    Returns:
        ``rankme``, ``feature_std``, ``mean_cosine`` of the features averaged over patches [B, D], and
        ``token_variance``.
    """
    tokens = tokens.float()
    features = tokens.mean(dim=1)  # [B, D]
    signals = {
        "rankme": rankme(features),
        "feature_std": feature_std(features),
        "mean_cosine": mean_cosine(features),
        "token_variance": token_variance(tokens),
    }
    return signals if torch.isfinite(tokens).all() else dict.fromkeys(signals, math.nan)


def rankme(features: Tensor) -> float:
    """Effective rank of ``features`` [B, D], not centred: exp of the entropy of the normalised singular values.

    RankMe, arXiv 2210.02885, eq. 1. Between 1 (all features on one line through the origin) and min(B, D). It grows
    with B until B is well above D, so compare values of equal B only.
    """
    try:
        singular_values = torch.linalg.svdvals(_scaled_to_one(features, dim=(0, 1)))
    except torch.linalg.LinAlgError:
        return math.nan  # the iteration did not converge, which is no reason to stop a run
    shares = singular_values / (singular_values.sum() + RANKME_EPSILON) + RANKME_EPSILON
    return torch.exp(-(shares * shares.log()).sum()).item()


def feature_std(features: Tensor) -> float:
    """Standard deviation over images of each l2-normalised feature of ``features`` [B, D], mean over features.

    About 1/sqrt(D) where features spread over the sphere, 0 where all images have the same one (SimSiam, arXiv
    2011.10566, section 4.1). NaN for fewer than two images.
    """
    return _unit_rows(features).std(dim=0, correction=0).mean().item() if len(features) > 1 else math.nan


def mean_cosine(features: Tensor) -> float:
    """Mean cosine over all pairs of two different images of ``features`` [B, D]; 1 where all point the same way.

    NaN for fewer than two images. A feature of length zero counts as orthogonal to every other.
    """
    num_images = len(features)
    if num_images < 2:
        return math.nan
    unit = _unit_rows(features)
    # The sum of all B * B cosines is the squared length of the sum of the vectors; the diagonal is taken off again.
    different_pairs = unit.sum(dim=0).square().sum() - unit.square().sum()
    return (different_pairs / (num_images * (num_images - 1))).item()


def token_variance(tokens: Tensor) -> float:
    """Variance of ``tokens`` [B, N, D] within an image, mean over images and features.

    0 where all patches have one feature.
    """
    return tokens.var(dim=1, correction=0).mean().item()


def _scaled_to_one(features: Tensor, *, dim: int | tuple[int, ...]) -> Tensor:
    """``features`` over their largest magnitude along ``dim``, so that no square overflows or vanishes in float32."""
    return features / features.abs().amax(dim=dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _unit_rows(features: Tensor) -> Tensor:
    """Every row of ``features`` [B, D] divided by its l2 length; a row of zeros stays one."""
    return F.normalize(_scaled_to_one(features, dim=1), dim=1)
