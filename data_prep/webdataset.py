"""WebDataset: tar files whose neighbouring members with one name up to its first dot are a sample.

``key.jpg`` (or another suffix of an image) beside ``key.cls``, a number, or ``key.json`` with a number under "label"
or "cls". Where no sample has either, and each tar holds the images of one class (``n01440764.tar``:
``n01440764_18.JPEG``, ..., as ImageNet-22k is distributed), the tars are the classes.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.source import PackedNames, Source, why_ignored
from data_prep.tars import Place, TarSource, opened_tar, places_of
from ijepa_ds.errors import UserError
from ijepa_ds.validation import parse_json

LABEL_SUFFIXES = (".cls", ".json")
LABEL_KEYS = ("label", "cls")  # of a .json
PEEK = 8  # members after which a tar is known to be a WebDataset, or not


@dataclass
class _Listing:
    """What the tars hold, in their order."""

    names: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def is_webdataset(path: str) -> bool:
    """Whether a tar's first members are images with labels beside them."""
    with opened_tar(path) as tar:
        names = [member.name for _, member in zip(range(PEEK), tar, strict=False) if member.isfile()]
    images = {_key(name) for name in names if why_ignored(name) is None}
    return any(_key(name) in images and name.endswith(LABEL_SUFFIXES) for name in names)


def open_tars(root: str, tars: Sequence[str], *, labelled: bool) -> Source:
    """The images of all ``tars``, one after the other, with the labels that lie beside them or that the tars are.

    Raises:
        UserError: a tar cannot be read, a sample has several images, or some samples have a label and others none.
    """
    listing = _Listing()
    for number, path in enumerate(tars):
        with opened_tar(path) as tar:
            for members in _samples(tar):
                _add(listing, path, number, members, labelled=labelled)
    places, names, classes = places_of(listing.places), listing.names, []
    labels = {}
    if any(label is not None for label in listing.labels):
        if None in listing.labels:
            raise UserError(
                f"{names[listing.labels.index(None)]} in {root} has no label (.cls, or .json beside it), but others "
                "have: mend the tars, or give --no-labels"
            )
        labels = {"label": np.array(listing.labels, np.int64)}
    elif labelled and (classes := _classes(tars, names, places)):
        labels = {"label": places[:, 0].astype(np.int64)}
    kind = "class tars" if classes else "WebDataset tars"
    return TarSource(kind, root, PackedNames(names), labels, classes, listing.ignored, list(tars), places)


def _key(name: str) -> str:
    """What the members of a sample share: the path up to the first dot of the file's name."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(".", 1)[0])


def _samples(tar: tarfile.TarFile) -> Iterator[list[tarfile.TarInfo]]:
    """The members of each sample."""
    sample: list[tarfile.TarInfo] = []
    for member in tar:
        if not member.isfile():
            continue
        if sample and _key(member.name) != _key(sample[0].name):
            yield sample
            sample = []
        sample.append(member)
    if sample:
        yield sample


def _add(listing: _Listing, path: str, number: int, members: list[tarfile.TarInfo], *, labelled: bool) -> None:
    images = [member for member in members if why_ignored(member.name) is None]
    if any(why_ignored(member.name) == ".tar" for member in members):
        raise UserError(f"{path} holds other tars, such as {members[0].name}: if it is ImageNet's, give it as SOURCE")
    if len(images) > 1:
        raise UserError(
            f"{path} has several images for one sample, {images[0].name} and {images[1].name}, so it is not clear "
            "which is meant: unpack it, and give a folder of the right ones"
        )
    if not images:
        listing.ignored["sample without an image"] += 1
        return
    beside = {os.path.splitext(member.name)[1].lower(): member for member in members}
    label = next((beside[suffix] for suffix in LABEL_SUFFIXES if suffix in beside), None) if labelled else None
    value = None if label is None else _label(path, label)
    for member in members:
        if member is not images[0] and member is not label:
            listing.ignored[why_ignored(member.name) or ""] += 1
    listing.names.append(os.path.join(os.path.basename(path), images[0].name))
    listing.places.append(Place(number, images[0].offset_data, images[0].size))
    listing.labels.append(value)


def _label(path: str, member: tarfile.TarInfo) -> int | None:
    """The number in a .cls or .json; None for a .json without one."""
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        data = file.read(member.size)
    try:
        content = parse_json(data)
    except ValueError as error:
        raise UserError(
            f"{member.name} in {path} is no number and no JSON ({error}): mend it, or give --no-labels"
        ) from error
    if isinstance(content, dict):
        content = next((content[key] for key in LABEL_KEYS if content.get(key) is not None), None)
        if content is None:
            return None
    if type(content) is not int:
        raise UserError(f"{member.name} in {path} gives the label {content!r}, no whole number: give --no-labels")
    return content


def _classes(tars: Sequence[str], names: Sequence[str], places: np.ndarray) -> list[str]:
    """The tars' names where each image is called after its tar; else nothing."""
    stems = [os.path.basename(path).removesuffix(".tar") for path in tars]
    owners = (stems[int(tar)] for tar in places[:, 0])
    called = all(os.path.basename(name).startswith(f"{owner}_") for name, owner in zip(names, owners, strict=True))
    return stems if names and called else []
