"""What lies beside a .beton, and how all these files get their names only when they are complete.

OUT.beton.json is the note on what it holds, OUT.beton.names.gz has the file that each sample came from, and
OUT.beton.crc32 a checksum of each stored image.
"""

from __future__ import annotations

import datetime
import gzip
import importlib.metadata
import json
import os
import zlib
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.images import Encoding, Limits
from data_prep.parts import Part
from data_prep.source import Source
from ijepa_ds.data.beton_checksums import IMAGE_CHECKSUM, checksums_path, tables_checksum
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
    limits: Limits,
    *,
    given_source: str,
    limit: int | None,
    part: Part | None,
) -> dict:
    """What the note says about the file that ``writer`` has finished; docs/data.md explains the keys."""
    from ffcv.reader import Reader  # brings torch, for which the command's mistakes need not wait

    images = writer.rows[writer.metadata_type.names[0]]
    labels = {name: values[writer.kept] for name, values in source.labels.items()}
    counts = np.bincount(labels["label"], minlength=len(source.class_names)).tolist() if source.class_names else []
    return {
        "version": SIDECAR_VERSION,
        "source": given_source,
        "kind": source.kind,
        "settings": {**asdict(encoding), "limit": limit},
        "limits": asdict(limits),  # apart from the settings, which must be the same for all parts of a set
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
        "checksums": {
            "tables": tables_checksum(Reader(writer.fname)),
            "images": f"{zlib.crc32(packed_checksums(writer)):08x}",
        },
    }


def packed_names(writer: BetonWriter, source: Source) -> bytes:
    """The names file: gzip, line k is the path of sample k below SOURCE (4 MB for ImageNet's train split).

    Few-shot split lists name files, so the names are needed to find their samples. A line break within a name is
    written as a space, so that lines stay in step; bytes that are not UTF-8 stay as they are.
    """
    lines = (" ".join(source.names[int(sample)].splitlines()) for sample in np.flatnonzero(writer.kept))
    # Without a time, so that the same images make the same file.
    return gzip.compress(b"".join(os.fsencode(line) + b"\n" for line in lines), mtime=0)


def packed_checksums(writer: BetonWriter) -> bytes:
    """What OUT.beton.crc32 holds."""
    return writer.checksums.astype(IMAGE_CHECKSUM).tobytes()


def publish(beton: str, temporary: Path, note: dict, names: bytes, checksums: bytes) -> None:
    """Give the finished ``temporary`` the name ``beton`` and write its note, names and checksums beside it.

    A crash in between leaves a .beton without some of these, never with another file's.
    """
    contents = {
        names_path(beton): names,
        checksums_path(beton): checksums,
        sidecar_path(beton): json.dumps(note, indent=1).encode(),
    }
    with ExitStack() as stack:
        for path, content in contents.items():
            new = stack.enter_context(replacing(path))
            new.write_bytes(content)
            sync(new)  # a full disk is noticed before the .beton has its name
        sync(temporary)
        for outdated in contents:
            Path(outdated).unlink(missing_ok=True)
        os.replace(temporary, beton)
