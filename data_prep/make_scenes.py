"""The built-in labelled image set: small rendered scenes that stand in for CLEVR where nothing can be downloaded.

    python data_prep/make_scenes.py OUT [--train 20000] [--val 4000] [--size 64] [--seed 0] [--workers N] [--dense]

3 to 10 objects of seven kinds stand on a textured ground before a textured wall, seen by a pinhole camera. The labels
are the two that the I-JEPA paper takes from CLEVR: how many objects (8 classes, uniform) and how far the nearest one is
(uniform, independent of the count). Written in CLEVR v1.0's layout, so one reader serves both. Image ``i`` of a split
is a pure function of (seed, split, i, size): neither the number of workers nor the size of the set changes it, and
every ``--size`` shows the same scene. ``--dense`` writes what each pixel shows beside the images, which it does not
change: ``masks/{train,val}/*.png`` (indices into ``classes.txt``: ground, wall, seven shapes) and
``depth/{train,val}/*.png`` (16 bits, thousandths of a world unit), as ``evaluate --task dense`` reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs in a checkout that was not installed
from data_prep.scene_renderer import (
    COLOR,
    COLORS,
    COS,
    KIND,
    METAL,
    SCALE,
    SHAPES,
    SIN,
    TEXTURES,
    X,
    Z,
    look,
    place,
    project,
    render,
)
from ijepa_ds.errors import UserError, run_command
from ijepa_ds.progress import Progress

GENERATOR_VERSION = 1  # raise it with every change that changes an image or a label, in scene_renderer.py too
SPLITS = {"train": 0, "val": 1}
MIN_OBJECTS, MAX_OBJECTS = 3, 10
NEAREST_DEPTH = (5.0, 13.0)
MAX_ATTEMPTS = 150  # to place objects before camera and places (never count or nearest depth) are drawn anew
MATERIALS = ("rubber", "metal")
CLASSES = ("ground", "wall", *SHAPES)  # of a pixel


def draw_surface(rng: np.random.Generator) -> np.ndarray:
    """Texture and two muted colours of the ground or the wall: [12], as ``scene_renderer.texture`` reads it."""
    angle, hue = rng.uniform(0.0, 2.0 * math.pi, 2)
    saturation, bright, contrast = rng.uniform([0.0, 0.35, 0.1], [0.12, 0.75, 0.35])
    tint = bright * (1.0 + saturation * np.cos(hue + np.array([0.0, 2.1, 4.2])))
    pattern = [rng.integers(len(TEXTURES)), rng.uniform(0.35, 1.1), math.cos(angle), math.sin(angle)]
    return np.array([*pattern, *rng.uniform(0.0, 64.0, 2), *tint, *((1.0 - contrast) * rng.permutation(tint))])


class Layout(NamedTuple):
    """All that a scene's picture depends on, beside its size; arrays as ``scene_renderer`` takes them."""

    objects: np.ndarray
    seen: np.ndarray  # the visible fraction of each
    camera: np.ndarray
    surfaces: np.ndarray
    sun: np.ndarray


def lay_out(seed: int, split: str, index: int) -> Layout:
    """Scene ``index`` of a split, from these alone."""
    rng = np.random.default_rng((seed, SPLITS[split], index))
    count, nearest_depth = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1)), rng.uniform(*NEAREST_DEPTH)
    objects, seen, done = np.zeros((count, 9)), np.zeros(count), False
    while not done:
        height, pitch, view = rng.uniform([5.0, 0.50, 0.53], [6.0, 0.58, 0.62])
        camera = np.array([height, math.cos(pitch), math.sin(pitch), view])
        done = place(rng.random((MAX_ATTEMPTS, 5)), nearest_depth, camera, objects, seen)
    objects[:, COLOR] = rng.integers(len(COLORS), size=count)
    objects[:, METAL] = rng.integers(len(MATERIALS), size=count)
    surfaces = np.stack([draw_surface(rng), draw_surface(rng)])
    azimuth, elevation = rng.uniform([-3.5, 0.6], [0.4, 1.1])  # from the left, behind the camera or the right
    sun = np.array([*(np.cos([azimuth, azimuth - math.pi / 2]) * math.cos(elevation)), math.sin(elevation)])
    return Layout(objects, seen, camera, surfaces, sun)


def render_scene(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, dict]:
    """Image ``index`` of a split (uint8 [size, size, 3]) and its entry in CLEVR's ``scenes``, from these alone."""
    objects, seen, camera, surfaces, sun = lay_out(seed, split, index)
    image = render(size, objects, camera, surfaces, sun)
    image = (255.0 * np.sqrt(np.minimum(image, 1.0)) + 0.5).astype(np.uint8)  # gamma 2
    scene = {"image_index": index, "image_filename": f"SCENES_{split}_{index:06d}.png", "split": split}
    scene["textures"] = [TEXTURES[int(kind)] for kind in surfaces[:, 0]]
    entries = zip(objects, seen.tolist(), strict=True)
    scene["objects"] = [describe(o, camera, size) | {"visible": round(fraction, 3)} for o, fraction in entries]
    return image, scene


def dense_truth(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What each pixel of :func:`render_scene`'s image shows: its class (:data:`CLASSES`), uint8, and depth, uint16.

    Both [size, size]; the depth is in thousandths of a world unit, along the optical axis as in ``pixel_coords``.
    """
    layout = lay_out(seed, split, index)
    classes, depth = look(size, layout.objects, layout.camera)
    return classes.astype(np.uint8), np.round(1000.0 * depth).astype(np.uint16)


def describe(o: np.ndarray, camera: np.ndarray, size: int) -> dict:
    """CLEVR's entry of one object: lengths in world units, rotation in degrees, ``pixel_coords`` = (x, y, depth)."""
    across, down, depth = project(o, camera)
    return {
        "shape": SHAPES[int(o[KIND])],
        "color": list(COLORS)[int(o[COLOR])],
        "material": MATERIALS[int(o[METAL])],
        "size": round(float(o[SCALE]), 4),
        "3d_coords": [round(value, 4) for value in o[X : Z + 1].tolist()],
        "rotation": round(math.degrees(math.atan2(o[SIN], o[COS])), 3),
        "pixel_coords": [round((across + 1.0) * 0.5 * size, 4), round((down + 1.0) * 0.5 * size, 4), round(depth, 4)],
    }


def write_images(folder: Path, settings: dict, split: str, indices: range) -> tuple[str, list[dict]]:
    """Render the images ``indices`` of one split into ``folder``; returns the split and its scenes."""
    scenes = []
    for index in indices:
        key = settings["seed"], split, index, settings["size"]
        image, scene = render_scene(*key)
        written = {"images": image[..., ::-1]}
        if settings.get("dense"):
            written["masks"], written["depth"] = dense_truth(*key)
        for kind, pixels in written.items():
            png = cv2.imencode(".png", pixels)[1]
            (folder / kind / split / scene["image_filename"]).write_bytes(png.tobytes())
        scenes.append(scene)
    return split, scenes


def write_set(folder: Path, settings: dict, *, workers: int) -> None:
    """Render both splits of ``settings`` into ``folder``, with a line of progress every few seconds."""
    total, kinds = settings["train"] + settings["val"], ["images"]
    if settings.get("dense"):
        kinds += ["masks", "depth"]
    for name in ("scenes", *(f"{kind}/{split}" for kind in kinds for split in SPLITS)):
        (folder / name).mkdir(parents=True)
    jobs = [(s, range(i, min(i + 100, settings[s]))) for s in SPLITS for i in range(0, settings[s], 100)]
    scenes: dict[str, list[dict]] = {split: [] for split in SPLITS}
    write = partial(write_images, folder, settings)
    write_images(folder, settings, "train", range(1))  # compiles once; the forked workers inherit it
    progress = Progress(total)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        run = pool.map if workers > 1 else map
        for split, new in run(write, *zip(*jobs, strict=True)):
            scenes[split] += new
            progress.show(sum(map(len, scenes.values())))
    progress.end(total)
    for split in SPLITS:
        text = json.dumps({"info": settings | {"split": split}, "scenes": scenes[split]})
        (folder / "scenes" / f"CLEVR_{split}_scenes.json").write_text(text)
    if settings.get("dense"):
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (folder / "settings.json").write_text(json.dumps(settings))


def make_scenes(out: Path, *, train: int, val: int, size: int, seed: int, workers: int, dense: bool = False) -> None:
    """Make the set in ``out``, which appears only when complete; a finished one with the same settings is kept.

    ``dense``: with the class and the depth of every pixel.
    """
    limits = {"train": (train, 1, 10**6), "val": (val, 1, 10**6), "size": (size, 32, 512), "seed": (seed, 0, 2**32)}
    for name, (value, low, high) in (limits | {"workers": (workers, 1, 512)}).items():
        if not low <= value <= high:
            raise UserError(f"--{name} is {value}: give a whole number from {low} to {high}")
    settings = {"generator": "make_scenes", "version": GENERATOR_VERSION}
    settings |= {"train": train, "val": val, "size": size, "seed": seed} | ({"dense": True} if dense else {})
    if (out / "settings.json").is_file():
        saved = (out / "settings.json").read_text()
        if saved != json.dumps(settings):
            raise UserError(f"{out} was made with {saved}, not {json.dumps(settings)}: name another OUT or delete it")
        print(f"{out} is complete with these settings; reused")
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and holds something else than scenes: name another OUT or delete it")
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        write_set(unfinished, settings, workers=workers)
        unfinished.rename(out)
    except (OSError, BrokenProcessPool) as error:
        raise UserError(f"cannot write {out} ({error}): make room, name another OUT or use fewer --workers") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{out}: {train:,} training and {val:,} validation images of {size} x {size} pixels")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make the built-in labelled image set, in CLEVR v1.0's layout.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--train", type=int, default=20_000, help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=4_000, help="validation images (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels, 32 to 512 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    parser.add_argument("--dense", action="store_true", help="write masks and depth maps, too (half as long again)")
    make_scenes(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_command(main)
