"""Which images --task lowshot takes, and what is refused at once."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_runs import tiny_config

from ijepa_ds.config import parse_config
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.command import build_parser, check_options
from ijepa_ds.evaluation.data import LabelledData
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.evaluation.subsets import subsets

CLASSES = [3, 5, 8]
NUM_IMAGES = 23


ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def beton(make_beton, tmp_path_factory) -> Path:
    labels = {"label": [CLASSES[k % 3] for k in range(NUM_IMAGES)]}
    path = make_beton(tmp_path_factory.mktemp("few") / "a.beton", NUM_IMAGES, (16, 16), labels, write_mode="raw")
    names = "".join(f"folder/{k}.png\n" for k in range(NUM_IMAGES))
    Path(f"{path}.names.gz").write_bytes(gzip.compress(names.encode()))
    return path


def setting_of(path: Path, *options: object) -> Setting:
    arguments = ["--checkpoint", "x", "--task", "lowshot", "--seed", "7", "--micro-batch", "4", *map(str, options)]
    parsed = build_parser().parse_args([*arguments, "--train", str(path), "--validation", str(path)])
    config = parse_config(tiny_config(ijepa__data__image_size=16))
    return Setting(parsed, config, LabelledData(parsed, config, ALONE), ALONE)


def test_each_draw_has_so_many_images_of_every_class(beton):
    two, four = subsets(setting_of(beton, "--per-class", 4, 2, "--draws", 2), "label")
    assert (two.name, four.name) == ("2", "4") and len(two.draws) == len(four.draws) == 2
    for subset, per_class in ((two, 2), (four, 4)):
        for draw in subset.draws:
            assert np.bincount(draw % 3).tolist() == [per_class] * 3
    assert not np.array_equal(two.draws[0], two.draws[1]) and set(two.draws[0]) < set(four.draws[0])
    assert [len(subset.draws) for subset in subsets(setting_of(beton, "--per-class", 1), "label")] == [3]


def test_a_split_list_names_the_images_of_the_only_draw(beton, tmp_path):
    names = tmp_path / "list.txt"
    names.write_text("5.png\nfolder/0.png\n7.png\n")
    (subset,) = subsets(setting_of(beton, "--split-list", names), "label")
    assert subset.name == "list" and [draw.tolist() for draw in subset.draws] == [[0, 5, 7]]
    names.write_text("0.png\n1.png\n")
    with pytest.raises(UserError, match="class 8 of 'label' has 0 training images, fewer than the 1 that each"):
        subsets(setting_of(beton, "--split-list", names), "label")
    with pytest.raises(UserError, match="leave out --train-images"):
        subsets(setting_of(beton, "--split-list", names, "--train-images", 9), "label")


def test_a_class_with_too_few_images_is_named(beton):
    with pytest.raises(UserError, match="class 8 of 'label' has 7 training images, fewer than --per-class 8"):
        subsets(setting_of(beton, "--per-class", 1, 8), "label")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--finetune", "--finetune is of --task lowshot"),
        ("--task lowshot --per-class 5 0", "--per-class = 0 must be at least 1"),
        ("--task lowshot --draws 0", "--draws = 0 must be at least 1"),
        ("--task lowshot --finetune-lr 1e-3", "--finetune-lr is of no use without --finetune"),
        ("--task lowshot --finetune --finetune-lr nan", "--finetune-lr = nan must be a number above 0"),
        ("--task lowshot --split-list nowhere", "--split-list nowhere is not a file"),
        ("--task lowshot --split-list nowhere --draws 2", "--draws has no meaning"),
        ("--task transfer", "--task transfer needs --preset"),
        ("--lr 0.1 nan", "--lr = nan must be a number of at least 0"),
        ("--weight-decay -1", "--weight-decay = -1.0 must be a number of at least 0"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(arguments, said):
    with pytest.raises(UserError, match=said):
        check_options(build_parser().parse_args(["--checkpoint", "nowhere", *arguments.split()]))


def test_images_a_class_may_be_given_together_or_again():
    arguments = "--checkpoint x --task lowshot --per-class 1 5 --per-class 13"
    options = build_parser().parse_args(arguments.split())
    check_options(options)
    assert options.per_class == [1, 5, 13]
