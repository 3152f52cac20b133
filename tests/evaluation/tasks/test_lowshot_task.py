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
from ijepa_ds.evaluation.setting import Setting, any_classes
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


def subsets_of(*arguments: object) -> dict[str, list[np.ndarray]]:
    setting = setting_of(*arguments)
    return subsets(setting, "label", any_classes(setting, "label"))


def test_each_draw_has_so_many_images_of_every_class(beton):
    chosen = subsets_of(beton, "--per-class", 4, 2, "--draws", 2)
    assert list(chosen) == ["2", "4"] and len(chosen["2"]) == len(chosen["4"]) == 2
    for name, per_class in (("2", 2), ("4", 4)):
        for draw in chosen[name]:
            assert np.bincount(draw % 3).tolist() == [per_class] * 3
    assert not np.array_equal(*chosen["2"]) and set(chosen["2"][0]) < set(chosen["4"][0])
    assert [len(draws) for draws in subsets_of(beton, "--per-class", 1).values()] == [3]


def test_a_split_list_names_the_images_of_the_only_draw(beton, tmp_path):
    names = tmp_path / "list.txt"
    names.write_text("5.png\nfolder/0.png\n7.png\n")
    (chosen,) = subsets_of(beton, "--split-list", names).items()
    assert chosen[0] == "list" and [draw.tolist() for draw in chosen[1]] == [[0, 5, 7]]
    names.write_text("0.png\n1.png\n")
    with pytest.raises(UserError, match="class 8 of 'label' has 0 training images, fewer than the 1 that each"):
        subsets_of(beton, "--split-list", names)
    with pytest.raises(UserError, match="leave out --train-images"):
        subsets_of(beton, "--split-list", names, "--train-images", 9)


def test_a_class_with_too_few_images_is_named(beton):
    with pytest.raises(UserError, match="class 8 of 'label' has 7 training images, fewer than --per-class 8"):
        subsets_of(beton, "--per-class", 1, 8)


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
