"""ImageNet as it is distributed: its two tar files, read in place, and the development kit with the validation labels.

A class's label is the index of its WordNet ID in the sorted list of all IDs, as for a folder of class folders.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.source import PackedNames, Source, why_ignored
from data_prep.tars import Place, TarSource, opened_tar, places_of
from ijepa_ds.errors import UserError

GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
VALIDATION_NUMBER = re.compile(r"_val_(\d{8})\.\w+$")  # ILSVRC2012_val_00000001.JPEG is line 1 of the ground truth


def open_imagenet_tar(path: str, *, unlabelled_wanted: bool) -> Source:
    """The train tar (a tar of class tars) with labels, or a flat tar of images without. Raises UserError for others."""
    with opened_tar(path) as tar:
        source = _list_members(path, tar)
    if len(source) and not source.labels and not unlabelled_wanted:
        raise UserError(
            f"{path} holds images without class tars, so labels need --devkit ILSVRC2012_devkit_t12.tar.gz: give it, "
            "or --no-labels to go without"
        )
    return source


def _list_members(path: str, tar: tarfile.TarFile) -> Source:
    entries: list[tuple[str, str, int, int]] = []  # class (or ""), name, offset, size
    classes: list[str] = []
    ignored: Counter[str] = Counter()
    for member in tar:
        reason = why_ignored(member.name)
        if member.isfile() and reason == ".tar":
            wnid = os.path.basename(member.name)[: -len(".tar")]
            classes.append(wnid)
            entries += [(wnid, *entry) for entry in _list_class(tar, member, ignored)]
        elif member.isfile() and reason is not None:
            ignored[reason] += 1
        elif member.isfile():
            entries.append(("", member.name, member.offset_data, member.size))
    classes.sort()
    flat = [name for wnid, name, _, _ in entries if not wnid]
    if classes and flat:
        raise UserError(
            f"{path} mixes class tars ({classes[0]}.tar) and images ({flat[0]}), so it is not ImageNet's: "
            "unpack it and give the folder"
        )
    if len({os.path.dirname(name) for name in flat}) > 1:
        raise UserError(
            f"{path} holds folders of images, which ImageNet's tar files do not: unpack it and give the folder"
        )
    entries.sort()
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    labels = {"label": np.array([label_of[wnid] for wnid, *_ in entries], dtype=np.int64)} if classes else {}
    names = PackedNames([os.path.join(wnid, name) for wnid, name, _, _ in entries])
    places = places_of([Place(0, offset, size) for *_, offset, size in entries])
    kind = "ImageNet's train tar" if classes else "a tar of images"
    return TarSource(kind, path, names, labels, classes, ignored, [path], places)


def _list_class(outer: tarfile.TarFile, member: tarfile.TarInfo, ignored: Counter[str]) -> list[tuple[str, int, int]]:
    """(name, offset in the outer file, size) of each image of a class tar."""
    entries = []
    with tarfile.open(fileobj=_extract(outer, member), mode="r:") as inner:
        for image in inner:
            reason = why_ignored(image.name)
            if image.isfile() and reason is not None:
                ignored[reason] += 1
            elif image.isfile():
                entries.append((image.name, member.offset_data + image.offset_data, image.size))
    return entries


def label_validation(source: Source, devkit: str) -> Source:
    """``source`` (validation images) with the labels of the development kit (its tar.gz or its folder)."""
    truth, wnid_of_id = read_devkit(devkit)
    wnids = sorted(wnid_of_id.values())
    label_of_wnid = {wnid: label for label, wnid in enumerate(wnids)}
    labels = np.empty(len(source), dtype=np.int64)
    for index in range(len(source)):
        match = VALIDATION_NUMBER.search(source.names[index])
        if match is None:
            raise UserError(
                f"{source.names[index]} in {source.root} is not named like ILSVRC2012_val_00000001.JPEG, so --devkit "
                "has no label for it: give ImageNet's validation images, or leave --devkit out"
            )
        number = int(match.group(1))
        if not 1 <= number <= len(truth):
            raise UserError(
                f"{source.names[index]} has no label, as {devkit} has {len(truth)}: give the kit of this data set"
            )
        labels[index] = label_of_wnid[wnid_of_id[truth[number - 1]]]
    return replace(source, kind="ImageNet's validation images", labels={"label": labels}, class_names=wnids)


def read_devkit(devkit: str) -> tuple[list[int], dict[int, str]]:
    """(class ID of each validation image, WordNet ID of each class ID); class IDs are the kit's own, 1 to 1000."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            "the development kit's meta.mat is read with scipy, which is not installed: pip install scipy"
        ) from error
    try:
        text, meta = _devkit_files(devkit)
        truth = [int(line) for line in text.split()]
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, struct_as_record=True)["synsets"]
        wnid_of_id = {
            int(row["ILSVRC2012_ID"]): str(row["WNID"])
            for row in np.atleast_1d(synsets)
            if int(row["num_children"]) == 0
        }
        unknown = set(truth) - set(wnid_of_id)
        if unknown or not truth:
            raise ValueError(f"class ID {min(unknown)} is not in meta.mat" if unknown else "the ground truth is empty")
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError, IndexError, NotImplementedError) as error:
        raise UserError(
            f"cannot read the development kit {devkit} ({type(error).__name__}: {error}): "
            "give ILSVRC2012_devkit_t12.tar.gz or the folder that it unpacks to"
        ) from error
    return truth, wnid_of_id


def _devkit_files(devkit: str) -> tuple[bytes, bytes]:
    """The bytes of the ground truth and of meta.mat, from the kit's archive, its folder or the folder around that."""
    contents: dict[str, bytes] = {}
    if os.path.isdir(devkit):
        inside = Path(devkit, "ILSVRC2012_devkit_t12")
        root = inside if inside.is_dir() else Path(devkit)
        contents = {name: (root / name).read_bytes() for name in (GROUND_TRUTH, META)}
    else:
        with tarfile.open(devkit, "r:*") as tar:
            for member in tar:
                for name in (GROUND_TRUTH, META):
                    if member.isfile() and member.name.endswith("/" + name):
                        contents[name] = _extract(tar, member).read()
    return contents[GROUND_TRUTH], contents[META]


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return file
