"""CLEVR's layout: scene files beside images."""

from __future__ import annotations

import glob
import os
from collections import Counter

import numpy as np

from data_prep.folders import entries_of
from data_prep.source import PackedNames, Source, why_ignored
from ijepa_ds.errors import UserError
from ijepa_ds.validation import load_json

MOST_BYTES = 4_000_000_000  # of a file of scenes: that of CLEVR's train split has hundreds of megabytes


def clevr_splits(path: str) -> list[str]:
    """The splits that have a file of scenes, by name."""
    pattern = os.path.join(glob.escape(path), "scenes", "CLEVR_*_scenes.json")
    return sorted(os.path.basename(name)[len("CLEVR_") : -len("_scenes.json")] for name in glob.glob(pattern))


def open_clevr(path: str, split: str | None) -> Source:
    """CLEVR v1.0: ``count`` of objects and ``depth`` of the nearest one (its ``pixel_coords[2]``), as in VTAB."""
    splits = clevr_splits(path)
    if split not in splits:
        what = "give --split" if split is None else f"it has no scenes of the split '{split}': give --split"
        raise UserError(f"{path} has CLEVR's layout, {what} with one of: {', '.join(splits)}")
    scenes_path = os.path.join(path, "scenes", f"CLEVR_{split}_scenes.json")
    folder = os.path.join(path, "images", split)
    if not os.path.isdir(folder):
        raise UserError(
            f"the folder {folder} is missing, whose images {scenes_path} describes: unpack the whole data set"
        )
    scenes = read_scenes(scenes_path)
    present = {entry.name for entry in entries_of(folder)}
    missing = [name for name, _ in scenes if name not in present]
    if missing:
        raise UserError(
            f"{scenes_path} names {len(missing)} of {len(scenes)} images that are not in {folder}, the first is "
            f"{missing[0]}: unpack the data set again"
        )
    described = {name for name, _ in scenes}
    ignored = Counter(why_ignored(name) or "not in the scenes" for name in present - described)
    labels = {
        "count": np.array([len(depths) for _, depths in scenes], dtype=np.int64),
        "depth": np.array([min(depths) for _, depths in scenes], dtype=np.float64),
    }
    names = PackedNames([name for name, _ in scenes])
    return Source(f"CLEVR scenes, split {split}", folder, names, labels, [], ignored)


def read_scenes(path: str) -> list[tuple[str, list[float]]]:
    """(image file, depth of each of its objects) of each scene, sorted by file."""

    def thin(node: dict) -> object:
        # Called for the innermost objects first. Only what is needed survives, or CLEVR would take gigabytes.
        if "pixel_coords" in node:
            return float(node["pixel_coords"][2])
        if "image_filename" in node:
            return node["image_filename"], list(node["objects"])
        return node

    try:
        scenes = sorted(load_json(path, most_bytes=MOST_BYTES, shorten=thin)["scenes"])
        for name, depths in scenes:
            if not depths:
                raise ValueError(f"the scene of {name} has no objects")
            if not all(isinstance(depth, float) for depth in depths):
                raise ValueError(f"an object of {name} has no pixel_coords")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"cannot read the scenes in {path} ({type(error).__name__}: {error}): it is not CLEVR's file, or damaged"
        ) from error
    return scenes
