"""Several .beton files as one set: the same batches as from one file, and what is no set is one sentence."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_images import smooth_image

from ijepa_ds.data.beton import Tables, class_names, image_sizes, inspect_dataset, read_labels, read_names
from ijepa_ds.data.crops import Crops
from ijepa_ds.data.ffcv_pipeline import DecodeError, refuse_failed
from ijepa_ds.data.file_set import read_note
from ijepa_ds.data.mapped_files import map_files, starts_of
from ijepa_ds.data.pretraining_loader import PretrainingLoader
from ijepa_ds.errors import UserError
from ijepa_ds.files import shard_path
from ijepa_ds.method.masks import MultiblockSampler

NUM_IMAGES, GLOBAL_BATCH, STEPS = 28, 8, 6  # two epochs of three steps; four images are left out in each
PARTS = [range(0, 9), range(9, 20), range(20, 28)]
SIZES = [(40, 56), (64, 48), (24, 36), (30, 30)]


@pytest.fixture(scope="session")
def write(make_beton) -> Callable[..., Path]:
    def part(path: Path, samples: range, **options) -> Path:
        """The samples of the whole set that ``samples`` names; the larger sizes as JPEGs."""
        images = [smooth_image(sample, SIZES[sample % 4]) for sample in samples]
        labels = {"label": [sample % 5 for sample in samples], "distance": [sample / 4 for sample in samples]}
        defaults = {"labels": labels, "write_mode": "smart", "smart_threshold": 5000}
        return make_beton(path, images=images, **{**defaults, **options})

    return part


@pytest.fixture(scope="session")
def whole(write, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "train.beton", range(NUM_IMAGES))


@pytest.fixture(scope="session")
def shards(write, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    paths = [Path(shard_path(str(folder / "train.beton"), number, 3)) for number in (1, 2, 3)]
    return [write(path, samples) for path, samples in zip(paths, PARTS, strict=True)]


@pytest.fixture(scope="session")
def loaders(whole, shards) -> Callable[..., PretrainingLoader]:
    """Loaders of either set for one rank; compiled pipelines are shared, as they do not depend on it."""
    pipelines = {}

    def make(files: str, rank: int = 0, world_size: int = 1) -> PretrainingLoader:
        loader = PretrainingLoader(
            inspect_dataset(whole if files == "whole" else shards),
            MultiblockSampler(seed=5, grid=(4, 6), context_tokens=6),
            image_size=(16, 24),
            crops=Crops((0.3, 1.0), (0.75, 4 / 3)),
            global_batch=GLOBAL_BATCH,
            micro_batch=4,
            share=(rank, world_size),
        )
        loader.pipeline = pipelines.setdefault(files, loader.pipeline)
        return loader

    return make


def read(loader: PretrainingLoader, step: int = 0) -> list[tuple[torch.Tensor, ...]]:
    return [
        (
            torch.from_numpy(batch.samples),
            batch.images.clone(),
            batch.context_block.clone(),
            batch.target_blocks.clone(),
        )
        for batches in loader.from_step(step, STEPS)
        for batch in batches
    ]


@pytest.mark.parametrize(("world_size", "step"), [(1, 0), (2, 0), (1, 2), (2, 4)])
def test_three_files_give_the_batches_of_one_for_any_ranks_and_after_a_resume(loaders, world_size, step):
    for rank in range(world_size):
        expected, batches = (read(loaders(files, rank, world_size), step) for files in ("whole", "shards"))
        assert len(batches) == (STEPS - step) * 2 // world_size
        for one, several in zip(expected, batches, strict=True):
            assert all(torch.equal(first, second) for first, second in zip(one, several, strict=True))
    assert len({int(sample) for batch in read(loaders("shards")) for sample in batch[0]}) > 24


def test_one_file_has_the_table_that_ffcv_reads(whole):
    from ffcv.reader import Reader

    tables, reader = Tables(inspect_dataset([whole])), Reader(str(whole))
    assert (tables.metadata == reader.metadata).all() and tables.num_samples == NUM_IMAGES
    assert not tables.metadata.flags.writeable
    assert (map_files([str(whole)])[: whole.stat().st_size] == np.fromfile(whole, np.uint8)).all()


def test_files_lie_behind_one_another_in_memory_each_at_a_page(shards):
    paths = [str(path) for path in shards]
    starts, mapped = starts_of(paths), map_files(paths)
    assert len(mapped) == starts[-1] and not mapped.flags.writeable
    for path, start in zip(shards, starts[:3], strict=True):
        content = np.fromfile(path, np.uint8)
        assert start % 4096 == 0 and (mapped[start : start + len(content)] == content).all()


def test_labels_sizes_and_names_are_those_of_all_files(whole, shards):
    one, several = inspect_dataset(whole), inspect_dataset([str(path) for path in shards])
    assert several.num_samples == NUM_IMAGES and several.label_fields == ("label", "distance")
    for field in one.label_fields:
        assert (read_labels(several, field) == read_labels(one, field)).all()
    assert all((ours == theirs).all() for ours, theirs in zip(image_sizes(several), image_sizes(one), strict=True))
    for path, samples in zip(shards, PARTS, strict=True):
        Path(f"{path}.names.gz").write_bytes(gzip.compress(b"".join(b"%d.png\n" % sample for sample in samples)))
    assert read_names(several) == [f"{sample}.png" for sample in range(NUM_IMAGES)]
    assert several.path == f"{shards[0]} and 2 more files"


def test_a_damaged_image_is_named_with_its_file_and_its_number_there(shards):
    dataset = inspect_dataset(shards)
    assert dataset.locate(8) == (str(shards[0]), 8) and dataset.locate(9) == (str(shards[1]), 0)
    failed = np.array([[0], [1], [1], [1]])
    with pytest.raises(DecodeError, match=r"train-2-of-3.beton: sample 2, 10 cannot be decoded; .*-2-of-3.beton$"):
        refuse_failed(failed, np.array([20, 11, 19, 27]), dataset)


# What is a set


def test_a_pattern_is_the_files_that_match_it_by_name(shards):
    folder = shards[0].parent
    (folder / "train-1-of-3.beton.json").write_text("{}")
    for given in (str(folder / "train-*"), [str(folder / "train-*-of-3.beton")], folder / "*.beton"):
        assert inspect_dataset(given).paths == tuple(map(str, shards))
    assert shard_path("a/train.beton", 3, 12) == "a/train-03-of-12.beton"


def refusal(*paths: Path | str) -> str:
    with pytest.raises(UserError) as error:
        inspect_dataset([str(path) for path in paths])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_not_there_or_there_twice_are_refused(shards, tmp_path):
    assert f"no .beton file matches {tmp_path}/*.beton" in refusal(tmp_path / "*.beton")
    assert "names no images" in refusal()
    assert f"{tmp_path}/none.beton does not exist" in refusal(shards[0], tmp_path / "none.beton")
    assert f"{shards[0]} is named twice" in refusal(shards[0], shards[1], shards[0])
    (tmp_path / "link.beton").symlink_to(shards[0])
    assert f"link.beton, which is {shards[0]}, is named twice" in refusal(shards[0], tmp_path / "link.beton")


def test_a_missing_shard_and_shards_out_of_order_are_refused(shards):
    assert "one of 3 parts of a conversion, but part 2 is not among" in refusal(shards[0], shards[2])
    assert "--shard 2/3" in refusal(shards[0], shards[2])
    assert "is part 3 of 3, comes as number 1" in refusal(shards[2], shards[0], shards[1])
    assert inspect_dataset(shards[1]).num_samples == 11  # one file by itself is what it is


def test_a_pattern_that_matches_one_part_alone_is_refused(shards):
    pattern = str(shards[1]).replace("-2-", "-2*-")
    assert "is one of 3 parts of a conversion, but part 1, 3 is not among" in refusal(pattern)


def test_files_of_other_fields_are_refused(shards, write, tmp_path):
    plain = write(tmp_path / "plain.beton", range(3), labels={"label": [0, 1, 2]})
    refused = refusal(shards[0], plain)
    assert "has the fields image (RGBImageField), label (IntField), but" in refused and "no set" in refused
    real = write(tmp_path / "real.beton", range(3), labels={"label": [0.0, 1.0, 2.0], "distance": [0.0, 1.0, 2.0]})
    assert "label (FloatField)" in refusal(shards[0], real)


@pytest.fixture
def noted(write, tmp_path) -> Callable[..., list[Path]]:
    """Files of three images each, with the given notes beside them."""

    def make(*notes: dict) -> list[Path]:
        paths = []
        for number, note in enumerate(notes):
            paths.append(write(tmp_path / f"{'abcdef'[number]}.beton", range(3)))
            Path(f"{paths[-1]}.json").write_text(json.dumps(note))
        return paths

    return make


def test_files_that_were_converted_otherwise_are_refused(noted):
    notes = [{"settings": {"max_resolution": 512, "write_mode": "jpg"}}, {"settings": {"write_mode": "jpg"}}, {}]
    notes[1]["settings"]["max_resolution"] = 256
    paths = noted(*notes)
    assert "were not converted alike (max_resolution 512 and 256)" in refusal(*paths)
    assert inspect_dataset([paths[0], paths[2]]).num_samples == 6  # without a note nothing speaks against it
    assert "the names of the classes" in refusal(*noted({"class_names": ["a", "b"]}, {"class_names": ["b", "c"]}))
    assert class_names(inspect_dataset(noted({}, {"class_names": ["a", "b"]}))) == ["a", "b"]


def test_shards_under_any_name_are_known_by_their_notes(noted):
    def part(index: int, listing: str = "x") -> dict:
        return {"shard": {"index": index, "of": 3, "listing": listing}}

    first, second, third = noted(part(1), part(2), part(3))
    assert inspect_dataset([first, second, third]).num_samples == 9
    assert "part 2 is not among" in refusal(first, third)
    assert "part 1, 2 is not among" in refusal(second.rename(second.with_name("z.beton")), third)


def test_shards_of_other_listings_of_one_source_are_refused(noted):
    paths = noted(*({"shard": {"index": 1 + number, "of": 2, "listing": f"{number}"}} for number in range(2)))
    for number, path in enumerate(paths, 1):
        Path(f"{path}.json").rename(path.with_name(f"train-{number}-of-2.beton.json"))
        path.rename(path.with_name(f"train-{number}-of-2.beton"))
    assert "did not list the same images" in refusal(paths[0].with_name("train-*"))


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (b"", "cannot be read"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"null", "it must be an object, not null"),
        (b'{"class_names": 3}', "class_names = 3 must be a list of names"),
        (b'{"class_names": ["a", 3]}', "must be a list of names"),
        (b'{"shard": {"index": "1", "of": 2, "listing": "x"}}', 'shard.index = "1" must be a whole number'),
        (b'{"shard": {"index": 1, "of": 1000000000000, "listing": "x"}}', "shard.of = 1000000000000 must be at most"),
        (b'{"shard": []}', "shard must be an object, not a list"),
        (b"[" * 1000 + b"]" * 1000, "deep"),
    ],
)
def test_a_note_that_is_none_is_refused_in_a_sentence(tmp_path, note, reason):
    path = tmp_path / "x.beton"
    Path(f"{path}.json").write_bytes(note)
    with pytest.raises(UserError, match=r"x\.beton\.json .*restore it, or remove it to do without") as refused:
        read_note(str(path))
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_names_of_folders_need_not_be_utf_8(tmp_path):
    Path(f"{tmp_path}/x.beton.json").write_text(json.dumps({"class_names": ["a\udcff"]}))
    assert read_note(f"{tmp_path}/x.beton")["class_names"] == ["a\udcff"]
