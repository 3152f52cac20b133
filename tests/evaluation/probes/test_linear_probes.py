"""The linear probes against scikit-learn's, and how they choose their strength."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.probes.logistic import FIXED_STRENGTH, STRENGTHS, Fit, logistic_regression
from ijepa_ds.evaluation.probes.ridge import least_squares_predictions, ridge_regression
from ijepa_ds.evaluation.probes.standardise import Standardised, folds, held_out_part, standardise
from ijepa_ds.evaluation.subsets import draw_per_class

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def correlated_features(num_rows: int, width: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as networks have them, of fast-falling variance, far from the origin; and the factors behind them."""
    draw = torch.Generator().manual_seed(0)
    factors = torch.randn(num_rows, width, generator=draw)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
    spectrum = torch.arange(1, width + 1) ** -1.0
    return (factors * spectrum) @ rotation + 5 * torch.randn(width, generator=draw), factors


@pytest.fixture(scope="module")
def classes() -> Split:
    features, factors = correlated_features(3000)
    draw = torch.Generator().manual_seed(1)
    scores = factors[:, :20] @ torch.randn(20, 4, generator=draw) + 2 * torch.randn(3000, 4, generator=draw)
    labels = scores.argmax(dim=1)
    return features[:2000], labels[:2000], features[2000:], labels[2000:]


@pytest.fixture(scope="module")
def values() -> Split:
    features, factors = correlated_features(1200)
    target = 10 + 3 * factors[:, :8].sum(dim=1) + torch.randn(1200, generator=torch.Generator().manual_seed(2))
    return features[:800], target[:800], features[800:], target[800:]


@pytest.fixture(scope="module")
def digits() -> Split:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    features, labels = torch.tensor(data.data).float(), torch.tensor(data.target)
    return features[:1000], labels[:1000], features[1000:], labels[1000:]


def scikit_learns(split: Split, l2: float):
    """Its regression of the same penalty, fitted."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    pipeline = pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    features, labels, _, _ = split
    return pipeline.make_pipeline(
        preprocessing.StandardScaler(),
        linear_model.LogisticRegression(C=1 / (l2 * len(features)), tol=1e-6, max_iter=5000),
    ).fit(features.double().numpy(), labels.numpy())


def fitted(split: Split, *, seed: int = 0, **options) -> tuple[Fit, torch.Tensor]:
    """The regression, and its logits of validation."""
    features, labels, others, _ = split
    space = standardise(features)
    held_out = options.pop("held_out", None)
    held_out = [held_out_part(labels, seed=seed)] if held_out is None else held_out
    fit = logistic_regression(space, labels, held_out=held_out, **options)
    return fit, fit.logits(space.apply(others))


def percent(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    return 100.0 * float((predictions == labels).double().mean())


def test_standardised_rows_are_uncorrelated_and_others_go_the_same_way(classes):
    space = standardise(classes[0])
    gram = space.rows.T @ space.rows / len(space.rows)
    torch.testing.assert_close(gram, space.variances.diag(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(space.apply(classes[0]), space.rows, rtol=1e-3, atol=1e-3)
    assert float(space.variances.sum()) == pytest.approx(48, rel=1e-3)  # of deviation 1 each


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_classification_agrees_with_scikit_learn(classes, l2):
    _, logits = fitted(classes, strengths=[l2])
    reference = scikit_learns(classes, l2)
    score = 100 * reference.score(classes[2].numpy(), classes[3].numpy())
    assert percent(logits.argmax(dim=1), classes[3]) == pytest.approx(score, abs=0.3) and 40 < score < 95
    theirs = torch.from_numpy(reference.predict_log_proba(classes[2].double().numpy()))
    assert float((torch.log_softmax(logits.double(), dim=1) - theirs).abs().max()) < 0.02


def test_the_strength_is_that_of_least_loss_on_what_was_held_out(classes):
    features, labels, _, _ = classes
    part, losses = held_out_part(labels, seed=3), {}
    for l2 in STRENGTHS:
        kept = features[~part], labels[~part], features[part], labels[part]
        reference = scikit_learns(kept, l2)
        logs = torch.from_numpy(reference.predict_log_proba(features[part].double().numpy()))
        losses[l2] = float(F.nll_loss(logs, labels[part]))
    assert fitted(classes, seed=3)[0].l2 == min(losses, key=losses.__getitem__)


def test_noisy_features_choose_a_strong_penalty():
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(1600, 300, generator=draw), torch.arange(1600) % 2
    features[:, 0] += 1.5 * labels
    split = features[:800], labels[:800], features[800:], labels[800:]
    fit, logits = fitted(split)
    _, weakest = fitted(split, strengths=[1e-5])
    assert fit.l2 >= 1e-2
    assert percent(logits.argmax(dim=1), split[3]) > percent(weakest.argmax(dim=1), split[3]) + 2


def test_constant_features_and_separable_classes():
    labels = torch.arange(60) % 3
    features = torch.cat([torch.eye(3)[labels], torch.full((60, 2), 0.1)], dim=1)
    fit, logits = fitted((features, labels, features, labels))
    assert torch.equal(logits.argmax(dim=1), labels) and torch.isfinite(fit.weight).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_regression_fits_where_gradients_are_off(classes, mode):
    _, expected = fitted(classes, strengths=[1e-2])
    with mode():
        inside = tuple(part.clone() for part in classes)
        _, logits = fitted(inside, strengths=[1e-2])
    torch.testing.assert_close(logits.clone(), expected)


def test_each_iteration_is_told(classes):
    ticks: list[int] = []
    fitted(classes, tick=lambda: ticks.append(1))
    assert 10 < len(ticks) < 700


def test_the_part_held_out_has_some_of_each_class_and_leaves_one():
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 2 + [3])[torch.randperm(123, generator=draw)]
    held_out = held_out_part(labels, seed=0)
    assert torch.bincount(labels[held_out], minlength=4).tolist() == [15, 3, 1, 0]
    assert torch.equal(held_out, held_out_part(labels, seed=0)) and (held_out != held_out_part(labels, seed=1)).any()
    with pytest.raises(UserError, match="single training image"):
        held_out_part(torch.arange(5), seed=0)


def test_a_class_with_a_single_image_is_in_no_fold():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 0, 0, 0])
    assert [part.nonzero().flatten().tolist() for part in folds(labels)] == [[0, 4, 8], [1, 5], [2], [6], [7]]
    assert folds(torch.arange(4)) == []


def few_of(digits: Split, per_class: int, draw: int) -> Split:
    subset = draw_per_class(digits[1].numpy(), per_class=per_class, seed=0, draw=draw)
    return digits[0][subset], digits[1][subset], digits[2], digits[3]


@pytest.mark.parametrize("draw", [0, 1])
def test_few_images_agree_with_scikit_learn(digits, draw):
    few = few_of(digits, 13, draw)
    fit, logits = fitted(few, held_out=folds(few[1]))
    score = 100 * scikit_learns(few, fit.l2).score(few[2].numpy(), few[3].numpy())
    accuracy = percent(logits.argmax(dim=1), few[3])
    assert accuracy == pytest.approx(score, abs=0.3) and 80 < accuracy < 95
    best = max(percent(fitted(few, strengths=[l2])[1].argmax(dim=1), few[3]) for l2 in (1, 0.1, 0.01, 1e-3))
    assert accuracy > best - 1.5


def test_one_image_a_class_takes_the_fixed_strength(digits):
    few = few_of(digits, 1, 0)
    fit, logits = fitted(few, held_out=folds(few[1]))
    assert fit.l2 == FIXED_STRENGTH and 35 < percent(logits.argmax(dim=1), few[3]) < 75


def double(split: Split) -> tuple[Standardised, torch.Tensor, torch.Tensor, torch.Tensor]:
    features, values, others, other_values = (part.double() for part in split)
    space = standardise(features)
    return space, values, space.apply(others), other_values


@pytest.mark.parametrize("l2", [1e-2, 10.0])
def test_ridge_agrees_with_scikit_learn(values, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, train_values, val, _ = (part.double() for part in values)
    chosen, predictions = ridge_regression(*double(values)[:3], strengths=[l2])
    scaler = preprocessing.StandardScaler().fit(train.numpy())
    reference = linear_model.Ridge(alpha=l2 * len(train)).fit(scaler.transform(train.numpy()), train_values.numpy())
    expected = torch.from_numpy(reference.predict(scaler.transform(val.numpy())))
    assert chosen == l2
    torch.testing.assert_close(predictions, expected, rtol=1e-6, atol=1e-6)


def test_ridge_chooses_the_strength_that_scikit_learn_does_by_leaving_each_image_out(values):
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    shuffled = values[1][torch.randperm(800, generator=torch.Generator().manual_seed(0))]
    strengths = (1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)
    scaled = preprocessing.StandardScaler().fit_transform(values[0].double().numpy())
    errors = []
    for targets in (values[1], shuffled):
        space, train_values, rows, val_values = double((values[0], targets, values[2], values[3]))
        l2, predictions = ridge_regression(space, train_values, rows, strengths=strengths)
        reference = linear_model.RidgeCV(alphas=[l2 * 800 for l2 in strengths]).fit(scaled, targets.double().numpy())
        assert l2 == pytest.approx(reference.alpha_ / 800)
        errors.append(float((predictions - val_values).abs().mean()))
    assert errors[0] < 1.0 < errors[1]


def test_ridge_with_more_features_than_images():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(20, 50, generator=draw)
    _, predictions = ridge_regression(*double((features, torch.arange(20), features[:3], torch.zeros(3)))[:3])
    assert torch.isfinite(predictions).all()


def test_the_classifier_in_one_shot_agrees_with_scikit_learn(classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, train_labels, val, val_labels = classes
    scaler = preprocessing.StandardScaler().fit(train.double().numpy())
    reference = linear_model.RidgeClassifier(alpha=1e-3 * len(train))
    reference.fit(scaler.transform(train.double().numpy()), train_labels.numpy())
    theirs = 100 * reference.score(scaler.transform(val.double().numpy()), val_labels.numpy())
    ours = percent(least_squares_predictions(train, train_labels, val), val_labels)
    assert ours == pytest.approx(theirs, abs=0.3) and theirs > 40
