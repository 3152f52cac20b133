"""How many images there are, and where the number comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ijepa_ds.plan.images import IMAGENET, MEASURED, images_of

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/2026-11-25_loader.json"


def test_a_file_is_counted_by_its_header(make_beton, tmp_path: Path) -> None:
    path = make_beton(tmp_path / "some.beton", 12)
    images = images_of(str(path), None)
    assert (images.count, images.bytes, images.is_measured) == (12, path.stat().st_size, True)


def test_several_files_are_one_set(make_beton, tmp_path: Path) -> None:
    paths = [make_beton(tmp_path / f"{name}.beton", count) for name, count in (("a", 12), ("b", 5))]
    size = sum(path.stat().st_size for path in paths)
    for given in ([str(path) for path in paths], str(tmp_path / "*.beton")):
        images = images_of(given, None)
        assert (images.count, images.bytes) == (17, size)
    assert images_of([str(paths[0]), str(tmp_path / "c.beton")], None).count == IMAGENET
    assert images_of(str(tmp_path / "none" / "*.beton"), None).count == IMAGENET


def test_more_images_than_the_file_has_take_room_in_proportion(make_beton, tmp_path: Path) -> None:
    path = make_beton(tmp_path / "some.beton", 12)
    images = images_of(str(path), 120)
    assert (images.count, images.bytes, images.told) == (120, 10 * path.stat().st_size, "--images")


@pytest.mark.parametrize("content", [None, b"", b"no .beton at all, whatever its name says"])
def test_without_a_file_they_are_imagenets(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "some.beton"
    if content is not None:
        path.write_bytes(content)
    images = images_of(str(path), None)
    assert images.count == IMAGENET and "ImageNet" in images.told
    assert images.bytes == pytest.approx(65.5e9)


def test_small_stored_images_are_read_faster(make_beton, tmp_path: Path) -> None:
    path = make_beton(tmp_path / "some.beton", 12)
    note = {"image_size": {"height": [20, 200], "width": [20, 300]}}
    Path(f"{path}.json").write_text(json.dumps(note))
    assert images_of(str(path), None).rates == MEASURED[400]
    assert images_of(str(path), None).scratch(2) == 5 * 2 * 3 * 300**2


def test_the_rates_are_those_of_the_benchmark() -> None:
    measured = {}
    for result in json.loads(RESULTS.read_text())["results"]:
        if result["workers"] == 1 and result["resolution"] in MEASURED:
            sides = result["sides"]
            rates = (sides[name]["images_per_second"] for name in ("ours", "JPEG decoder alone"))
            measured.setdefault(result["resolution"], tuple(round(rate) for rate in rates))
    assert measured == MEASURED
