"""Images that tests make."""

from __future__ import annotations

import numpy as np


def smooth_image(index: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [rows, columns, 3]: waves whose direction and colour depend on the index; smooth, so JPEGs stay close."""
    rows, columns = np.mgrid[: size[0], : size[1]] / 16
    angles = np.random.default_rng(index).uniform(0, 2 * np.pi, (3, 2))
    waves = [np.sin(np.cos(turn) * rows + np.sin(turn) * columns + shift) for turn, shift in angles]
    return np.rint(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)
