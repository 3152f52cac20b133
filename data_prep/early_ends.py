"""Images whose data ends before their last row, though the file looks whole to its decoder.

Pillow refuses a file that was cut. But where the compressed data inside a whole file ends early (a program had written
ten rows when it died, and another closed the file), PNG's and JPEG's decoders give black or grey pixels for the rest
and say nothing. The decoders of the other formats do say so.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

STRIP = 1 << 20  # pixels that are looked at at a time, so that no copies of a whole large image are made
MOST_SCANS = 500  # of a JPEG; one of a few kilobytes may ask for thousands, each of which goes over all pixels
# What follows a byte ff in a JPEG's compressed data and does not end it: a stuffed zero, restarts, fill bytes.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
SOS, EOI = 0xDA, 0xD9
# Bytes that a decoder which still waits for pixels takes for such, with each marker that it may wait for.
NOISE = bytes(np.random.default_rng(0).integers(1, 255, 64, dtype=np.uint8))
CONTINUATION = NOISE + b"".join(bytes((0xFF, 0xD0 + number)) + NOISE for number in range(8))


def strips_of(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The first row of each part of a loaded image, and the part, of some million pixels."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def ends_early(image: Image.Image, data: bytes) -> bool:
    """Whether pixels of ``image``, which was loaded from ``data``, were made up by its decoder.

    Costs nothing for most images: a second decoding settles it where the last pixel has the colour that is made up,
    and for progressive JPEGs, which may lack detail everywhere.
    """
    if image.format == "PNG":
        return _png_ends_early(image, data)
    if image.format in ("JPEG", "MPO"):
        return _jpeg_ends_early(image, data)
    return False


def _png_ends_early(image: Image.Image, data: bytes) -> bool:
    """Whether the last pixels keep what was there before decoding: the first time zeros, the second time others.

    Of an interlaced image of an odd height the last row may be whole, and the one above not.
    """
    corners = [(image.width - 1, image.height - 1), (image.width - 1, max(0, image.height - 2))]
    first = [_values(image, corner) for corner in corners]
    if all(any(values) for values in first):
        return False
    with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
        again.im = Image.new(
            again.mode, again.size, (1,) * len(again.getbands()) if len(again.getbands()) > 1 else 1
        ).im
        again.load()
        return [_values(again, corner) for corner in corners] != first


def _values(image: Image.Image, place: tuple[int, int]) -> tuple:
    pixel = image.getpixel(place)
    return pixel if isinstance(pixel, tuple) else (pixel,)


def _jpeg_ends_early(image: Image.Image, data: bytes) -> bool:
    """Whether bytes in front of the end of its data change its pixels: a whole image's decoder has no use for them."""
    progressive = bool(image.info.get("progressive"))
    if not progressive and not all(
        value in (127, 128) for value in _values(image, (image.width - 1, image.height - 1))
    ):
        return False
    end = _end_of_jpeg(data)
    if end is None:
        return False
    with Image.open(io.BytesIO(data[:end] + CONTINUATION + data[end:]), formats=["JPEG"]) as again:
        try:
            again.load()
        except OSError:
            return True
        strips = zip(strips_of(again), strips_of(image), strict=True)
        return any(ours.tobytes() != theirs.tobytes() for (_, ours), (_, theirs) in strips)


def has_too_many_scans(image: Image.Image, data: bytes) -> bool:
    """Whether a JPEG asks for more passes over its pixels than any camera or program makes; before it is decoded."""
    # The marker of a scan cannot occur within its data, where a zero is stuffed behind each byte ff.
    return image.format in ("JPEG", "MPO") and data.count(bytes((0xFF, SOS))) > MOST_SCANS


def _end_of_jpeg(data: bytes) -> int | None:
    """The place of the marker that ends the first image; None where it has none."""
    place = 2
    while True:
        found = MARKER.search(data, place)
        if found is None:
            return None
        place, marker = found.end(), data[found.end() - 1]
        if marker == EOI:
            return place - 2
        place += int.from_bytes(data[place : place + 2], "big")
