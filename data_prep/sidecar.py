"""OUT.beton.json, the note on what a .beton holds; and how both files get their names only when they are complete."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from images import Encoding
from sources import Source

if TYPE_CHECKING:
    from beton_writer import BetonWriter

SIDECAR_VERSION = 1


def sidecar_path(beton: str) -> str:
    return beton + ".json"


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def describe(writer: BetonWriter, source: Source, encoding: Encoding, *, given_source: str, limit: int | None) -> dict:
    """What the note says about the file that ``writer`` has finished; docs/data.md explains the keys."""
    images = writer.rows[writer.metadata_type.names[0]]
    labels = {name: values[writer.kept] for name, values in source.labels.items()}
    counts = np.bincount(labels["label"], minlength=len(source.class_names)).tolist() if source.class_names else []
    return {
        "version": SIDECAR_VERSION,
        "source": given_source,
        "kind": source.kind,
        "settings": {**asdict(encoding), "limit": limit},
        "num_samples": len(images),
        "label_fields": {name: "int" if values.dtype.kind == "i" else "float" for name, values in labels.items()},
        "class_names": source.class_names,
        "samples_per_class": counts,
        "image_size": {side: [int(images[side].min()), int(images[side].max())] for side in ("height", "width")},
        "skipped": [{"file": source.names[sample], "reason": why} for sample, why in sorted(writer.unreadable.items())],
        "ignored": dict(source.ignored),
        "ffcv": importlib.metadata.version("ffcv"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "bytes": os.path.getsize(writer.fname),
        "sha256": sha256_of(writer.fname),
    }


@contextlib.contextmanager
def temporary_beside(path: str) -> Iterator[str]:
    """A name in ``path``'s folder, so that renaming it is atomic. The file is removed unless it was renamed."""
    temporary = f"{path}.partial-{os.getpid()}"
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def publish(beton: str, temporary: str, note: dict) -> None:
    """Give the finished ``temporary`` the name ``beton`` and write its note.

    A crash in between leaves a .beton without a note, never with another file's.
    """
    sidecar = sidecar_path(beton)
    with temporary_beside(sidecar) as temporary_note:
        with open(temporary_note, "w", encoding="utf-8") as file:
            json.dump(note, file, indent=1)
        _sync(temporary)
        _sync(temporary_note)
        with contextlib.suppress(FileNotFoundError):
            os.remove(sidecar)
        os.replace(temporary, beton)
        os.replace(temporary_note, sidecar)
    _sync(os.path.dirname(os.path.abspath(beton)))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
