"""The drawing of the built-in scenes: objects stand where their labels say, and hide each other rightly."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep import make_scenes, scene_renderer


def test_what_is_drawn_is_what_the_labels_say() -> None:
    """An object painted alone changes the picture around its ``pixel_coords``, and does so more when it is nearer."""
    camera = np.array([5.5, np.cos(0.54), np.sin(0.54), 0.58])
    covered = []
    for depth in (6.0, 9.0, 14.0, 20.0):
        o = np.zeros(9)
        o[scene_renderer.SCALE], o[scene_renderer.COS] = 1.0, 1.0
        o[scene_renderer.X], o[scene_renderer.Z] = 0.1 * depth, 1.0
        o[scene_renderer.Y] = (depth + (1.0 - camera[0]) * camera[2]) / camera[1]
        nearest, owner = np.full((128, 128), np.inf), np.full((128, 128), -1)
        total = scene_renderer.draw(0, o, camera, nearest, owner)
        rows, columns = np.nonzero(owner == 0)
        x, y, label = make_scenes.describe(o, camera, 128)["pixel_coords"]
        assert label == pytest.approx(depth, abs=1e-3)
        assert abs(columns.mean() + 0.5 - x) < 2.0 and abs(rows.mean() + 0.5 - y) < 2.0
        assert nearest.min() == pytest.approx(np.linalg.norm([o[2], o[3], o[4] - camera[0]]) - 1.0, abs=0.02)
        covered.append(total)
    assert covered == sorted(covered, reverse=True) and covered[0] > 8 * covered[-1]


def test_the_nearer_object_hides_the_farther_one() -> None:
    camera = np.array([5.5, np.cos(0.54), np.sin(0.54), 0.58])
    near, far = np.zeros(9), np.zeros(9)
    near[[1, 3, 4, 5]], far[[1, 3, 4, 5]] = (1.0, 7.0, 1.0, 1.0), (1.0, 9.0, 1.0, 1.0)
    owners = []
    for order in (((0, near), (1, far)), ((1, far), (0, near))):
        nearest, owner = np.full((64, 64), np.inf), np.full((64, 64), -1)
        totals = {k: scene_renderer.draw(k, o, camera, nearest, owner) for k, o in order}
        assert (owner == 0).sum() == totals[0] and 0 < (owner == 1).sum() < totals[1]
        owners.append(owner)
    assert np.array_equal(*owners)


def test_what_a_pixel_shows_is_what_was_drawn_there() -> None:
    """Class and depth of the nearest sample: an object's as in its z-buffer, ground and wall by their equations."""
    camera = np.array([5.5, np.cos(0.54), np.sin(0.54), 0.58])
    torus = np.zeros(9)
    torus[[0, 1, 3, 4, 5]] = 4.0, 1.0, 8.0, 1.05, 1.0
    classes, depth = scene_renderer.look(32, torus[None], camera)
    nearest, owner = np.full((64, 64), np.inf), np.full((64, 64), -1)
    scene_renderer.draw(0, torus, camera, nearest, owner)
    across = (2 * (np.arange(64) + 0.5) / 64 - 1) * camera[3]
    u, v = across[None, :], -across[:, None]  # of each sample, at depth 1
    on_torus = np.where(owner == 0, nearest / np.sqrt(1 + u**2 + v**2), np.inf)
    down, ahead = camera[2] - v * camera[1], camera[1] + v * camera[2]  # of the ray, at depth 1
    on_ground = np.broadcast_to(np.where(down > 0, camera[0] / down, np.inf), (64, 64))
    on_wall = np.broadcast_to(scene_renderer.WALL_Y / ahead, (64, 64))
    shown = np.stack([on_ground, on_wall, *[np.full((64, 64), np.inf)] * 4, on_torus])  # 6 = 2 + kind 4
    blocks = shown.reshape(7, 32, 2, 32, 2).min(axis=(2, 4))
    np.testing.assert_allclose(depth, blocks.min(axis=0), rtol=1e-9)
    assert np.array_equal(classes, blocks.argmin(axis=0))
    assert set(np.unique(classes)) == {0, 1, 6}  # and through its hole the ground is seen
    row = int(np.argwhere(classes == 6)[:, 0].mean())
    assert classes[row, np.flatnonzero(classes[row] == 6).min() : np.flatnonzero(classes[row] == 6).max()].min() < 6
