"""Few labels: which images a subset takes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from ijepa_ds.data.beton import BetonFile, Dataset
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.subsets import draw_per_class, samples_of_list

NAMES = ["n01/n01_7.JPEG", "n01/n01_30.JPEG", "n02/n02_1.JPEG", "n02/deeper/n02_9.JPEG", "n03/n01_7.JPEG"]


@pytest.fixture
def beton(tmp_path) -> Dataset:
    path = tmp_path / "train.beton"
    (tmp_path / "train.beton.names.gz").write_bytes(gzip.compress("".join(f"{n}\n" for n in NAMES).encode()))
    return dataset(path, len(NAMES))


def dataset(path: Path, num_samples: int) -> Dataset:
    return Dataset((BetonFile(str(path), num_samples, (), ()),))


def test_a_list_of_names_becomes_sample_numbers(beton, tmp_path):
    split = tmp_path / "1percent.txt"
    split.write_bytes(b"n02_9.JPEG\r\n\nn01_30.JPEG \nn02_9.JPEG\n./n03/n01_7.JPEG")
    assert samples_of_list(split, beton).tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01_7.JPEG\n", "several files of .* are called.*such as n03/n01_7.JPEG"),
        ("n01_30.JPEG\nn09_1.JPEG\nn09_2.JPEG\n", "2 of the 3 files in .*: n09_1.JPEG, n09_2.JPEG; give"),
        ("\n \n", "names no files"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(beton, tmp_path, text, message):
    split = tmp_path / "list.txt"
    split.write_text(text)
    with pytest.raises(UserError, match=message):
        samples_of_list(split, beton)


def test_missing_and_damaged_files_are_named(beton, tmp_path):
    with pytest.raises(UserError, match=r"split list .*absent.txt \(No such file"):
        samples_of_list(tmp_path / "absent.txt", beton)
    split = tmp_path / "list.txt"
    split.write_text("a.JPEG\n")
    with pytest.raises(UserError, match=r"other\.beton\.names\.gz is missing.*convert it again"):
        samples_of_list(split, dataset(tmp_path / "other.beton", 5))
    names = tmp_path / "train.beton.names.gz"
    for damaged in (b"", b"text", names.read_bytes()[:-12], names.read_bytes()[:12] + b"xxxxxx"):
        names.write_bytes(damaged)
        with pytest.raises(UserError, match=r"names.gz cannot be read .*again|names 0 files for the 5 samples"):
            samples_of_list(split, beton)
    names.write_bytes(gzip.compress(b"\n" * 10**6))  # is not unpacked to its end
    with pytest.raises(UserError, match=f"names {5 * 4096 + 1} files for the 5 samples"):
        samples_of_list(split, beton)


def test_draws_are_seeded_balanced_and_nested():
    labels = np.random.default_rng(0).integers(0, 7, 500) * 3  # class numbers with gaps
    small, large = (draw_per_class(labels, per_class=n, seed=1) for n in (2, 9))
    assert np.unique(labels[large], return_counts=True)[1].tolist() == [9] * 7
    assert set(small) < set(large) and (np.diff(large) > 0).all()
    for other in ({"seed": 2}, {"seed": 1, "draw": 1}):
        assert len(set(draw_per_class(labels, per_class=9, **other)) & set(large)) < 30


def test_every_image_of_a_class_is_drawn_about_equally_often():
    labels = np.repeat([0, 1], 20)
    times = np.zeros(40)
    for draw in range(400):
        times[draw_per_class(labels, per_class=5, seed=3, draw=draw)] += 1
    assert times.sum() == 4000 and times.min() > 60 and times.max() < 140  # 100 expected, deviation 8.7
