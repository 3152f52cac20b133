"""Small .beton files for every test that reads images. They are written here, in this process, by FFCV's own parts."""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable, Sequence
from multiprocessing import Value
from pathlib import Path

import numpy as np
import pytest
from made_up_images import smooth_image

# Started in the background of a script, everything here would ignore an interrupt, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # and a hang-up under nohup: ignore it, but do not pass that on
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def write_beton(
    path: Path,
    num_images: int = 16,
    size: tuple[int, int] | Sequence[tuple[int, int]] = (32, 32),
    labels: dict[str, Sequence] | None = None,
    *,
    images: Sequence[np.ndarray] | None = None,
    write_mode: str = "jpg",
    image_field: str = "image",
    **field_options,
) -> Path:
    """Write a .beton of ``num_images`` smooth images (or of ``images``) and return its path.

    ``size``: (rows, columns), or a list of them that is used in turn. ``labels``: field -> one number an image; the
    first one's type decides whether FFCV stores integers or floats. ``write_mode`` and ``field_options`` are those of
    FFCV's RGBImageField. No worker processes: this takes milliseconds, and nothing is forked beside torch's threads.
    """
    from ffcv.fields import FloatField, IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, worker_job_indexed_dataset

    if images is None:
        sizes = [size] if isinstance(size[0], int) else list(size)
        images = [smooth_image(index, sizes[index % len(sizes)]) for index in range(num_images)]
    labels = labels or {}
    fields = {image_field: RGBImageField(write_mode=write_mode, **field_options)}
    for name, values in labels.items():
        fields[name] = FloatField() if isinstance(values[0], float | np.floating) else IntField()
    samples = list(zip(images, *labels.values(), strict=True))

    writer = DatasetWriter(str(path), fields, page_size=MIN_PAGE_SIZE, num_workers=1)
    writer.num_samples = len(samples)
    writer.prepare()
    work, allocations = queue.Queue(), queue.Queue()
    work.put([(sample, sample) for sample in range(len(samples))])
    work.put(None)
    allocator = MemoryAllocator(str(path), writer.data_region_start, MIN_PAGE_SIZE)
    shared = writer.metadata_sm, writer.metadata_type, fields, allocator, Value("Q", 0), allocations
    worker_job_indexed_dataset(work, *shared, samples)
    writer.finalize(allocations.get())
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    return Path(path)


@pytest.fixture(scope="session")
def make_beton() -> Callable[..., Path]:
    """:func:`write_beton`, for tests that need a file of their own: ``make_beton(path, num_images, size, labels)``."""
    return write_beton


@pytest.fixture(scope="session")
def beton(tmp_path_factory) -> Path:
    """28 images of four sizes, some as JPEGs and some raw, with a class ``label`` and a float ``distance``."""
    return write_beton(
        tmp_path_factory.mktemp("beton") / "mixed.beton",
        28,
        [(40, 56), (64, 48), (24, 36), (30, 30)],
        {"label": [index % 5 for index in range(28)], "distance": [index / 4 for index in range(28)]},
        write_mode="smart",
        smart_threshold=5000,  # bytes: the two larger sizes become JPEGs
        jpeg_quality=95,
    )
