"""Shapes on a textured ground before a textured wall: placed, drawn and lit, in compiled code.

All kernels stand in this one file, because numba's cache of a kernel notices changes of its own file only.

World: x right, y away from the camera, z up, the ground is z = 0, the camera stands at (0, 0, height). Depths are along
the optical axis, as in CLEVR's ``pixel_coords``. Shape letters: O objects, A attempts to place one, S side of the image
in pixels, W = S * SAMPLES rays across.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

FARTHEST_DEPTH = 18.0
BASE_SIZE = (0.8, 1.5)  # radius of a sphere; varies so that apparent size alone does not give the depth
LAYOUT_SIZE = 64  # visibility is judged at this resolution whatever the image's, so that all sizes show one scene
MIN_PIXELS, MIN_FRACTION = 14, 0.5  # of each object that are visible at LAYOUT_SIZE; and of its whole outline
SAMPLES = 2  # rays per pixel and axis
WALL_Y = 21.0
SHAPES = ("sphere", "cube", "cylinder", "cone", "torus", "pyramid", "capsule")
HALF_HEIGHT = np.array([1.0, 0.8, 0.95, 1.0, 1.05, 0.95, 1.25])  # of each shape at base size 1
BOUND = np.array([1.0, 1.4, 1.3, 1.45, 1.06, 1.75, 1.25])  # radius of a sphere around each shape at base size 1
COLORS = {  # linear RGB, strong so that objects differ from the muted backgrounds
    "red": (0.75, 0.03, 0.03), "orange": (0.90, 0.25, 0.01), "yellow": (0.90, 0.70, 0.03), "green": (0.03, 0.45, 0.05),
    "cyan": (0.02, 0.60, 0.65), "blue": (0.03, 0.10, 0.75), "purple": (0.28, 0.03, 0.50), "pink": (0.95, 0.20, 0.45),
}  # fmt: skip
PALETTE = np.array(list(COLORS.values()))
TEXTURES = ("clouds", "checks", "stripes", "dots", "bricks", "marble")  # kind 0, 1, ... of a surface
NOISE = np.random.default_rng(1).random((64, 64))  # lattice of the value noise
KIND, SCALE, X, Y, Z, COS, SIN, COLOR, METAL = range(9)  # columns of an object table [O, 9]
HEIGHT, PITCH_COS, PITCH_SIN, HALF_VIEW = range(4)  # of a camera [4]; HALF_VIEW = tan(half the field of view)
kernel = njit(cache=True, error_model="numpy")  # divisions are not checked; no fastmath, for the same bits everywhere


@kernel
def distance(kind: int, x: float, y: float, z: float) -> float:
    """Lower bound of the signed distance to a shape of base size 1 at the origin; its zero is the surface."""
    q = math.sqrt(x * x + y * y)
    if kind == 0:
        return math.sqrt(q * q + z * z) - 1.0
    if kind == 1:
        return max(abs(x), abs(y), abs(z)) - 0.8
    if kind == 2:
        return max(q - 0.85, abs(z) - 0.95)
    if kind == 3:
        return max(-z - 1.0, (2.0 * q + z - 1.0) * 0.4472136)
    if kind == 4:  # standing, so that its hole is seen
        return math.sqrt((math.sqrt(x * x + z * z) - 0.74) ** 2 + y * y) - 0.31
    if kind == 5:
        return max(-z - 0.95, (1.9 * max(abs(x), abs(y)) + z - 0.95) * 0.4657464)
    return math.sqrt(q * q + (z - min(max(z, -0.6), 0.6)) ** 2) - 0.65


@kernel
def hit(o: np.ndarray, height: float, dx: float, dy: float, dz: float) -> float:
    """How far along the unit ray (dx, dy, dz) from (0, 0, height) the object ``o`` [9] is met; infinity for a miss."""
    kind, scale, c, s = int(o[KIND]), o[SCALE], o[COS], o[SIN]
    rx, ry, rz = -o[X] / scale, -o[Y] / scale, (height - o[Z]) / scale
    along = -(rx * dx + ry * dy + rz * dz)
    reach = BOUND[kind] ** 2 - (rx * rx + ry * ry + rz * rz - along * along)
    if reach <= 0.0:
        return np.inf
    t, end = along - math.sqrt(reach), along + math.sqrt(reach)
    rx, ry, dx, dy = c * rx + s * ry, c * ry - s * rx, c * dx + s * dy, c * dy - s * dx  # into the object's own frame
    for _ in range(40):  # sphere tracing
        gap = distance(kind, rx + t * dx, ry + t * dy, rz + t * dz)
        if gap < 2e-3:
            return t * scale
        t += gap
        if t > end:
            break
    return np.inf


@kernel
def ray(column: int, row: int, width: int, camera: np.ndarray) -> tuple[float, float, float]:
    """Unit direction through the middle of a sample."""
    u = (2.0 * (column + 0.5) / width - 1.0) * camera[HALF_VIEW]
    v = (1.0 - 2.0 * (row + 0.5) / width) * camera[HALF_VIEW]
    f = 1.0 / math.sqrt(1.0 + u * u + v * v)
    return u * f, (camera[PITCH_COS] + v * camera[PITCH_SIN]) * f, (v * camera[PITCH_COS] - camera[PITCH_SIN]) * f


@kernel
def project(o: np.ndarray, camera: np.ndarray) -> tuple[float, float, float]:
    """Where an object's centre appears (from -1, left and top, to 1), and its depth along the optical axis."""
    down = camera[HEIGHT] - o[Z]
    depth = o[Y] * camera[PITCH_COS] + down * camera[PITCH_SIN]
    below = down * camera[PITCH_COS] - o[Y] * camera[PITCH_SIN]
    return o[X] / (depth * camera[HALF_VIEW]), below / (depth * camera[HALF_VIEW]), depth


@kernel
def draw(k: int, o: np.ndarray, camera: np.ndarray, nearest: np.ndarray, owner: np.ndarray) -> int:
    """Draw object ``k`` into the z-buffer ``nearest`` and ``owner``, both [W, W].

    Returns how many samples it covers, hidden or not, in the frame or not.
    """
    width, total, bound = len(nearest), 0, BOUND[int(o[KIND])] * o[SCALE]
    across, down, depth = project(o, camera)
    reach = bound / (depth - bound)  # of a box around the object; more for what is seen aslant
    reach_x, reach_y = reach * (1.0 / camera[HALF_VIEW] + abs(across)), reach * (1.0 / camera[HALF_VIEW] + abs(down))
    left, right = math.floor((across - reach_x + 1.0) * 0.5 * width), math.ceil((across + reach_x + 1.0) * 0.5 * width)
    top, bottom = math.floor((down - reach_y + 1.0) * 0.5 * width), math.ceil((down + reach_y + 1.0) * 0.5 * width)
    for row in range(top, bottom):
        for column in range(left, right):
            dx, dy, dz = ray(column, row, width, camera)
            t = hit(o, camera[HEIGHT], dx, dy, dz)
            total += t < np.inf
            if 0 <= row < width and 0 <= column < width and t < nearest[row, column]:
                nearest[row, column], owner[row, column] = t, k
    return total


@kernel
def place(draws: np.ndarray, nearest_depth: float, camera: np.ndarray, objects: np.ndarray, seen: np.ndarray) -> bool:
    """Place ``objects`` [O, 9] from uniform ``draws`` [A, 5], the nearest first; False if the draws ran out.

    A place is refused that is out of the frame, not clear of the others or hides too much of any object; ``seen`` [O]
    becomes the visible fraction of each.
    """
    totals, placed = np.zeros(len(objects)), 0
    nearest, owner = np.full((LAYOUT_SIZE, LAYOUT_SIZE), np.inf), np.full((LAYOUT_SIZE, LAYOUT_SIZE), -1)
    for kind, size, behind, across, turn in draws:
        o = objects[placed]
        o[KIND], o[SCALE] = int(kind * len(SHAPES)), BASE_SIZE[0] * (BASE_SIZE[1] / BASE_SIZE[0]) ** size
        yaw = (turn - 0.5) * (2.0 if o[KIND] == 4 else 2.0 * math.pi)  # a torus never shows only its edge
        depth = nearest_depth if placed == 0 else nearest_depth + behind * (FARTHEST_DEPTH - nearest_depth)
        o[X], o[Z] = (across * 2.0 - 1.0) * 0.92 * depth * camera[HALF_VIEW], HALF_HEIGHT[int(o[KIND])] * o[SCALE]
        o[Y] = (depth + (o[Z] - camera[HEIGHT]) * camera[PITCH_SIN]) / camera[PITCH_COS]
        o[COS], o[SIN] = math.cos(yaw), math.sin(yaw)
        fits = abs(project(o, camera)[1]) < 0.92
        for k in range(placed):
            apart = math.hypot(o[X] - objects[k, X], o[Y] - objects[k, Y])
            fits &= apart > 1.05 * (o[SCALE] + objects[k, SCALE])
        if not fits:
            continue
        new_nearest, new_owner, visible = nearest.copy(), owner.copy(), np.zeros(len(objects))
        totals[placed] = draw(placed, o, camera, new_nearest, new_owner)
        for k in new_owner.flat:
            if k >= 0:
                visible[k] += 1
        if np.all(visible[: placed + 1] >= np.maximum(MIN_PIXELS, MIN_FRACTION * totals[: placed + 1])):
            nearest, owner, placed = new_nearest, new_owner, placed + 1
            if placed == len(objects):
                seen[:] = visible / totals
                return True
    return False


@kernel
def noise(u: float, v: float) -> float:
    """Smooth value noise in [0, 1] with period 64."""
    i, j = math.floor(u), math.floor(v)
    a, b = (u - i) ** 2 * (3.0 - 2.0 * (u - i)), (v - j) ** 2 * (3.0 - 2.0 * (v - j))
    low = NOISE[i & 63, j & 63] * (1.0 - a) + NOISE[(i + 1) & 63, j & 63] * a
    high = NOISE[i & 63, (j + 1) & 63] * (1.0 - a) + NOISE[(i + 1) & 63, (j + 1) & 63] * a
    return low * (1.0 - b) + high * b


@kernel
def texture(x: float, y: float, surface: np.ndarray) -> float:
    """Mix in [0, 1] of the two colours at a point of a ``surface`` [12]: kind, scale, cos, sin, shift [2], colours."""
    u = (surface[2] * x + surface[3] * y) * surface[1] + surface[4]
    v = (surface[2] * y - surface[3] * x) * surface[1] + surface[5]
    i, j, kind = math.floor(u), math.floor(v), int(surface[0])
    cloud = 0.65 * noise(u, v) + 0.35 * noise(2.3 * u + 9.0, 2.3 * v + 5.0)
    if kind == 0:
        return min(max(1.8 * cloud - 0.4, 0.0), 1.0)
    if kind == 1:
        mix = float((i + j) % 2)
    elif kind == 2:
        mix = float(math.floor(1.3 * u + 0.8 * cloud) % 2)
    elif kind == 3:
        mix = 1.0 if (u - i - 0.5) ** 2 + (v - j - 0.5) ** 2 < 0.1 else 0.0
    elif kind == 4:
        along = 0.5 * u + 0.5 * (j % 2)
        brick = math.floor(along)
        mix = 1.0 if v - j < 0.14 or along - brick < 0.07 else 0.45 * NOISE[brick & 63, j & 63]
    else:
        mix = 0.5 + 0.5 * math.sin(2.2 * u + 7.0 * cloud)
    return 0.8 * mix + 0.2 * cloud


@kernel
def sunlight(x: float, y: float, z: float, objects: np.ndarray, sun: np.ndarray, skip: int) -> float:
    """Part of the light that reaches a point past all objects but ``skip``; the ground (-1) has contact shadows too."""
    light = 1.0
    for k in range(len(objects)):
        wx, wy, wz, size = objects[k, X] - x, objects[k, Y] - y, objects[k, Z] - z, 0.95 * objects[k, SCALE]
        flat = wx * wx + wy * wy
        if k == skip or flat > 16.0 * size * size:  # too far for its shadow
            continue
        along = wx * sun[0] + wy * sun[1] + wz * sun[2]
        if along > 0.0:  # the soft shadow of a sphere, whatever the shape
            off = math.sqrt(max(flat + wz * wz - along * along, 0.0)) / size
            edge = min(max((1.25 - off) / 0.55, 0.0), 1.0)
            light *= 1.0 - 0.85 * edge * edge * (3.0 - 2.0 * edge)
        if skip < 0:
            light *= 1.0 - 0.7 * min(max(1.4 - math.sqrt(flat) / size, 0.0), 1.0)
    return light


@kernel
def shade(o: np.ndarray, p: np.ndarray, d: np.ndarray, sun: np.ndarray, light: float) -> tuple[float, float]:
    """Diffuse light and highlight of the object ``o`` at the point ``p`` [3] seen along ``d`` [3]."""
    kind, c, s, e = int(o[KIND]), o[COS], o[SIN], 0.02
    wx, wy, z = (p[0] - o[X]) / o[SCALE], (p[1] - o[Y]) / o[SCALE], (p[2] - o[Z]) / o[SCALE]
    x, y = c * wx + s * wy, c * wy - s * wx
    ax = distance(kind, x + e, y, z) - distance(kind, x - e, y, z)
    ay = distance(kind, x, y + e, z) - distance(kind, x, y - e, z)
    az = distance(kind, x, y, z + e) - distance(kind, x, y, z - e)
    f = 1.0 / max(math.sqrt(ax * ax + ay * ay + az * az), 1e-9)
    nx, ny, nz = (c * ax - s * ay) * f, (c * ay + s * ax) * f, az * f  # the normal
    facing = nx * sun[0] + ny * sun[1] + nz * sun[2]
    mirror = sun[0] * d[0] + sun[1] * d[1] + sun[2] * d[2] - 2.0 * facing * (nx * d[0] + ny * d[1] + nz * d[2])
    highlight = light * max(mirror, 0.0) ** (24 if o[METAL] else 4) * (0.08 + 0.6 * o[METAL])
    return 0.75 * max(facing, 0.0) * light + 0.22 + 0.12 * nz, highlight


@kernel
def render(size: int, objects: np.ndarray, camera: np.ndarray, surfaces: np.ndarray, sun: np.ndarray) -> np.ndarray:
    """Linear RGB [S, S, 3] of ``objects`` [O, 9] on ``surfaces`` [2, 12] (ground, wall); ``sun`` [3] points to it."""
    width = size * SAMPLES
    nearest, owner = np.full((width, width), np.inf), np.full((width, width), -1)
    for k, o in enumerate(objects):
        draw(k, o, camera, nearest, owner)
    ground, wall = len(objects), len(objects) + 1  # the owners of what no object covers
    colors = np.zeros((len(objects) + 2, 6))
    colors[:ground, :3], colors[ground:] = PALETTE[objects[:, COLOR].astype(np.int64)], surfaces[:, 6:]
    d, p, image = np.empty(3), np.empty(3), np.zeros((size, size, 3))
    for row in range(width):
        for column in range(width):
            d[0], d[1], d[2] = ray(column, row, width, camera)
            k, t, mix, highlight, light = owner[row, column], nearest[row, column], 0.0, 0.0, 0.75
            if k < 0:
                to_wall, to_ground = WALL_Y / d[1], camera[HEIGHT] / -d[2] if d[2] < 0.0 else np.inf
                k, t = (ground, to_ground) if to_ground < to_wall else (wall, to_wall)
            p[0], p[1], p[2] = t * d[0], t * d[1], camera[HEIGHT] + t * d[2]
            if k < ground:
                light, highlight = shade(objects[k], p, d, sun, sunlight(p[0], p[1], p[2], objects, sun, k))
            elif k == ground:
                light = 0.3 + 0.7 * sunlight(p[0], p[1], p[2], objects, sun, -1)
                mix = texture(p[0], p[1], surfaces[0])
            else:
                mix = texture(0.5 * p[0], 0.5 * p[2], surfaces[1])
            if k >= ground:
                mix = 0.5 + (mix - 0.5) * min(1.0, 14.0 / t)  # fades with distance, so that it does not alias
            for c in range(3):
                color = colors[k, c] * (1.0 - mix) + colors[k, 3 + c] * mix
                image[row // SAMPLES, column // SAMPLES, c] += (color * light + highlight) / SAMPLES**2
    return image


@kernel
def look(size: int, objects: np.ndarray, camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the pixels that :func:`render` draws show: class [S, S] and depth along the optical axis [S, S].

    Classes: 0 the ground, 1 the wall, 2 + kind an object. Of a pixel's samples the nearest one decides both:
    a mean would lie where nothing is.
    """
    width = size * SAMPLES
    nearest, owner = np.full((width, width), np.inf), np.full((width, width), -1)
    for k, o in enumerate(objects):
        draw(k, o, camera, nearest, owner)
    classes, depth = np.zeros((size, size), np.int64), np.full((size, size), np.inf)
    for row in range(width):
        for column in range(width):
            _, dy, dz = ray(column, row, width, camera)
            k, t = owner[row, column], nearest[row, column]
            to_wall, to_ground = WALL_Y / dy, camera[HEIGHT] / -dz if dz < 0.0 else np.inf
            shown = 2 + int(objects[k, KIND]) if k >= 0 else 0 if to_ground < to_wall else 1
            away = (t if k >= 0 else min(to_ground, to_wall)) * (dy * camera[PITCH_COS] - dz * camera[PITCH_SIN])
            if away < depth[row // SAMPLES, column // SAMPLES]:
                classes[row // SAMPLES, column // SAMPLES], depth[row // SAMPLES, column // SAMPLES] = shown, away
    return classes, depth
