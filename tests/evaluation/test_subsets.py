"""Few labels: which images a subset takes, and the regression on them beside scikit-learn's."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from ijepa_ds.errors import UserError
from ijepa_ds.evaluation import subsets as lowshot
from ijepa_ds.evaluation.probes.logistic import choose_strength, linear_probe, logistic_path, low_shot
from ijepa_ds.evaluation.subsets import draw_per_class, samples_of_list

NAMES = ["n01/n01_7.JPEG", "n01/n01_30.JPEG", "n02/n02_1.JPEG", "n02/deeper/n02_9.JPEG", "n03/n01_7.JPEG"]


@pytest.fixture
def beton(tmp_path):
    path = tmp_path / "train.beton"
    (tmp_path / "train.beton.names.gz").write_bytes(gzip.compress("".join(f"{n}\n" for n in NAMES).encode()))
    return path


@pytest.fixture(scope="module")
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    features, labels = torch.tensor(data.data).float(), torch.tensor(data.target)
    return features[:1000], labels[:1000], features[1000:], labels[1000:]


def test_a_list_of_names_becomes_sample_numbers(beton, tmp_path):
    split = tmp_path / "1percent.txt"
    split.write_bytes(b"n02_9.JPEG\r\n\nn01_30.JPEG \nn02_9.JPEG\n./n03/n01_7.JPEG")
    assert samples_of_list(split, beton, num_samples=5).tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01_7.JPEG\n", "several files of .* are called.*such as n03/n01_7.JPEG"),
        ("n01_30.JPEG\nn09_1.JPEG\nn09_2.JPEG\n", "2 of the 3 files in .* the first is n09_1.JPEG"),
        ("\n \n", "names no files"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(beton, tmp_path, text, message):
    split = tmp_path / "list.txt"
    split.write_text(text)
    with pytest.raises(UserError, match=message):
        samples_of_list(split, beton, num_samples=5)


def test_missing_and_damaged_files_are_named(beton, tmp_path):
    with pytest.raises(UserError, match=r"split list .*absent.txt \(No such file"):
        samples_of_list(tmp_path / "absent.txt", beton, num_samples=5)
    split = tmp_path / "list.txt"
    split.write_text("a.JPEG\n")
    with pytest.raises(UserError, match=r"other\.beton\.names\.gz is missing.*convert it again"):
        samples_of_list(split, tmp_path / "other.beton", num_samples=5)
    names = tmp_path / "train.beton.names.gz"
    for damaged in (b"", b"text", names.read_bytes()[:-12], names.read_bytes()[:12] + b"xxxxxx"):
        names.write_bytes(damaged)
        with pytest.raises(UserError, match=r"names.gz cannot be read .*again|names 0 files for the 5 samples"):
            samples_of_list(split, beton, num_samples=5)


def test_draws_are_seeded_balanced_and_nested():
    labels = np.random.default_rng(0).integers(0, 7, 500) * 3  # class numbers with gaps
    small, large = (draw_per_class(labels, per_class=n, seed=1) for n in (2, 9))
    assert np.unique(labels[large], return_counts=True)[1].tolist() == [9] * 7
    assert set(small) < set(large) and (np.diff(large) > 0).all()
    assert draw_per_class(torch.from_numpy(labels), per_class=9, seed=1).tolist() == large.tolist()
    for other in ({"seed": 2}, {"seed": 1, "draw": 1}):
        assert len(set(draw_per_class(labels, per_class=9, **other)) & set(large)) < 30
    with pytest.raises(UserError, match=r"class \d+ has \d+ images, fewer than the 90"):
        draw_per_class(labels, per_class=90, seed=0)
    with pytest.raises(UserError, match="0 images a class"):
        draw_per_class(labels, per_class=0, seed=0)


def test_every_image_of_a_class_is_drawn_about_equally_often():
    labels = np.repeat([0, 1], 20)
    times = np.zeros(40)
    for draw in range(400):
        times[draw_per_class(labels, per_class=5, seed=3, draw=draw)] += 1
    assert times.sum() == 4000 and times.min() > 60 and times.max() < 140  # 100 expected, deviation 8.7


def test_agrees_with_scikit_learn_on_each_draw(digits):
    linear_model = pytest.importorskip("sklearn.linear_model")
    pipeline = pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, train_labels, val, val_labels = digits
    subsets = [draw_per_class(train_labels, per_class=13, seed=0, draw=draw) for draw in range(2)]
    result = low_shot(*digits, subsets=subsets, num_classes=10)
    for draw, subset in enumerate(subsets):
        reference = pipeline.make_pipeline(
            preprocessing.StandardScaler(),
            linear_model.LogisticRegression(C=1 / (result.l2[draw] * len(subset)), tol=1e-6, max_iter=5000),
        ).fit(train[subset].double().numpy(), train_labels[subset].numpy())
        score = 100 * reference.score(val.numpy(), val_labels.numpy())
        assert result.accuracies[draw] == pytest.approx(score, abs=0.3)
    assert 80 < result.mean < 95 and 0 < result.deviation < 5 and result.images == [130] * 2
    assert result.mean == pytest.approx(np.mean(result.accuracies))
    assert result.deviation == pytest.approx(np.std(result.accuracies, ddof=1))
    assert float((result.predictions == val_labels).float().mean()) * 100 == pytest.approx(result.accuracies[0])


def test_the_chosen_strength_is_near_the_best_one(digits):
    subsets = [draw_per_class(digits[1], per_class=13, seed=0)]
    best = max(low_shot(*digits, subsets=subsets, num_classes=10, strengths=[l2]).mean for l2 in (1, 0.1, 0.01, 1e-3))
    assert low_shot(*digits, subsets=subsets, num_classes=10).mean > best - 1.5


def test_one_image_a_class_takes_the_fixed_strength(digits):
    subsets = [draw_per_class(digits[1], per_class=1, seed=0, draw=draw) for draw in range(3)]
    result = low_shot(*digits, subsets=subsets, num_classes=10)
    assert result.l2 == [lowshot.FIXED_L2] * 3 and 35 < result.mean < 75
    with torch.inference_mode():  # as features are extracted
        again = low_shot(*(part.clone() for part in digits), subsets=subsets[:1], num_classes=10)
    assert again.deviation is None and again.accuracies == result.accuracies[:1]


def test_a_class_with_a_single_image_is_never_held_out():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 0, 0, 0])
    assert lowshot._deal_folds(labels).tolist() == [0, 1, 2, -1, 0, 1, 3, 4, 0]
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    assert choose_strength(features, labels, num_classes=3, strengths=(1.0, 0.1)) in (1.0, 0.1)


def test_the_path_is_the_probe(digits):
    probe = linear_probe(*digits, num_classes=10, seed=0, strengths=[1e-2])
    weight, bias = logistic_path(digits[0], digits[1], num_classes=10, strengths=[1e-2, 1.0])[1e-2]
    predictions = (digits[2] @ weight.T + bias).argmax(dim=1)
    assert float((predictions == probe.predictions).float().mean()) > 0.997


def test_bad_input_is_refused(digits):
    train, train_labels, val, val_labels = digits
    subset = draw_per_class(train_labels, per_class=2, seed=0)
    with pytest.raises(UserError, match="class 4 is in val but has no image in train"):
        low_shot(*digits, subsets=[subset[train_labels[subset].numpy() != 4]], num_classes=10)
    with pytest.raises(UserError, match="class 10 is among the 11 classes but has no image"):
        low_shot(*digits, subsets=[subset], num_classes=11)
    with pytest.raises(UserError, match="no draw"):
        low_shot(*digits, subsets=[], num_classes=10)
    broken = train.clone()
    broken[int(subset[0]), 0] = float("nan")
    with pytest.raises(UserError, match="1 of 1000 rows"):
        low_shot(broken, train_labels, val, val_labels, subsets=[subset], num_classes=10)
