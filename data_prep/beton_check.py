"""Is a .beton whole? Its checksum, its tables, and whether every sample decodes.

FFCV's own decoders ignore that a sample does not decode and show the image before it instead, so a damaged file must
be found here.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ijepa_ds.data  # noqa: F401  # isort: skip  # before ffcv, which then imports in no time
import numpy as np
from ffcv.libffcv import imdecode
from ffcv.reader import Reader

from data_prep.images import JPG, EncodedImage
from data_prep.sidecar import sidecar_path
from ijepa_ds.data.beton_checksums import DamagedChecksums, checksums_of, read_checksums, tables_problem
from ijepa_ds.data.file_set import read_note
from ijepa_ds.errors import UserError, listing
from ijepa_ds.files import checksum, read_at
from ijepa_ds.progress import Progress

SHOWN = 50  # bad samples that are listed by number
SPAN = 256  # samples that a thread takes at a time


def verify(path: str, *, num_workers: int) -> int:
    """Check ``path``, say what was found, and return the exit code: 0, or 2 where anything is wrong."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path} to verify: check the path")
    problems = list(_file_problems(path))
    try:
        reader = Reader(path)
    except (OSError, ValueError, AssertionError, TypeError, LookupError, MemoryError, OverflowError) as error:
        raise UserError(
            f"{path} is not a whole .beton file ({type(error).__name__}: {error}): convert the images again"
        ) from error
    if damaged_tables := tables_problem(reader, path):  # nothing can be told of images whose places are not known
        print(f"{path}: {damaged_tables}: copy or convert it again")
        return 2
    checksums = None
    try:
        checksums = read_checksums(path, int(reader.num_samples))
    except DamagedChecksums as damaged:
        problems.append(f"{damaged}, so its images cannot be compared one by one: copy that file again")
    samples = Samples(reader, path, checksums)
    bad = samples.decode_all(num_workers=num_workers)
    if bad:
        each = [f"bad sample {sample}: {bad[sample]}" for sample in sorted(bad)]
        problems.append(f"{len(bad)} of {len(samples)} samples are damaged:{listing(each, SHOWN)}")
    for problem in problems:
        print(f"{path}: {problem}")
    if not problems:
        compared = "are as they were written and decode" if checksums is not None else "decode"
        print(f"{path}: all {len(samples):,} samples {compared} ({', '.join(reader.field_names)})")
    return 2 if problems else 0


def _file_problems(path: str) -> Iterator[str]:
    """Where the file as a whole differs from what its note says, and, printed, what cannot be compared."""
    sidecar, note = sidecar_path(path), read_note(path)
    if not note:
        print(f"{sidecar} is missing, so checksums are not compared: a change that still decodes is not seen")
        return
    if not checksums_of(note):
        print(f"{sidecar} is of an earlier version, without a checksum of each image: only the whole is compared")
    size, digest = note.get("bytes"), note.get("sha256")
    if size is None or digest is None:
        raise UserError(f"{sidecar} lacks the size or the checksum: restore it, or remove it to do without")
    if os.path.getsize(path) != size:
        yield f"it has {os.path.getsize(path)} bytes, but {size} were written: copy or convert it again"
    elif checksum(path) != digest:
        yield "its checksum is not that of the file that was written: copy or convert it again"


class DamagedSample(Exception):
    """The message says what is wrong with a stored image."""


class Samples:
    """The stored images of a .beton, to be decoded by FFCV's own function, whose result FFCV does not look at."""

    def __init__(self, reader: Reader, path: str, checksums: np.ndarray | None = None) -> None:
        self.path, self.checksums = path, checksums  # uint32 [num_samples], where they are known
        images = [name for name, handler in reader.handlers.items() if type(handler).__name__ == "RGBImageField"]
        if not images or not reader.num_samples:
            raise UserError(f"{path} holds no images: convert them again")
        self.rows = reader.metadata[reader.metadata.dtype.names[list(reader.handlers).index(images[0])]]
        if len(self.rows) != reader.num_samples:
            raise UserError(
                f"{path} ends before its table of {reader.num_samples} samples does: copy or convert it again"
            )
        order = np.argsort(reader.alloc_table["ptr"])
        self.pointers, self.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]

    def __len__(self) -> int:
        return len(self.rows)

    def decode_all(self, *, num_workers: int) -> dict[int, str]:
        """Sample -> what is wrong with it. Threads suffice: reading and decoding both let go of the interpreter."""
        bad: dict[int, str] = {}
        progress, count = Progress(len(self)), 0
        descriptor = os.open(self.path, os.O_RDONLY)
        pool = ThreadPoolExecutor(num_workers)
        try:
            spans = [range(start, min(start + SPAN, len(self))) for start in range(0, len(self), SPAN)]
            for span, problems in zip(spans, pool.map(partial(self._decode_span, descriptor), spans), strict=True):
                bad |= problems
                count += len(span)
                progress.show(count)
            progress.end(count)
        finally:
            pool.shutdown(cancel_futures=True)
            os.close(descriptor)
        return bad

    def _decode_span(self, descriptor: int, span: range) -> dict[int, str]:
        problems = {sample: self._problem(descriptor, sample) for sample in span}
        return {sample: problem for sample, problem in problems.items() if problem}

    def _problem(self, descriptor: int, sample: int) -> str:
        try:
            stored = self.stored(descriptor, sample)
        except DamagedSample as damaged:
            return str(damaged)
        if stored.mode != JPG:
            return ""
        size = stored.height, stored.width
        pixels = np.empty((*size, 3), dtype=np.uint8)
        failed = imdecode(stored.payload, pixels, *size, *size, 0, 0, 1, 1, False, False)
        return "its JPEG data is damaged" if failed else ""

    def stored(self, descriptor: int, sample: int) -> EncodedImage:
        """A sample as the file of ``descriptor`` has it, not decoded. Raises DamagedSample."""
        row = self.rows[sample]
        mode, height, width, pointer = (int(row[name]) for name in ("mode", "height", "width", "data_ptr"))
        place = int(np.searchsorted(self.pointers, pointer))
        if place == len(self.pointers) or int(self.pointers[place]) != pointer:
            raise DamagedSample("the allocation table does not have it")
        size = int(self.sizes[place])
        payload = np.frombuffer(read_at(descriptor, size, pointer), dtype=np.uint8)
        if len(payload) != size:
            raise DamagedSample("the file ends before it does")
        if self.checksums is not None and zlib.crc32(payload.data) != int(self.checksums[sample]):
            raise DamagedSample("its bytes are not what was written")
        if not height or not width:
            raise DamagedSample("it has no size")
        if mode != JPG and size != 3 * height * width:
            raise DamagedSample(f"{size} bytes are not {height} x {width} pixels")
        return EncodedImage(mode, height, width, payload)
