"""Is a .beton whole? Its checksum, its tables, and whether every sample decodes.

FFCV's own decoders ignore that a sample does not decode and show the image before it instead, so a damaged file must
be found here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ijepa_ds.data  # noqa: F401  # isort: skip  # before ffcv, which then imports in no time
import numpy as np
from ffcv.libffcv import imdecode
from ffcv.reader import Reader

from data_prep.images import JPG, EncodedImage
from data_prep.sidecar import sidecar_path
from ijepa_ds.errors import UserError, listing
from ijepa_ds.files import checksum, read_at
from ijepa_ds.progress import Progress
from ijepa_ds.validation import load_json

SHOWN = 50  # bad samples that are listed by number
SPAN = 256  # samples that a thread takes at a time


def verify(path: str, *, num_workers: int) -> int:
    """Check ``path``, say what was found, and return the exit code: 0, or 2 where anything is wrong."""
    problems = list(_sidecar_problems(path))
    try:
        reader = Reader(path)
    except (OSError, ValueError, AssertionError, TypeError, LookupError) as error:
        raise UserError(
            f"{path} is not a whole .beton file ({type(error).__name__}: {error}): convert the images again"
        ) from error
    samples = Samples(reader, path)
    bad = samples.decode_all(num_workers=num_workers)
    if bad:
        each = [f"bad sample {sample}: {bad[sample]}" for sample in sorted(bad)]
        problems.append(f"{len(bad)} of {len(samples)} samples are damaged:{listing(each, SHOWN)}")
    for problem in problems:
        print(f"{path}: {problem}")
    if not problems:
        print(f"{path}: all {len(samples):,} samples decode ({', '.join(reader.field_names)})")
    return 2 if problems else 0


def _sidecar_problems(path: str) -> Iterator[str]:
    """Where the file differs from what was written down beside it."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path} to verify: check the path")
    sidecar = sidecar_path(path)
    if not os.path.exists(sidecar):
        print(f"{sidecar} is missing, so the checksum is not compared")
        return
    try:
        expected = load_json(sidecar)
        size, digest = expected["bytes"], expected["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{sidecar} cannot be read ({type(error).__name__}: {error}): restore it, or remove it to do without"
        ) from error
    if os.path.getsize(path) != size:
        yield f"it has {os.path.getsize(path)} bytes, but {size} were written: copy or convert it again"
    elif checksum(path) != digest:
        yield "its checksum is not that of the file that was written: copy or convert it again"


class DamagedSample(Exception):
    """The message says what is wrong with a stored image."""


class Samples:
    """The stored images of a .beton, to be decoded by FFCV's own function, whose result FFCV does not look at."""

    def __init__(self, reader: Reader, path: str) -> None:
        self.path = path
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
        if not height or not width:
            raise DamagedSample("it has no size")
        if mode != JPG and size != 3 * height * width:
            raise DamagedSample(f"{size} bytes are not {height} x {width} pixels")
        return EncodedImage(mode, height, width, payload)
