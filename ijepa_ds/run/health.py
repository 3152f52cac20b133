"""Label-free health of a run, from the target encoder's features BEFORE the target layer norm.

The loss of a joint-embedding method says little about progress (it may rise while features improve, and dips when they
collapse), so these numbers watch the features themselves. The layer norm of the targets would hide a collapse of scale:
do not apply it first.

Shapes: B images, N patches, K context tokens, Q views of an image, D encoder width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RANK_EPSILON = 1e-7  # RankMe, arXiv 2210.02885, eq. 1; LiDAR, arXiv 2312.04000, eq. 2
LIDAR_DELTA = 1e-4  # LiDAR, section 4
LIDAR_VIEWS = 50  # of an image, at most: what the paper has for I-JEPA


@torch.no_grad()
def health(tokens: Tensor, context_block: Tensor) -> dict[str, float]:
    """All signals of this file for one batch of patch features, computed in float32.

    All are NaN where a feature is not finite, so that a diverging run still gets its log line.

    Args:
        tokens: [B, N, D], the target encoder's output before the target layer norm, of any float dtype.
        context_block: int64 [any, K], the patches of contexts that the mask sampler drew; see :func:`context_views`.

    Returns:
        ``rankme``, ``feature_std``, ``mean_cosine`` of the features averaged over patches [B, D], ``lidar`` of the
        views, and ``token_variance``.
    """
    tokens = tokens.float()
    features = tokens.mean(dim=1)  # [B, D]
    signals = {
        "rankme": rankme(features),
        "lidar": lidar(context_views(tokens, context_block)),
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
        return _effective_rank(torch.linalg.svdvals(_scaled_to_one(features, dim=(0, 1))))
    except torch.linalg.LinAlgError:
        return math.nan  # the iteration did not converge, which is no reason to stop a run


def context_views(tokens: Tensor, context_block: Tensor) -> Tensor:
    """Views of each image for :func:`lidar`: its features averaged over each of Q context blocks, [B, Q, D].

    The blocks are the first :data:`LIDAR_VIEWS` of ``context_block``, those of Q images of the micro-batch, each used
    on all images: the pretext's own masks, a function of (seed, step, sample) as they are, and the same for each image.

    The paper encodes each masked context by itself. Here the target encoder has seen the whole image once and the mask
    selects what is averaged, so the views cost no forward pass, need no shape of their own, and differ less: numbers
    are not those of the paper (five states of small encoders on CIFAR-10, 64 images: 2.4 to 6.0 here, 8.6 to 13.1 with
    masked contexts, in the same order but for two that are equal). In a collapse to positions LiDAR stayed at 4 where
    RankMe fell to 1.6, since whitening magnifies what little tells images apart: it is no sign of collapse.
    """
    blocks = context_block[:LIDAR_VIEWS]
    share = tokens.new_zeros(len(blocks), tokens.shape[1]).scatter_(1, blocks, 1.0)  # [Q, N]
    return (share / share.sum(dim=1, keepdim=True)) @ tokens


def lidar(views: Tensor) -> float:
    """Effective rank of the LDA matrix of ``views`` [B, Q, D], where each image is a class and its views its samples.

    exp of the entropy of the normalised eigenvalues of W^-1/2 S W^-1/2: S is the covariance of the classes' means, W
    that within the classes plus delta * I (LiDAR, arXiv 2312.04000, eq. 1 and 2). Directions in which the views of an
    image differ as much as images do count little, which RankMe cannot tell. The paper takes 1,000 images of 50 views;
    here it is what a micro-batch has, and at most min(B - 1, D): as for RankMe, compare values of equal B only.

    NaN for fewer than two images or views.
    """
    num_images, num_views, width = views.shape
    if num_images < 2 or num_views < 2:
        return math.nan
    means = views.mean(dim=1)  # [B, D]
    around = (views - means[:, None]).flatten(0, 1)  # [B * Q, D]
    identity = torch.eye(width, dtype=torch.float64, device=views.device)
    within = (around.T @ around / len(around)).double() + LIDAR_DELTA * identity
    # With W = L L^T the matrix L^-1 S L^-T has the same eigenvalues: squared singular values of the whitened means.
    between = (means - means.mean(dim=0)).double() / math.sqrt(num_images)
    try:
        whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)  # [D, B]
        return _effective_rank(torch.linalg.svdvals(whitened).square())
    except torch.linalg.LinAlgError:
        return math.nan


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


def _effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of ``spectrum`` (not negative) over its sum; about 1 where all of it is zero."""
    shares = spectrum / (spectrum.sum() + RANK_EPSILON) + RANK_EPSILON
    return torch.exp(-(shares * shares.log()).sum()).item()


def _scaled_to_one(features: Tensor, *, dim: int | tuple[int, ...]) -> Tensor:
    """``features`` over their largest magnitude along ``dim``, so that no square overflows or vanishes in float32."""
    return features / features.abs().amax(dim=dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _unit_rows(features: Tensor) -> Tensor:
    """Every row of ``features`` [B, D] divided by its l2 length; a row of zeros stays one."""
    return F.normalize(_scaled_to_one(features, dim=1), dim=1)
