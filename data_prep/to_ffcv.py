"""Images -> one .beton file that FFCV reads, with a note (OUT.beton.json) of what is in it and the files' names.

    python data_prep/to_ffcv.py SOURCE OUT.beton [--max-resolution 512] [--jpeg-quality 90] [--workers N] ...
    python data_prep/to_ffcv.py --verify FILE.beton
    python data_prep/to_ffcv.py FILE.beton --unpack FOLDER

SOURCE is a folder of class folders or of images, one of ImageNet's tar files, WebDataset tars, Parquet or Arrow files,
or a folder in CLEVR's layout: see docs/data.md.
The file appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs in a checkout that was not installed
from data_prep.images import (
    LIMITS,
    WRITE_MODES,
    Encoding,
    Limits,
    UnreadableImage,
    decode_rgb,
    encode_image,
    quiet_decoding,
)
from data_prep.parts import Part, parse_part, take_part
from data_prep.sidecar import describe, packed_checksums, packed_names, publish
from data_prep.source import Source
from data_prep.sources import open_source
from ijepa_ds.errors import UserError, hide_finalizers_of_numba, listing, run_command
from ijepa_ds.files import shard_path, temporary_beside

MAX_RESOLUTION = 8192  # of either side; an image must fit into one page of memory per worker
NUM_PROBES = 16  # images that are encoded before the start, to see whether the disk has room
SHOWN = 50  # unreadable files that are printed; the note beside the .beton has all of them


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where Ctrl-C would be, so that both clean up in one way."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and fill in what depends on the machine or on another option."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="to_ffcv.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="folder, tar, table, or a quoted pattern of files")
    add("out", nargs="?", metavar="OUT.beton")
    add("--verify", metavar="FILE.beton", help="check a .beton, or a pattern of several: checksums, samples")
    add("--unpack", metavar="FOLDER", help="write the images and labels of SOURCE, a .beton, back into a new folder")
    bound = "bound of the longer side (default 512, or 2 x --resize-short)"
    add("--max-resolution", type=int, metavar="PIXELS", help=bound)
    short = "shrink so that the shorter side has this (default: no)"
    add("--resize-short", type=int, metavar="PIXELS", help=short)
    add("--write-mode", choices=WRITE_MODES, default="jpg", help="how pixels are stored (default jpg)")
    add("--jpeg-quality", type=int, default=90, metavar="1-100", help="default 90")
    add("--compress-probability", type=float, metavar="P", help="proportion: share stored as JPEG (default 0.5)")
    add("--smart-threshold", type=int, metavar="BYTES", help="smart: raw images above this are stored as JPEG")
    add("--workers", type=int, metavar="N", help="processes (default: the cores that this process may use)")
    add("--limit", type=int, metavar="N", help="only N images, evenly spread over the source")
    add("--shard", metavar="I/N", help="convert the I-th of N parts, into OUT-I-of-N.beton: one on each of N machines")
    add("--split", help="CLEVR: which split")
    kit = "labels of ImageNet's validation images: ILSVRC2012_devkit_t12.tar.gz or its folder"
    add("--devkit", metavar="PATH", help=kit)
    add("--no-labels", action="store_true", help="write no labels; a folder's sub-folders are not classes then")
    skip = "leave out files that cannot be read instead of failing at the end"
    add("--skip-unreadable", action="store_true", help=skip)
    most = f"images of more are unreadable, judged by their headers (default {LIMITS.pixels:,}, Pillow's own bound)"
    add("--max-pixels", type=int, default=LIMITS.pixels, metavar="N", help=most)
    memory = "the same for images that need more memory to decode, about (default %(default)s)"
    add("--max-memory", type=int, default=LIMITS.memory >> 20, metavar="MIB", help=memory)
    add("--force", action="store_true", help="replace OUT.beton where it exists")
    arguments = parser.parse_args(argv)
    if arguments.workers is None:
        arguments.workers = len(os.sched_getaffinity(0))
    if arguments.max_resolution is None:
        arguments.max_resolution = min(2 * (arguments.resize_short or 256), MAX_RESOLUTION)
    if arguments.shard is not None:
        arguments.shard = parse_part(arguments.shard)
        if arguments.out is not None and arguments.out.endswith(".beton"):
            arguments.out = shard_path(arguments.out, *arguments.shard)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for values and combinations that cannot be meant."""
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}: give 1 or more")
    if arguments.verify is not None and (arguments.source is not None or arguments.unpack is not None):
        raise UserError("--verify checks a finished file: give either --verify FILE.beton, or SOURCE and OUT.beton")
    if arguments.unpack is not None and (arguments.source is None or arguments.out is not None):
        raise UserError("--unpack writes into its FOLDER: give FILE.beton --unpack FOLDER, and no OUT.beton")
    if arguments.verify is not None or arguments.unpack is not None:
        return
    if arguments.out is None:
        raise UserError(
            "SOURCE and OUT.beton are both needed: to_ffcv.py SOURCE OUT.beton, or --verify FILE.beton (see --help)"
        )
    _check_range(arguments)
    if (arguments.smart_threshold is None) != (arguments.write_mode != "smart"):
        raise UserError("--write-mode smart and --smart-threshold BYTES go together: give both or neither")
    if arguments.compress_probability is not None and arguments.write_mode != "proportion":
        raise UserError("--compress-probability is for --write-mode proportion: add that, or leave it out")
    if arguments.devkit is not None and arguments.no_labels:
        raise UserError("--devkit gives labels and --no-labels drops them: leave one of them out")
    _check_out(arguments.out, force=arguments.force)


def _check_out(out: str, *, force: bool) -> None:
    if not out.endswith(".beton"):
        raise UserError(f"OUT is {out}: give a name that ends in .beton (the order is SOURCE OUT.beton)")
    if os.path.isdir(out):
        raise UserError(f"{out} is a folder: give another name for OUT.beton")
    if os.path.exists(out) and not force:
        raise UserError(f"{out} exists already: give another name, or --force to replace it")


def _check_range(arguments: argparse.Namespace) -> None:
    limits = {
        "max_resolution": (1, MAX_RESOLUTION),
        "resize_short": (1, MAX_RESOLUTION),
        "jpeg_quality": (1, 100),
        "compress_probability": (0, 1),
        "smart_threshold": (0, None),
        "limit": (1, None),
        "max_pixels": (1, None),
        "max_memory": (1, None),
    }
    for name, (low, high) in limits.items():
        value = getattr(arguments, name)
        # Written so that a nan is refused too.
        if value is not None and not (low <= value and (high is None or value <= high)):
            wanted = f"{low} or more" if high is None else f"{low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} is {value}: give {wanted}")
    if arguments.resize_short is not None and arguments.resize_short > arguments.max_resolution:
        raise UserError(
            f"--resize-short {arguments.resize_short} is more than --max-resolution {arguments.max_resolution}, "
            "which bounds the longer side: raise the latter"
        )


def convert(arguments: argparse.Namespace) -> int:
    """Convert SOURCE into OUT.beton and describe it in OUT.beton.json. Returns the exit code."""
    source, part = choose_samples(arguments), None
    if arguments.shard is not None:
        source, part = take_part(source, *arguments.shard)
        print(f"--shard {part.index}/{part.of}: {len(source):,} of them, from number {part.first:,} on")
    encoding = Encoding(
        max_resolution=arguments.max_resolution,
        resize_short=arguments.resize_short,
        write_mode=arguments.write_mode,
        jpeg_quality=arguments.jpeg_quality,
        compress_probability=0.5 if arguments.compress_probability is None else arguments.compress_probability,
        smart_threshold=arguments.smart_threshold,
    )
    started = time.monotonic()
    try:
        num_samples = write_beton(arguments, source, encoding, part)
    except OSError as error:
        why = error.strerror or str(error)
        message = f"cannot write {arguments.out} ({why}): make room, mend that or choose another place"
        raise UserError(message) from error
    size, seconds = os.path.getsize(arguments.out), time.monotonic() - started
    print(f"{arguments.out}: {num_samples:,} samples, {gigabytes(size)}, {seconds:,.1f} s")
    return 0


def choose_samples(arguments: argparse.Namespace) -> Source:
    """Open SOURCE, say what it is, and take from it what --limit asks for."""
    given = arguments.source
    try:
        source = open_source(given, split=arguments.split, devkit=arguments.devkit, labelled=not arguments.no_labels)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or given} ({error.strerror or error}): mend that") from error
    classes = f", {len(source.class_names):,} classes" if source.class_names else ""
    print(f"{given}: {source.kind}, {len(source):,} images{classes}, fields: {', '.join(['image', *source.labels])}")
    if source.ignored:
        ignored = sorted(source.ignored.items())
        print("ignored: " + ", ".join(f"{count:,} x {printable(what)}" for what, count in ignored))
    if source.class_names:
        counts = np.bincount(source.labels["label"], minlength=len(source.class_names))
        empty = [source.class_names[label] for label in np.flatnonzero(counts == 0)]
        if empty:
            first = printable(empty[0])
            print(f"note: {len(empty)} classes have no images but keep their number, the first is {first}")
    if arguments.limit is not None and arguments.limit < len(source):
        source = source.take(np.arange(arguments.limit, dtype=np.int64) * len(source) // arguments.limit)
        print(f"--limit: {len(source):,} of them, evenly spread")
    return source


def write_beton(arguments: argparse.Namespace, source: Source, encoding: Encoding, part: Part | None) -> int:
    """Write OUT.beton and its note; returns how many samples it has. Raises OSError where it cannot be written."""
    folder = os.path.dirname(os.path.abspath(arguments.out))
    os.makedirs(folder, exist_ok=True)
    limits = Limits(arguments.max_pixels, arguments.max_memory << 20)
    check_space(source, encoding, limits, folder)
    # FFCV brings torch and numba, seconds of import: after the mistakes are found.
    from data_prep.beton_writer import BetonWriter

    with temporary_beside(arguments.out) as temporary:
        workers, resolution = min(arguments.workers, len(source)), encoding.max_resolution
        writer = BetonWriter(str(temporary), labels=source.labels, max_resolution=resolution, num_workers=workers)
        writer.write(source, encoding, limits=limits, first=part.first if part else 0)
        report_unreadable(source, writer.unreadable)
        if writer.unreadable and not arguments.skip_unreadable:
            raise UserError(
                f"{len(writer.unreadable)} of {len(source)} files could not be read (listed above), so {arguments.out} "
                "was not written: mend or remove them, or give --skip-unreadable to leave them out"
            )
        given, limit = arguments.source, arguments.limit
        note = describe(writer, source, encoding, limits, given_source=given, limit=limit, part=part)
        publish(arguments.out, temporary, note, packed_names(writer, source), packed_checksums(writer))
    return len(writer.rows)


def check_space(source: Source, encoding: Encoding, limits: Limits, folder: str) -> None:
    """Encode a few images; raise UserError where the whole certainly does not fit onto the disk."""
    sizes = []
    with quiet_decoding():
        for sample in np.linspace(0, len(source) - 1, min(NUM_PROBES, len(source))).astype(int).tolist():
            with contextlib.suppress(UnreadableImage, OSError, MemoryError):
                sizes.append(encode_image(decode_rgb(source.read(sample), limits), sample, encoding).payload.nbytes)
    if not sizes:
        return
    expected, free = float(np.mean(sizes)) * len(source), shutil.disk_usage(folder).free
    print(f"about {gigabytes(expected)} expected, {gigabytes(free)} free")
    if expected / 2 > free:  # half: a few images tell it roughly, and a wrong refusal is worse than a disk full later
        raise UserError(
            f"{folder} has {gigabytes(free)} free, but about {gigabytes(expected)} are needed: make room, choose "
            "another place, or lower --max-resolution or --jpeg-quality"
        )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def report_unreadable(source: Source, unreadable: dict[int, str]) -> None:
    """List on stderr which files could not be read, and why."""
    if unreadable:
        each = [f"{printable(source.names[sample])}: {unreadable[sample]}" for sample in sorted(unreadable)]
        print(f"unreadable:{listing(each, SHOWN)}", file=sys.stderr)


def printable(name: str) -> str:
    """A file's name that any terminal takes, also where it is not valid UTF-8."""
    return name.encode("utf-8", errors="backslashreplace").decode("utf-8")


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated inside, unless ignored: under nohup a hang-up must not end the conversion.

    Signals are the main thread's: elsewhere this does nothing.
    """

    def interrupt(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code; raises UserError for what the user can mend."""
    arguments = parse_arguments(argv)
    check_arguments(arguments)
    try:
        with termination_as_interrupt():
            if arguments.verify is not None:
                from data_prep.beton_check import verify
                from ijepa_ds.data.file_set import files_of

                return max([verify(path, num_workers=arguments.workers) for path in files_of(arguments.verify)])
            if arguments.unpack is not None:
                from data_prep.unpack import unpack

                return unpack(arguments.source, arguments.unpack, num_workers=arguments.workers)
            return convert(arguments)
    except KeyboardInterrupt as interrupt:
        print("\ninterrupted: nothing was kept", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130


if __name__ == "__main__":
    hide_finalizers_of_numba()
    run_command(main)
