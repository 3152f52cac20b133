"""Training a grid on features: the answer is scikit-learn's."""

from __future__ import annotations

import pytest
import torch

from ijepa_ds.distributed import Process
from ijepa_ds.evaluation.inputs import CachedInputs
from ijepa_ds.evaluation.probes.heads import train_heads
from ijepa_ds.evaluation.probes.recipes import Recipe
from ijepa_ds.progress import Progress

ALONE = Process(0, 1, torch.device("cpu"))
WIDTH = 24


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, WIDTH, generator=draw)
    scores = rows @ torch.randn(WIDTH, 4, generator=draw) + 3 * torch.randn(4000, 4, generator=draw)
    return rows, scores.argmax(dim=1)


def trained(problem: tuple[torch.Tensor, torch.Tensor], recipe: Recipe, progress: Progress):
    rows, labels = problem
    inputs = CachedInputs(rows[:2000], labels[:2000], batch=recipe.batch, seed=0, process=ALONE)
    return train_heads(inputs, rows[2000:], {"all": slice(None), "half": slice(WIDTH // 2)}, recipe, progress)


def test_the_heads_find_scikit_learns_answer(problem):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows, labels = (part.numpy() for part in problem)
    reference = linear_model.LogisticRegression(C=1 / (5e-4 * 2000), tol=1e-6, max_iter=5000)
    theirs = 100 * reference.fit(rows[:2000], labels[:2000]).score(rows[2000:], labels[2000:])
    recipe = Recipe("sgd", 60, 250, (0.1,), (5e-4,), None, lr_scales=("as given",))
    heads, predictions, rate = trained(problem, recipe, Progress(1, enabled=False))
    assert 40 < theirs < 90 and rate > 0 and len(heads) == 4
    for head, classes in zip(heads, predictions, strict=True):
        value = 100 * float((classes == problem[1][2000:]).double().mean())
        if head["features"] == "all":
            assert value == pytest.approx(theirs, abs=0.3), head
        else:
            assert value < theirs - 5


def test_progress_counts_images_and_says_the_lowest_loss(problem, capsys):
    recipe = Recipe("sgd", 3, 500, (0.1,), (5e-4,), None)
    seconds = iter(range(0, 10**6, 10))  # each look at the clock is ten seconds after the last
    progress = Progress(3 * 2000, name="heads", clock=lambda: next(seconds))
    trained(problem, recipe, progress)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("heads: 500 of 6,000 images") and lines[-1].startswith("heads: 6,000 of 6,000 images")
    assert "lowest loss of 4 heads 1." in lines[-1] or "lowest loss of 4 heads 0." in lines[-1]
