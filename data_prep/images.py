"""One image: the bytes of a file -> upright 8-bit RGB -> the size wanted -> the bytes that go into a .beton.

Shapes: H, W height and width in pixels.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from data_prep.early_ends import MOST_SCANS, ends_early, has_too_many_scans, strips_of

# Only formats that are images and nothing else: Pillow would start another program for EPS, for instance.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
WRITE_MODES = ("jpg", "raw", "proportion", "smart")
JPG, RAW = 0, 1  # FFCV's numbers for how an image is stored
EXIF_ORIENTATION, BITS_PER_SAMPLE = 0x0112, 0x0102  # tags


class UnreadableImage(Exception):
    """The message says why this file does not give a whole image."""


class EncodedImage(NamedTuple):
    """An image as FFCV stores it."""

    mode: int
    height: int
    width: int
    payload: np.ndarray  # uint8 [bytes]


@dataclass(frozen=True)
class Encoding:
    """How images are stored. Sizes in pixels, ``smart_threshold`` in bytes of the raw image."""

    max_resolution: int = 512
    resize_short: int | None = None
    write_mode: str = "jpg"
    jpeg_quality: int = 90
    compress_probability: float = 0.5
    smart_threshold: int | None = None


@dataclass(frozen=True)
class Limits:
    """What decoding an image may take, judged by its header before any pixel is decoded.

    ``pixels``: by default Pillow's ``MAX_IMAGE_PIXELS``, from which on it warns of a "decompression bomb".
    ``memory``: bytes, of the decoder, its pixels and ours together; as :func:`memory_needed` estimates it.
    """

    pixels: int = 89_478_485
    memory: int = 2 << 30


LIMITS = Limits()
# Bytes for each pixel that decoders take beside the pixels that they give: what was measured, and some more.
DECODER_BYTES = {"JPEG": 6, "MPO": 6, "WEBP": 12, "AVIF": 12, "JPEG2000": 20, "TIFF": 4, "PPM": 4}
LARGE = 256 << 20  # bytes; images that need more are decoded one at a time, whatever the number of workers


@contextlib.contextmanager
def quiet_decoding() -> Iterator[None]:
    """Without Pillow's warnings: what they tell (odd EXIF, many pixels) is harmless or raised as an error by us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode_rgb(data: bytes, limits: Limits = LIMITS, *, alone: AbstractContextManager | None = None) -> np.ndarray:
    """The first image in ``data`` as RGB uint8 [H, W, 3], turned upright as its EXIF says, transparency over white.

    ``alone`` is entered while an image is decoded that needs more than ``LARGE``.

    Raises UnreadableImage for anything that does not decode to its end, or is beyond ``limits``.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    if not Image.OPEN:
        Image.init()
    try:
        with _bomb_limit(limits), Image.open(io.BytesIO(data), formats=_formats()) as image:
            needed = memory_needed(image)
            if needed > limits.memory:
                raise UnreadableImage(
                    f"{_size(image)} pixels of this kind need about {needed >> 20:,} MiB to decode, more than "
                    f"--max-memory {limits.memory >> 20}"
                )
            with alone if alone and needed > LARGE else contextlib.nullcontext():
                return _decoded(image, data)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("not an image in a known format") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"more than {limits.pixels:,} pixels (--max-pixels): {error}") from error
    except MemoryError as error:
        raise UnreadableImage("there was not enough memory to decode it") from error
    except Exception as error:  # Pillow's decoders raise nearly every type for a damaged file
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def memory_needed(image: Image.Image) -> int:
    """About how many bytes decoding takes for an image of which only the header was read."""
    pillow = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    ours = 3 + 3  # RGB, and once more if it is turned
    return image.width * image.height * (pillow + DECODER_BYTES.get(image.format or "", 0) + ours)


@contextlib.contextmanager
def _bomb_limit(limits: Limits) -> Iterator[None]:
    """Let Pillow refuse at our limit: it looks before some decoders are made, which take memory for all pixels."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limits.pixels / 2  # type: ignore[assignment]  # it raises above twice its number
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _formats() -> list[str]:
    return [name for name in FORMATS if name in Image.OPEN]


def _size(image: Image.Image) -> str:
    return f"{image.width:,} x {image.height:,}"


def _decoded(image: Image.Image, data: bytes) -> np.ndarray:
    if has_too_many_scans(image, data):
        raise UnreadableImage(f"its pixels come in more than {MOST_SCANS} scans, as no program writes them")
    image.load()
    if ends_early(image, data):
        raise UnreadableImage(f"its data ends before the last of its {_size(image)} pixels")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    wide = _is_wide(image)
    white = _white(image) if wide else 0
    for top, strip in strips_of(image):
        pixels[top : top + strip.height] = _grey_8bit(strip, white)[:, :, None] if wide else _rgb(strip)
    orientation = _orientation(image)
    image.close()
    return np.ascontiguousarray(_upright(pixels, orientation))


def _rgb(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8 of an image of any mode of 8 bits, not yet turned upright."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return np.asarray(image.convert("RGB"))


def _is_wide(image: Image.Image) -> bool:
    """Whether grey values have more than 8 bits; Pillow's own conversion clips them at 255."""
    return image.mode.startswith("I") or image.mode == "F"


def _white(image: Image.Image) -> int:
    """The grey value that means white in an image of more than 8 bits."""
    # Netpbm and PNG say that 65535 is white. The range of other 32-bit and of float images is anyone's guess.
    if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in ("PPM", "PNG")):
        raise UnreadableImage(
            f"grey values of the type '{image.mode}' have no defined white: convert the file to 8 or 16 bits"
        )
    bits = (
        image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if isinstance(image, TiffImageFile) else 16
    )  # 12 from some cameras
    return (1 << bits) - 1


def _grey_8bit(image: Image.Image, white: int) -> np.ndarray:
    """[H, W] uint8 of a grey image with more than 8 bits, scaled."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((np.minimum(values, white) * 255 + white // 2) // white).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8. Asked for after loading: Pillow turns a TIFF itself and removes the tag."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF beside good pixels
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation; unknown values leave the image as it is."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def target_size(height: int, width: int, *, bound: int, short_bound: int | None) -> tuple[int, int]:
    """(height, width) to store: shorter side at most ``short_bound``, longer side at most ``bound``.

    Never larger than it was.
    """
    short, long = sorted((height, width))
    # A fraction, so that the bound side gets exactly its size: a factor in floating point loses a pixel of it at times.
    target, side = 1, 1
    if short_bound is not None and short > short_bound:
        target, side = short_bound, short
    if long * target > bound * side:
        target, side = bound, long
    return max(1, round(height * target / side)), max(1, round(width * target / side))


def encode_image(pixels: np.ndarray, sample: int, encoding: Encoding) -> EncodedImage:
    """Store RGB uint8 [H, W, 3]. What ``proportion`` does depends on ``sample``, its position in the source, alone."""
    height, width = target_size(*pixels.shape[:2], bound=encoding.max_resolution, short_bound=encoding.resize_short)
    if (height, width) != pixels.shape[:2]:
        try:
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)  # as FFCV's RGBImageField
        except cv2.error as error:
            before = f"{pixels.shape[1]:,} x {pixels.shape[0]:,}"
            raise UnreadableImage(f"OpenCV cannot shrink {before} to {width} x {height} pixels") from error
    if _as_jpeg(pixels, sample, encoding):
        quality = [int(cv2.IMWRITE_JPEG_QUALITY), encoding.jpeg_quality]
        done, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), quality)
        if not done:
            raise UnreadableImage("OpenCV could not encode it as JPEG")
        return EncodedImage(JPG, height, width, jpeg.reshape(-1))
    return EncodedImage(RAW, height, width, np.ascontiguousarray(pixels).reshape(-1))


def _as_jpeg(pixels: np.ndarray, sample: int, encoding: Encoding) -> bool:
    if encoding.write_mode == "smart":
        assert encoding.smart_threshold is not None  # the command line demands it
        return pixels.nbytes > encoding.smart_threshold
    if encoding.write_mode == "proportion":
        return uniform(sample) < encoding.compress_probability
    return encoding.write_mode == "jpg"


def uniform(sample: int) -> float:
    """A number in [0, 1) that depends on ``sample`` alone (one step of splitmix64)."""
    from ijepa_ds.random_streams import GOLDEN, mix  # brings numba, a second for which other modes need not wait

    return int(mix(np.uint64((sample + 1) * int(GOLDEN) % 2**64))) / 2**64
