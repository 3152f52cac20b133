"""What SOURCE can be: where the images of a conversion are, in which order, and what labels they have.

A :class:`Source` is small (names in one block of bytes, labels and offsets in arrays), so that ImageNet's 1.28 million
entries cost some 100 MB once and forked workers share them. Opening one lists and checks, it reads no image.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter

from data_prep.clevr import clevr_splits, open_clevr
from data_prep.folders import entries_of, open_folder
from data_prep.imagenet import label_validation, open_imagenet_tar
from data_prep.source import Source, why_ignored
from data_prep.tables import ARROW, PARQUET, open_tables, saved_files
from data_prep.webdataset import is_webdataset, open_tars
from ijepa_ds.errors import UserError, some

TAR = ".tar"
NUMBERED = re.compile(r"(.+?)[-_.]\d+(-of-(\d+))?")  # train-00003-of-00294, imagenet1k-train-0042


def open_source(path: str, *, split: str | None, devkit: str | None, labelled: bool) -> Source:
    """Find out what ``path`` is and list its images. Raises UserError where that cannot be told or nothing is there."""
    files = _files_of_pattern(path)
    if not files and not os.path.exists(path):
        raise UserError(f"SOURCE {path} does not exist: check the path")
    is_clevr = bool(clevr_splits(path)) and os.path.isdir(os.path.join(path, "images"))
    if split is not None and not is_clevr:
        raise UserError(
            f"--split is for CLEVR's layout (images/, scenes/CLEVR_*_scenes.json), which {path} has not: leave it out"
        )
    if is_clevr:
        source = open_clevr(path, split)
    elif files := files or _files_of_folder(path) or _single_file(path):
        source = _open_files(path, files, labelled=labelled)
    elif os.path.isdir(path):
        source = open_folder(path, labelled=labelled and devkit is None)
    else:
        source = open_imagenet_tar(path, unlabelled_wanted=devkit is not None or not labelled)
    if not len(source):
        raise UserError(f"no images found in {path}{_seen_instead(source.ignored)}")
    _check_classes(source)
    if devkit is not None:
        if source.labels:
            raise UserError(f"--devkit labels ImageNet's validation images, but {path} is {source.kind}: leave it out")
        return label_validation(source, devkit)
    return source if labelled else source.without_labels()


def _open_files(path: str, files: list[str], *, labelled: bool) -> Source:
    """Tars or tables, each of a kind."""
    kinds = sorted({os.path.splitext(file)[1] for file in files})
    if kinds == [TAR]:
        return open_tars(path, files, labelled=labelled)
    if kinds in ([PARQUET], [ARROW]):
        return open_tables(path, files, labelled=labelled)
    raise UserError(
        f"{path} matches files that end in {some(kind or 'nothing' for kind in kinds)}: give a pattern of files that "
        f"end in {TAR}, {PARQUET} or {ARROW} alone"
    )


def _files_of_pattern(path: str) -> list[str]:
    if "*" not in path or os.path.exists(path):
        return []
    files = sorted(file for file in glob.glob(path) if os.path.isfile(file))
    if not files:
        raise UserError(f"no file matches SOURCE {path}: check the pattern")
    return files


def _single_file(path: str) -> list[str]:
    """A table, or a tar with labels beside its images; ImageNet's own tars are no such file."""
    is_one = path.endswith((PARQUET, ARROW)) or (os.path.isfile(path) and path.endswith(TAR) and is_webdataset(path))
    return [path] if is_one else []


def _files_of_folder(path: str) -> list[str]:
    """The tars or tables of a folder that holds them and neither images nor folders."""
    if not os.path.isdir(path):
        return []
    saved = saved_files(path)
    if saved is not None:
        return saved
    entries = [entry for entry in entries_of(path) if not entry.name.startswith(".")]
    if any(entry.is_dir() or why_ignored(entry.name) is None for entry in entries):
        return []
    for suffix in (PARQUET, TAR, ARROW):
        files = [entry.path for entry in entries if entry.name.endswith(suffix)]
        if files:
            _check_one_set(path, files, suffix)
            return files
    return []


def _check_one_set(folder: str, files: list[str], suffix: str) -> None:
    """Refuse a folder of several splits' files, and one that lacks some of its N files "of N"."""
    matches = [NUMBERED.fullmatch(os.path.basename(file).removesuffix(suffix)) for file in files]
    numbered = [match for match in matches if match]
    stems = sorted({match[1] for match in numbered})
    if len(stems) > 1:
        raise UserError(
            f"{folder} holds the files of {some(stems)}, which may be several splits: give a pattern in quotes, such "
            f"as '{os.path.join(folder, stems[0])}*{suffix}'"
        )
    wanted = {int(match[3]) for match in numbered if match[3]}
    if len(wanted) == 1 and len(numbered) == len(files) != (total := wanted.pop()):
        raise UserError(
            f"{folder} holds {len(files)} of {total} files {stems[0]}-*-of-*{suffix}: get the others too, or, where "
            f"these are wanted alone, give the pattern '{os.path.join(folder, stems[0])}*{suffix}'"
        )


def _check_classes(source: Source) -> None:
    """Labels that number the classes must do so: test splits are often published with -1 for all."""
    for name, values in source.labels.items():
        limit = len(source.class_names) if name == "label" and source.class_names else None
        if values.dtype.kind == "i" and len(values) and (values.min() < 0 or (limit and values.max() >= limit)):
            bad = int(values.min()) if values.min() < 0 else int(values.max())
            raise UserError(
                f"'{name}' is {bad} for some images of {source.root}, which is no class (a split without labels?): "
                "give --no-labels"
            )


def _seen_instead(ignored: Counter[str]) -> str:
    kinds = ", ".join(f"{count} x {what}" for what, count in ignored.most_common(5))
    return f", only {kinds}: give the images' folder" if ignored else ": it is empty"
