"""Folders of images, and folders of class folders."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator

import numpy as np

from data_prep.source import PackedNames, Source, why_ignored
from ijepa_ds.errors import UserError

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def open_folder(path: str, *, labelled: bool) -> Source:
    """Class folders (class k = the k-th sub-folder by name), or, where images lie directly in ``path``, no labels."""
    ignored: Counter[str] = Counter()
    if not labelled:
        return Source("images without labels", path, PackedNames(list(walk_images(path, ignored))), ignored=ignored)
    classes = [entry.name for entry in entries_of(path) if not entry.name.startswith(".") and entry.is_dir()]
    direct = list(walk_images(path, ignored, nested=False))
    per_class = [
        [os.path.join(name, image) for image in walk_images(os.path.join(path, name), ignored)] for name in classes
    ]
    names = [name for images in per_class for name in images]
    if direct and names:
        raise UserError(
            f"{path} holds images both directly ({direct[0]}) and in sub-folders ({names[0]}), so it is not clear what "
            "the classes are: move the former away, or give --no-labels"
        )
    if direct:
        return Source("images without labels", path, PackedNames(direct), ignored=ignored)
    if names and SPLIT_NAMES.issuperset(name.lower() for name in classes):
        split = os.path.join(path, next(name for name, images in zip(classes, per_class, strict=True) if images))
        raise UserError(
            f"the sub-folders of {path} are splits, not classes: give one of them as SOURCE, such as {split}"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(images) for images in per_class])
    return Source("class folders", path, PackedNames(names), {"label": labels}, classes, ignored)


def entries_of(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder} ({error.strerror}): mend its permissions") from error


def walk_images(
    folder: str,
    ignored: Counter[str],
    *,
    nested: bool = True,
    prefix: str = "",
    above: tuple[tuple[int, int], ...] = (),
) -> Iterator[str]:
    """Paths below ``folder`` of all files named like images, in order of name. The others are counted in ``ignored``.

    Links to folders are followed, but not into a folder that we are in (``above``: device and inode of each), which
    would never end.
    """
    this = os.stat(folder)
    above = (*above, (this.st_dev, this.st_ino))
    for entry in entries_of(folder):
        reason = why_ignored(entry.name)
        if reason != "hidden" and entry.is_dir():
            inside = entry.stat()
            if nested and (inside.st_dev, inside.st_ino) in above:
                ignored["link to a folder above"] += 1
            elif nested:
                yield from walk_images(entry.path, ignored, prefix=os.path.join(prefix, entry.name), above=above)
        elif reason is not None:
            ignored[reason] += 1
        elif os.path.exists(entry.path) and not stat.S_ISREG(os.stat(entry.path).st_mode):
            ignored["not a file"] += 1  # opening a named pipe would wait for ever
        else:  # a broken link, too: it is reported as unreadable
            yield os.path.join(prefix, entry.name)
