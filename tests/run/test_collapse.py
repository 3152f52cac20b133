"""When a run says that it collapses: on a planted collapse, once; never on what healthy runs have logged."""

from __future__ import annotations

import math

import pytest
import torch

from ijepa_ds.run.collapse import PAGE, CollapseWatch
from ijepa_ds.run.health import health

# rankme and cosine at looks one after the other, from runs that learnt: the lowest ranks, the highest cosines.
HEALTHY = {
    "scenes, dips early": [(4.3088, 0.7486), (3.4676, 0.9185), (4.1673, 0.8795), (5.2366, 0.8512)],
    "CIFAR-10, batch 128": [(7.04, 0.751), (5.1189, 0.8799), (4.6755, 0.9465), (4.6738, 0.9556)],
    "with a variance term": [(9.9345, 0.0867), (12.2409, 0.0662)],
}


def looks(values: list[tuple[float, float]], watch: CollapseWatch | None = None, *, num_images: int = 32) -> list[int]:
    """The steps, counted from 1, after which ``watch`` says something."""
    watch = watch or CollapseWatch(trained_from=0)
    told = [
        watch.look(step, {"rankme": rank, "mean_cosine": cosine}, num_images=num_images)
        for step, (rank, cosine) in enumerate(values, start=1)
    ]
    return [step for step, line in enumerate(told, start=1) if line]


def features(share_of_images: float) -> dict[str, float]:
    """Health of an encoder that tells ``share_of_images`` of what is in an image, else positions alone."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(1, 16, 64, generator=generator) + torch.randn(1, 1, 64, generator=generator)
    images = torch.randn(64, 1, 64, generator=generator) + 0.5 * torch.randn(64, 16, 64, generator=generator)
    blocks = torch.stack([torch.randperm(16, generator=generator)[:8] for _ in range(20)])
    return health((1 - share_of_images) * positions + share_of_images * images, blocks)


def test_a_planted_collapse_is_told_once_with_the_page() -> None:
    watch = CollapseWatch(trained_from=100)
    shares = {10: 0.6, 20: 0.5, 30: 0.02, 40: 0.01, 200: 0.001}
    told = {step: watch.look(step, features(share), num_images=64) for step, share in shares.items()}
    assert [step for step, line in told.items() if line] == [30]
    line = told[30] or ""
    assert line.startswith("warning: step 30 ") and line.endswith(PAGE) and "\n" not in line
    assert "at step 10" in line and "cosine 1.000" in line


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_hear_nothing(name: str) -> None:
    assert looks(HEALTHY[name]) == []


def test_one_sign_is_none() -> None:
    assert looks([(9.0, 0.5), (4.0, 0.5), (9.0, 0.99), (9.0, 0.5)]) == []


def test_a_second_episode_is_told_again_but_not_one_that_flickers() -> None:
    healthy, fallen, almost = (9.0, 0.5), (1.5, 0.99), (9.0, 0.985)
    assert looks([healthy, fallen, fallen, almost, fallen, healthy, fallen]) == [2, 7]


def test_an_encoder_that_positions_dominate_from_the_start_is_judged_after_the_warm_up() -> None:
    untrained = [(1.5, 0.995)] * 6
    assert looks(untrained, CollapseWatch(trained_from=5)) == [5]
    assert looks([*untrained[:4], (6.0, 0.6)], CollapseWatch(trained_from=5)) == []


def test_too_few_images_and_features_that_are_no_numbers_are_no_signs() -> None:
    assert looks([(9.0, 0.5), (1.2, 0.999)], num_images=8) == []
    assert looks([(9.0, 0.5), (math.nan, math.nan)]) == []
