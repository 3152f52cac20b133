"""Which images --task lowshot takes, the augmented batches that it trains on, and what is refused at once."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.command import build_parser, check_options
from ijepa_ds.evaluation.data import LabelledData
from ijepa_ds.evaluation.inputs import AugmentedBatches, validation_batches
from ijepa_ds.evaluation.setting import FewLabels, Setting, augmented_loader
from ijepa_ds.evaluation.subsets import subsets

CLASSES = [3, 5, 8]
NUM_IMAGES = 23


def process(rank: int = 0, world_size: int = 1) -> Process:
    return Process(rank, world_size, torch.device("cpu"))


@pytest.fixture(scope="module")
def beton(make_beton, tmp_path_factory) -> Path:
    labels = {"label": [CLASSES[k % 3] for k in range(NUM_IMAGES)]}
    path = make_beton(tmp_path_factory.mktemp("few") / "a.beton", NUM_IMAGES, (16, 16), labels, write_mode="raw")
    names = "".join(f"folder/{k}.png\n" for k in range(NUM_IMAGES))
    Path(f"{path}.names.gz").write_bytes(gzip.compress(names.encode()))
    return path


def setting_of(path: Path, few: FewLabels | None = None, *, limit: int | None = None, of: Process | None = None):
    of, few = of or process(), few or FewLabels()
    data = LabelledData(
        (str(path), str(path)), limits=(limit, None), image_size=(16, 16), micro_batch=4, num_workers=1, process=of
    )
    return Setting(data=data, process=of, seed=7, few=few)


def test_each_draw_has_so_many_images_of_every_class(beton):
    two, four = subsets(setting_of(beton, FewLabels(per_class=(2, 4), draws=2)), "label")
    assert (two.name, four.name) == ("2", "4") and len(two.draws) == len(four.draws) == 2
    for subset, per_class in ((two, 2), (four, 4)):
        for draw in subset.draws:
            assert np.bincount(draw % 3).tolist() == [per_class] * 3
    assert not np.array_equal(two.draws[0], two.draws[1]) and set(two.draws[0]) < set(four.draws[0])


def test_a_split_list_names_the_images_of_the_only_draw(beton, tmp_path):
    names = tmp_path / "list.txt"
    names.write_text("5.png\nfolder/0.png\n7.png\n")
    (subset,) = subsets(setting_of(beton, FewLabels(split_list=str(names))), "label")
    assert subset.name == "list" and [draw.tolist() for draw in subset.draws] == [[0, 5, 7]]
    names.write_text("0.png\n1.png\n")
    with pytest.raises(UserError, match="class 2 is among the 3 classes but has no image in train"):
        subsets(setting_of(beton, FewLabels(split_list=str(names))), "label")
    with pytest.raises(UserError, match="leave out --train-images"):
        subsets(setting_of(beton, FewLabels(split_list=str(names)), limit=9), "label")


def test_a_class_with_too_few_images_is_named(beton):
    with pytest.raises(UserError, match="class 8 of 'label' has 7 training images, fewer than --per-class 8"):
        subsets(setting_of(beton, FewLabels(per_class=(1, 8))), "label")


def as_rows(images: torch.Tensor) -> torch.Tensor:
    return images.clone()


def test_the_batches_of_two_processes_are_those_of_one(beton):
    positions = np.arange(1, NUM_IMAGES)

    def epoch_of(rank: int, world_size: int, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        setting = setting_of(beton, of=process(rank, world_size))
        labels = torch.arange(NUM_IMAGES)[1:]
        loader = augmented_loader(setting)
        batches = AugmentedBatches(setting.data, loader, positions, labels, batch=6, seed=7, prepare=as_rows)
        found = list(batches(epoch))
        assert len(found) == batches.steps == 3
        return found

    whole = epoch_of(0, 1, 0)
    taken = torch.cat([labels for _, labels in whole])
    assert len(taken.unique()) == 18 and all(images.shape == (6, 16, 16, 3) for images, _ in whole)
    for rank in (0, 1):
        for (images, labels), (all_images, all_labels) in zip(epoch_of(rank, 2, 0), whole, strict=True):
            assert torch.equal(labels, all_labels[rank::2]) and torch.equal(images, all_images[rank::2])
    loader = augmented_loader(setting_of(beton))
    for image, sample in zip(*whole[1], strict=True):  # labels are sample numbers here: each stands by its own image
        assert torch.equal(next(loader.batches(np.array([int(sample)]), 0))[0], image)
    again, other = epoch_of(0, 1, 0), epoch_of(0, 1, 1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole, again, strict=True))
    assert not torch.equal(torch.cat([labels for _, labels in other]), taken)


def test_validation_goes_round_the_processes_with_its_labels(beton):
    labels = torch.arange(NUM_IMAGES)
    whole = list(validation_batches(setting_of(beton).data, labels, crop_share=1.0, prepare=as_rows))
    images = torch.cat([images for images, _ in whole])
    assert torch.equal(torch.cat([found for _, found in whole]), labels)
    data = setting_of(beton, of=process(1, 2)).data
    half = list(validation_batches(data, labels, crop_share=1.0, prepare=as_rows))
    assert torch.equal(torch.cat([found for _, found in half]), labels[1::2])
    assert torch.equal(torch.cat([images for images, _ in half]), images[1::2])


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
