"""FFCV's writer, less what can hang or lie: a dead worker ends the conversion, and samples are counted.

FFCV's own ``DatasetWriter`` waits for ever for a worker that died, keeps its table of samples in named shared memory
(often 64 MB in a container, and left behind after a kill), and writes an empty allocation table where building it
fails. Here the workers are forked and watched, take spans of samples from a counter instead of a queue, and share
memory without a name, so that nothing is left whatever dies.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import ijepa_ds.data  # noqa: F401  # isort: skip  # before ffcv, which then imports in no time
import cv2
import numpy as np
from ffcv.fields import FloatField, IntField, RGBImageField
from ffcv.memory_allocator import MemoryAllocator
from ffcv.types import ALLOC_TABLE_TYPE
from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, worker_job_indexed_dataset

from data_prep.images import (
    LIMITS,
    EncodedImage,
    Encoding,
    Limits,
    UnreadableImage,
    decode_rgb,
    encode_image,
    quiet_decoding,
)
from data_prep.source import Source
from ijepa_ds.errors import UserError
from ijepa_ds.progress import Progress

FORK = multiprocessing.get_context("fork")  # the workers inherit the source and the shared memory, nothing is pickled
MAX_SPAN = 64  # samples a worker takes at a time
FAILED = -1  # in a worker's report, in place of the sample: the worker cannot go on
# Below PIPE_BUF (4096), so that reports of several workers do not mix and a killed one leaves no half report.
REPORT_BYTES = 2000
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # prctl's "send me this signal when my parent dies", of Linux
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class SharedBytes:
    """Zeroed memory that forked workers share; stands in for ``SharedMemory``, but has no name to be left behind."""

    def __init__(self, size: int) -> None:
        self.buf = mmap.mmap(-1, size)

    def array(self, dtype: np.dtype) -> np.ndarray:
        return np.frombuffer(self.buf, dtype=dtype)


class Spans:
    """Hands out [(destination, source), ...] to the workers until all are given; where FFCV expects a queue."""

    def __init__(self, num_samples: int, num_workers: int) -> None:
        self.num_samples = num_samples
        self.size = max(1, min(MAX_SPAN, num_samples // (8 * num_workers)))
        self.parent = os.getpid()
        self.next_start = FORK.Value(ctypes.c_int64, 0)

    def get(self) -> list[tuple[int, int]] | None:
        if os.getppid() != self.parent:
            os._exit(1)  # the conversion was killed: do not go on without it
        with self.next_start.get_lock():
            start = self.next_start.value
            self.next_start.value = start + self.size
        stop = min(start + self.size, self.num_samples)
        return [(sample, sample) for sample in range(start, stop)] or None


class AllocationTable:
    """Where each sample's bytes are, one row each; FFCV's workers ``put`` their part of it when they are done."""

    def __init__(self, num_samples: int) -> None:
        self.rows = SharedBytes(num_samples * ALLOC_TABLE_TYPE.itemsize).array(ALLOC_TABLE_TYPE)

    def put(self, allocations: list[tuple[int, int, int]]) -> None:
        part = np.array(allocations, dtype=ALLOC_TABLE_TYPE)
        self.rows[part["sample_id"]] = part


class EncodedImageField(RGBImageField):
    """Stores images that are encoded already; an unreadable one (None) takes no space.

    Only workers have it: the header is written with the stock field, as FFCV tells fields by their exact class.
    """

    def encode(self, destination: np.ndarray, image: EncodedImage | None, malloc: Callable) -> None:
        if image is None:
            return
        destination["mode"], destination["height"], destination["width"] = image.mode, image.height, image.width
        destination["data_ptr"], storage = malloc(image.payload.nbytes)
        storage[:] = image.payload


@dataclass
class EncodedSamples:
    """What the workers iterate over: (encoded image, *labels). ``reports`` hears which cannot be read and why."""

    source: Source
    encoding: Encoding
    reports: Connection
    first: int  # number of the first sample in the whole source, where this is a part of it
    limits: Limits
    alone: AbstractContextManager  # a lock of all workers: one large image at a time
    checksums: np.ndarray  # uint32 [num_samples], CRC-32 of what is stored; all workers fill it

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: int) -> tuple:
        try:
            pixels = decode_rgb(self.source.read(sample), self.limits, alone=self.alone)
            image = encode_image(pixels, self.first + sample, self.encoding)
            self.checksums[sample] = zlib.crc32(image.payload.data)
        except (UnreadableImage, OSError) as error:
            send_report(self.reports, sample, getattr(error, "strerror", None) or str(error))
            image = None
        except MemoryError:  # of the file's bytes or the smaller image: decoding says so itself
            send_report(self.reports, sample, "there was not enough memory for it")
            image = None
        return (image, *(values[sample] for values in self.source.labels.values()))


def send_report(reports: Connection, sample: int, text: str) -> None:
    line = " ".join(text.split()) or "no reason given"
    reports.send_bytes(f"{sample} {line}".encode(errors="backslashreplace")[:REPORT_BYTES])


def work(reports: Connection, job: Callable, arguments: tuple) -> None:
    """One worker process. Leaves with a non-zero code after an error, which it reports."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # FFCV's workers wait for one another: they must not outlive us
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    try:
        with quiet_decoding():
            job(*arguments)
    except BaseException as error:
        text = "no space left" if getattr(error, "errno", 0) in NO_SPACE else f"{type(error).__name__}: {error}"
        send_report(reports, FAILED, text)
        os._exit(1)


class BetonWriter(DatasetWriter):
    """Writes one .beton at ``path``; on an error the file is left half written, for the caller to remove.

    ``unreadable`` (sample -> reason) is filled while writing; those samples are left out of the file.
    """

    def __init__(self, path: str, *, labels: dict[str, np.ndarray], max_resolution: int, num_workers: int) -> None:
        kinds = {"i": IntField, "f": FloatField}
        fields = {"image": RGBImageField(), **{name: kinds[values.dtype.kind]() for name, values in labels.items()}}
        page_size = max(4 * MIN_PAGE_SIZE, 1 << (3 * max_resolution**2).bit_length())  # any image fits into a page
        super().__init__(path, fields, page_size=page_size, num_workers=num_workers)
        self.unreadable: dict[int, str] = {}
        self.metadata_sm: Any
        self.kept = np.zeros(0, dtype=bool)  # [num_samples]
        self.rows = np.zeros(0, dtype=self.metadata_type)  # [samples written], FFCV's metadata
        self.checksums = np.zeros(0, dtype=np.uint32)  # [samples written], CRC-32 of each stored image

    def write(self, source: Source, encoding: Encoding, *, limits: Limits = LIMITS, first: int = 0) -> None:
        """Convert ``source``, whose samples are numbered from ``first`` on.

        Raises UserError if a worker dies or nothing is readable, OSError if the disk fails.
        """
        self.reports, reports_end = FORK.Pipe(duplex=False)
        num_threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # before the fork: a child has not the threads of OpenCV's pool, and would wait for them
        try:
            spans = Spans(len(source), self.num_workers)
            checksums = SharedBytes(4 * len(source)).array(np.dtype(np.uint32))
            samples = EncodedSamples(source, encoding, reports_end, first, limits, FORK.Lock(), checksums)
            self._write_common(len(source), spans, worker_job_indexed_dataset, (samples,))
            self.checksums = checksums[self.kept]
        finally:
            cv2.setNumThreads(num_threads)
            self.reports.close()
            reports_end.close()

    def prepare(self) -> None:
        """FFCV's, with memory that has no name in place of the segment that it makes."""
        super().prepare()
        size = self.metadata_sm.size
        self.metadata_sm.close()
        self.metadata_sm.unlink()
        self.metadata_sm = SharedBytes(size)

    def _write_common(
        self, num_samples: int, queue_content: Spans, work_fn: Callable, extra_worker_args: tuple
    ) -> None:
        self.num_samples = num_samples
        self.prepare()
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        done = FORK.Value(ctypes.c_uint64, 0)
        table = AllocationTable(num_samples)
        fields = {**self.fields, "image": EncodedImageField()}
        rows = self.metadata_sm, self.metadata_type
        shared = (queue_content, *rows, fields, allocator, done, table, *extra_worker_args)
        job = (extra_worker_args[0].reports, work_fn, shared)
        processes = [FORK.Process(target=work, args=job, daemon=True) for _ in range(self.num_workers)]
        with interrupts_put_off() as interrupts:
            try:
                start(processes)
                self._watch(processes, done, interrupts)
            finally:
                end(processes)
        # FFCV does not look at how much a write took, and a full disk may take a part of a page without an error.
        num_pages = allocator.next_page_allocated.value
        if num_pages and os.path.getsize(self.fname) < allocator.offset + num_pages * self.page_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._drop_unreadable(table.rows)

    def _watch(self, processes: list, done: Synchronized[int], interrupts: list[int]) -> None:
        """Wait for the workers to end, or for an interrupt, showing progress. Raises as soon as a worker fails."""
        progress = Progress(self.num_samples)
        codes: list[int | None] = [None]
        while None in codes and not interrupts:
            running = [process.sentinel for process in processes if process.exitcode is None]
            wait([*running, self.reports], timeout=0.25)
            codes = [process.exitcode for process in processes]  # looked at once: each failure is seen below
            self._take_reports()  # a worker that failed may have said why
            for code in codes:
                if code:
                    how = f"killed by {signal.Signals(-code).name}" if code < 0 else "stopped"
                    raise UserError(
                        f"a worker process was {how} after about {done.get_obj().value} of {self.num_samples} images "
                        "and nothing was kept: if memory was short, start again with fewer --workers"
                    )
            progress.show(done.get_obj().value)  # without its lock, which a killed worker may hold for ever
        progress.end(done.get_obj().value)

    def _take_reports(self) -> None:
        while self.reports.poll():
            sample, _, text = self.reports.recv_bytes().decode(errors="replace").partition(" ")
            if int(sample) == FAILED and text == "no space left":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if int(sample) == FAILED:
                raise UserError(f"a worker process failed ({text}) and nothing was kept: mend that and start again")
            self.unreadable[int(sample)] = text

    def _drop_unreadable(self, table: np.ndarray) -> None:
        """Move the rows of the good samples together and finish the file. No image moves, so pointers stay valid."""
        self.kept = table["size"] > 0
        num_kept = int(self.kept.sum())
        if num_kept + len(self.unreadable) != self.num_samples:
            raise UserError(
                f"{self.num_samples} images went in, but {num_kept} written and {len(self.unreadable)} unreadable ones "
                "came out: please report this as a bug"
            )
        if not num_kept:
            sample, reason = min(self.unreadable.items())
            none = f"none of the {self.num_samples} images could be read"
            raise UserError(f"{none}, the first (number {sample}) because: {reason}")
        rows = self.metadata_sm.array(self.metadata_type)
        self.rows = rows[self.kept]
        rows[:num_kept] = self.rows
        rows[num_kept:] = np.zeros(1, self.metadata_type)
        good = table[self.kept]
        good["sample_id"] = np.arange(num_kept)
        self.header["num_samples"] = num_kept
        self.finalize([good])  # one array: FFCV makes its table of it without going through a million tuples


@contextmanager
def interrupts_put_off() -> Iterator[list[int]]:
    """Collect the signals that would interrupt, and raise the first again when the block is left.

    An exception from a signal's handler inside ``fork`` would be lost, or lose a child that was just made. Blocking the
    signals is not enough: it concerns one thread, and another may receive them.
    """
    caught: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # signals are its alone
        held = [number for number in INTERRUPTS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in held}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


def start(processes: list) -> None:
    """Fork, with interrupts blocked: a child hears them when it has set handlers of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(processes: list) -> None:
    """Stop what still runs, and wait for it."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        if process.pid is not None:
            process.join(5)
            if process.exitcode is None:
                process.kill()
                process.join()
