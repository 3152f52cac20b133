"""The linear probes against scikit-learn's, how they choose their strength, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.labels import bin_edges, to_bins
from ijepa_ds.evaluation.probes.logistic import linear_probe
from ijepa_ds.evaluation.probes.ridge import least_squares_accuracy, ridge_regression
from ijepa_ds.evaluation.probes.standardise import stratified_split

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


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_classification_agrees_with_scikit_learn(classes, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    pipeline = pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, train_labels, val, val_labels = classes
    probe = linear_probe(*classes, num_classes=4, seed=0, strengths=[l2])
    reference = pipeline.make_pipeline(
        preprocessing.StandardScaler(),
        linear_model.LogisticRegression(C=1 / (l2 * len(train)), tol=1e-6, max_iter=5000),
    ).fit(train.double().numpy(), train_labels.numpy())
    assert probe.accuracy == pytest.approx(100 * reference.score(val.numpy(), val_labels.numpy()), abs=0.3)
    assert 40 < probe.accuracy < 95
    ours = torch.log_softmax(val.double() @ probe.weight.double().T + probe.bias.double(), dim=1)
    theirs = torch.from_numpy(reference.predict_log_proba(val.double().numpy()))
    assert float((ours - theirs).abs().max()) < 0.02


def test_the_weights_given_out_work_on_raw_features(classes):
    probe = linear_probe(*classes, num_classes=4, seed=0)
    assert ((classes[2] @ probe.weight.T + probe.bias).argmax(dim=1) == probe.predictions).float().mean() > 0.998
    assert probe.accuracy == pytest.approx(100 * float((probe.predictions == classes[3]).float().mean()))


def test_the_strength_is_chosen_on_train_alone(classes):
    train, train_labels, val, val_labels = classes
    probe = linear_probe(train, train_labels, val, val_labels, num_classes=4, seed=3)
    other_val = linear_probe(train, train_labels, val, val_labels.flip(0), num_classes=4, seed=3)
    assert probe.held_out_loss == other_val.held_out_loss and probe.l2 == other_val.l2
    assert probe.held_out_loss[probe.l2] == min(probe.held_out_loss.values())
    assert (
        linear_probe(train, train_labels, val, val_labels, num_classes=4, seed=4).held_out_loss != probe.held_out_loss
    )


def test_noisy_features_choose_a_strong_penalty():
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(1600, 300, generator=draw), torch.arange(1600) % 2
    features[:, 0] += 1.5 * labels
    probe = linear_probe(features[:800], labels[:800], features[800:], labels[800:], num_classes=2, seed=0)
    weakest = linear_probe(
        features[:800], labels[:800], features[800:], labels[800:], num_classes=2, seed=0, strengths=[1e-5]
    )
    assert probe.l2 >= 1e-2 and probe.accuracy > weakest.accuracy + 2


def test_constant_features_bfloat16_and_separable_classes():
    labels = torch.arange(60) % 3
    features = torch.cat([torch.eye(3)[labels], torch.full((60, 2), 0.1)], dim=1).bfloat16()
    probe = linear_probe(features, labels, features, labels.int(), num_classes=3, seed=0)
    assert probe.accuracy == probe.train_accuracy == 100 and torch.isfinite(probe.weight).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_probe_fits_where_gradients_are_off(classes, mode):
    expected = linear_probe(*classes, num_classes=4, seed=0, strengths=[1e-2])
    with mode():
        inside = tuple(part.clone() for part in classes)
        assert linear_probe(*inside, num_classes=4, seed=0, strengths=[1e-2]).accuracy == expected.accuracy
    assert linear_probe(*inside, num_classes=4, seed=0, strengths=[1e-2]).accuracy == expected.accuracy


def test_the_split_holds_out_some_of_each_class_and_leaves_one():
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 2 + [3])[torch.randperm(123)]
    held_out = stratified_split(labels, seed=0)
    assert torch.bincount(labels[held_out], minlength=4).tolist() == [15, 3, 1, 0]
    assert (held_out == stratified_split(labels, seed=0)).all() and (held_out != stratified_split(labels, seed=1)).any()
    with pytest.raises(UserError, match="single training image"):
        stratified_split(torch.arange(5), seed=0)


def test_ridge_agrees_with_scikit_learn(values):
    linear_model = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, train_values, val, val_values = (part.double() for part in values)
    fit = ridge_regression(*values, seed=0, strengths=[1e-2])
    scaler = preprocessing.StandardScaler().fit(train.numpy())
    reference = linear_model.Ridge(alpha=1e-2 * len(train)).fit(scaler.transform(train.numpy()), train_values.numpy())
    predictions = reference.predict(scaler.transform(val.numpy()))
    assert fit.mean_absolute_error == pytest.approx(metrics.mean_absolute_error(val_values, predictions), rel=1e-5)
    assert fit.r2 == pytest.approx(metrics.r2_score(val_values, predictions), rel=1e-5)
    assert torch.allclose(fit.predictions, torch.from_numpy(predictions), atol=1e-4)
    assert torch.allclose(val @ fit.weight + fit.bias, fit.predictions)


def test_ridge_chooses_its_strength(values):
    fit = ridge_regression(*values, seed=0)
    assert fit.held_out_error[fit.l2] == min(fit.held_out_error.values())
    assert fit.r2 > 0.95 and fit.mean_absolute_error < 1.0
    train, train_values, val, val_values = values
    noise = ridge_regression(
        train, train_values[torch.randperm(800, generator=torch.Generator().manual_seed(0))], val, val_values, seed=0
    )
    assert noise.l2 >= 1 > fit.l2 and abs(noise.r2) < 0.1


def test_ridge_with_more_features_than_images_and_a_constant_val():
    features = torch.randn(20, 50)
    fit = ridge_regression(features, torch.arange(20), features[:3], torch.full((3,), 4), seed=0)
    assert math.isfinite(fit.mean_absolute_error) and math.isnan(fit.r2)


def test_the_classifier_in_one_shot_agrees_with_scikit_learn(classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, train_labels, val, val_labels = classes
    scaler = preprocessing.StandardScaler().fit(train.double().numpy())
    reference = linear_model.RidgeClassifier(alpha=1e-3 * len(train))
    reference.fit(scaler.transform(train.double().numpy()), train_labels.numpy())
    theirs = 100 * reference.score(scaler.transform(val.double().numpy()), val_labels.numpy())
    assert least_squares_accuracy(*classes) == pytest.approx(theirs, abs=0.3) and theirs > 40


def test_bins_are_about_equal_and_defined_by_train():
    train = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    edges = bin_edges(train, 6)
    assert torch.allclose(edges, torch.quantile(train.double(), torch.arange(1, 6, dtype=torch.float64) / 6))
    counts = torch.bincount(to_bins(train, edges))
    assert len(counts) == 6 and counts.max() - counts.min() <= 2
    assert to_bins(torch.tensor([-99.0, 99.0, float(edges[2])]).double(), edges).tolist()[:2] == [0, 5]
    assert to_bins(edges, edges).tolist() == [0, 1, 2, 3, 4]  # on an edge: the lower bin
    with pytest.raises(UserError, match="100 values with 2 different ones do not fill 4 bins"):
        bin_edges(torch.arange(100) % 2, 4)


def test_bad_input_is_refused_in_one_sentence(classes):
    train, train_labels, val, val_labels = classes

    def refused(match: str, *split, num_classes: int = 4) -> None:
        with pytest.raises(UserError, match=match) as caught:
            linear_probe(*split, num_classes=num_classes, seed=0)
        assert "\n" not in str(caught.value)

    broken = val.clone()
    broken[[1, 5], 0] = torch.tensor([math.nan, math.inf])
    refused("2 of 1000 rows of the val features hold NaN", train, train_labels, broken, val_labels)
    refused(
        "class 4 is among the 5 classes but has no image in train", train, train_labels, val, val_labels, num_classes=5
    )
    only_val = val_labels.clone()
    only_val[:2] = torch.tensor([4, 5])
    refused(
        "each of the classes 4, 5 is in val but has no image in train",
        train,
        train_labels,
        val,
        only_val,
        num_classes=6,
    )
    refused("labels reach from 0 to 3, but 3 classes", train, train_labels, val, val_labels, num_classes=3)
    refused("do not match", train, train_labels[:-1], val, val_labels)
    refused("width 48 and val features of width 47", train, train_labels, val[:, :-1], val_labels)
    refused("torch.float32, not integers", train, train_labels.float(), val, val_labels)
    refused("the val split has no images", train, train_labels, val[:0], val_labels[:0])
    with pytest.raises(UserError, match="1 of 2000 train values are NaN"):
        ridge_regression(
            train, train_labels.float().index_fill_(0, torch.tensor([7]), math.nan), val, val_labels, seed=0
        )
