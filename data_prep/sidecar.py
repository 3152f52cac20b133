"""OUT.beton.json, the note on what a .beton holds, and OUT.beton.names.gz, the file that each sample came from.

How all three files get their names only when they are complete.
"""

from __future__ import annotations

import datetime
import gzip
import importlib.metadata
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.images import Encoding
from data_prep.parts import Part
from data_prep.source import Source
from ijepa_ds.files import checksum, replacing, sync

if TYPE_CHECKING:
    from data_prep.beton_writer import BetonWriter

SIDECAR_VERSION = 1


def sidecar_path(beton: str) -> str:
    return beton + ".json"


def names_path(beton: str) -> str:
    return beton + ".names.gz"


def describe(
    writer: BetonWriter,
    source: Source,
    encoding: Encoding,
    *,
    given_source: str,
    limit: int | None,
    part: Part | None,
) -> dict:
    """What the note says about the file that ``writer`` has finished; docs/data.md explains the keys."""
    images = writer.rows[writer.metadata_type.names[0]]
    labels = {name: values[writer.kept] for name, values in source.labels.items()}
    counts = np.bincount(labels["label"], minlength=len(source.class_names)).tolist() if source.class_names else []
    return {
        "version": SIDECAR_VERSION,
        "source": given_source,
        "kind": source.kind,
        "settings": {**asdict(encoding), "limit": limit},
        **({"shard": asdict(part)} if part else {}),
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
        "sha256": checksum(writer.fname),
    }


def packed_names(writer: BetonWriter, source: Source) -> bytes:
    """The names file: gzip, line k is the path of sample k below SOURCE (4 MB for ImageNet's train split).

    Few-shot split lists name files, so the names are needed to find their samples. A line break within a name is
    written as a space, so that lines stay in step; bytes that are not UTF-8 stay as they are.
    """
    lines = (" ".join(source.names[int(sample)].splitlines()) for sample in np.flatnonzero(writer.kept))
    # Without a time, so that the same images make the same file.
    return gzip.compress(b"".join(os.fsencode(line) + b"\n" for line in lines), mtime=0)


def publish(beton: str, temporary: Path, note: dict, names: bytes) -> None:
    """Give the finished ``temporary`` the name ``beton`` and write its note and its names beside it.

    A crash in between leaves a .beton without a note or names, never with another file's.
    """
    with replacing(names_path(beton)) as new_names, replacing(sidecar_path(beton)) as new_note:
        for path, content in ((new_names, names), (new_note, json.dumps(note, indent=1).encode())):
            path.write_bytes(content)
            sync(path)  # a full disk is noticed before the .beton has its name
        sync(temporary)
        for outdated in (names_path(beton), sidecar_path(beton)):
            Path(outdated).unlink(missing_ok=True)
        os.replace(temporary, beton)
