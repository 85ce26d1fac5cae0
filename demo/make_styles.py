"""Paint the demo style pictures with code: numpy, scipy and pillow only, every picture seeded.

Run ``python demo/make_styles.py`` to write all of ``demo/styles/*.jpg``, or name the ones to redo, as in
``python demo/make_styles.py starry_oil ink_wash``.  Each style is one function that returns a picture as a
float array; it is painted larger than needed and averaged down, which smooths its edges.

Conventions: a picture is an array (n, n, 3) with values in 0..1, a "field" an array (n, n), a "path" an array
(points, 2) of x, y in pixels.  Scenes are laid out in u (right) and v (down), both 0..1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage as ndi
from scipy.spatial import cKDTree

OUT = Path(__file__).resolve().parent / "styles"
SIZE = 512
MAX_BYTES = 148_000
Array = np.ndarray
Rng = np.random.Generator


# ---------------------------------------------------------------------------------------------------------
# Small helpers


def rgb(code: str) -> Array:
    """Colour from a hex code such as "1f3a6e"."""
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255


def palette(codes: str) -> Array:
    """Several hex codes, separated by blanks, as an array (colours, 3)."""
    return np.stack([rgb(code) for code in codes.split()])


def mix(a: Array, b: Array, t: Array | float) -> Array:
    """Blend from `a` (t = 0) to `b` (t = 1); a field `t` blends colours."""
    t = np.asarray(t, np.float32)
    if t.ndim and np.ndim(b) and np.shape(b)[-1] == 3 and t.shape[-1:] != (1,):
        t = t[..., None]
    return a * (1 - t) + b * t


def ramp(colours: Array, t: Array | float) -> Array:
    """Look `t` (0..1) up in a list of evenly spaced colours."""
    at = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(t, at, colours[:, c]) for c in range(3)], -1).astype(np.float32)


def smoothstep(lo: float, hi: float, x: Array) -> Array:
    """0 below `lo`, 1 above `hi`, smooth between (`lo` may be the larger one)."""
    t = np.clip((x - lo) / (hi - lo), 0, 1)
    return t * t * (3 - 2 * t)


def unit_grid(n: int) -> tuple[Array, Array]:
    """Fields u, v of pixel positions in 0..1."""
    line = (np.arange(n, dtype=np.float32) + 0.5) / n
    return np.meshgrid(line, line)


def noise(n: int, cells: float | tuple[float, float], rng: Rng, octaves: int = 1) -> Array:
    """Smooth noise of mean 0 and deviation 1, with `cells` (across, down) bumps over the picture."""
    across, down = (cells, cells) if np.isscalar(cells) else cells
    total = np.zeros((n, n), np.float32)
    for octave in range(octaves):
        shape = [max(4, round(c * 2**octave) + 3) for c in (down, across)]
        coarse = Image.fromarray(rng.standard_normal(shape).astype(np.float32))
        box = (1, 1, min(shape[1] - 1, 1 + across * 2**octave), min(shape[0] - 1, 1 + down * 2**octave))
        total += np.asarray(coarse.resize((n, n), Image.Resampling.BICUBIC, box=box)) * 0.55**octave
    return (total - total.mean()) / total.std()


def relight(picture: Array, height: Array, depth: float, gloss: float = 0.1) -> Array:
    """Light the relief `height` (in pixels) from the upper left: shade slopes and add a soft highlight."""
    gy, gx = np.gradient(height * depth)
    scale = 1 / np.sqrt(gx**2 + gy**2 + 1)
    light = np.array([-0.45, -0.6, 0.66])
    light = light / np.linalg.norm(light)
    lambert = (-gx * light[0] - gy * light[1] + light[2]) * scale / light[2]
    half = light + np.array([0, 0, 1])
    half = half / np.linalg.norm(half)
    shine = np.clip((-gx * half[0] - gy * half[1] + half[2]) * scale, 0, 1) ** 40
    flat = half[2] ** 40
    shaded = picture * np.clip(lambert, 0.35, 1.5)[..., None] ** 0.8
    return shaded + gloss * np.clip(shine - flat, 0, 1)[..., None]


def shrink(picture: Array) -> Image.Image:
    """Average the large picture down to `SIZE` and turn it into an image."""
    k = picture.shape[0] // SIZE
    small = picture.reshape(SIZE, k, SIZE, k, 3).mean((1, 3))
    return Image.fromarray((np.clip(small, 0, 1) * 255 + 0.5).astype(np.uint8))


def table(text: str) -> list[tuple[float, ...]]:
    """Points, or longer rows of numbers, from text such as "0.1 0.2, 0.3 0.4"."""
    return [tuple(float(word) for word in row.split()) for row in text.split(",")]


def spline(knots: list[tuple[float, ...]], per_leg: int = 24, closed: bool = False) -> Array:
    """Catmull-Rom curve through the points."""
    p = np.array(knots, np.float64)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, per_leg, endpoint=False)[:, None]
    legs = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
    ]
    return np.concatenate([*legs, p[-2][None]])


def polygon_mask(n: int, outline: Array) -> Array:
    """Boolean field: inside the outline (given in u, v)."""
    image = Image.new("1", (n, n))
    ImageDraw.Draw(image).polygon([tuple(xy) for xy in np.asarray(outline) * n], fill=1)
    return np.asarray(image).astype(bool)


# ---------------------------------------------------------------------------------------------------------
# The brush


def sweep(path: Array, width: float | Array, n: int) -> tuple[Array, Array, Array]:
    """Sample a brush drawn along a path: flat pixel indices (m, k), s (m, 1) along and t (1, k) across.

    `width` is the full width in pixels, one number or one for every path point.  Samples that fall outside
    the picture are moved to its nearest edge pixel.
    """
    step = np.hypot(*np.diff(path, axis=0).T)
    along = np.concatenate([[0], np.cumsum(step)])
    m = max(3, int(along[-1] / 0.7))
    s = np.linspace(0, 1, m)
    at = s * along[-1]
    x, y = np.interp(at, along, path[:, 0]), np.interp(at, along, path[:, 1])
    half = np.interp(at, along, np.broadcast_to(width, len(path))) / 2
    dx, dy = np.gradient(x), np.gradient(y)
    size = np.hypot(dx, dy) + 1e-6
    t = np.linspace(-1, 1, max(3, int(2 * half.max() / 0.7)))
    px = x[:, None] - (dy / size * half)[:, None] * t
    py = y[:, None] + (dx / size * half)[:, None] * t
    ix, iy = np.clip(px, 0, n - 1).astype(np.int64), np.clip(py, 0, n - 1).astype(np.int64)
    return iy * n + ix, s[:, None], t[None, :]


def bristles(count: int, rng: Rng, softness: float = 1.0) -> Array:
    """A random profile (1, count) across the brush, about -1..1: coarse clumps and single hairs."""
    profile = np.zeros(count)
    for weight, blur in [(1.0, softness), (0.8, 3 * softness)]:
        hairs = ndi.gaussian_filter1d(rng.standard_normal(count), blur, mode="reflect")
        profile += weight * (hairs - hairs.mean()) / (hairs.std() + 0.05)
    return (profile / 1.8)[None, :]


class Canvas:
    """Wet paint: a colour and a paint thickness for every pixel."""

    def __init__(self, ground: Array) -> None:
        self.n = len(ground)
        self.colour = ground.reshape(-1, 3).astype(np.float32).copy()
        self.height = np.zeros(self.n * self.n, np.float32)

    def stroke(
        self,
        path: Array,
        width: float,
        colour: Array,
        rng: Rng,
        second: Array | None = None,
        dry: float = 0.3,
    ) -> None:
        """One bristle stroke; `second` is a colour picked up by one side of the brush."""
        count = len(path)
        taper = np.interp(np.linspace(0, 1, count), [0, 0.12, 0.7, 1], [0.75, 1, 0.95, 0.45])
        index, s, t = sweep(path, width * taper, self.n)
        hair = bristles(t.size, rng, 1.1)
        load = 1.25 - dry * (s**2) * 3 + 0.55 * hair - 0.75 * np.abs(t) ** 4
        keep = load > 0.28
        tint = hair * 0.055 + 0.02 * rng.standard_normal()
        paint = np.broadcast_to(colour, (*index.shape, 3)) + tint[..., None]
        if second is not None:
            side = smoothstep(-0.2, 0.9, t * rng.choice([-1, 1]) + 0.35 * hair)
            paint = mix(paint, second, np.broadcast_to(side * 0.75, index.shape))
        where = index[keep]
        wet = np.clip(load[keep] * 1.6, 0, 1)[:, None] * 0.94
        self.colour[where] = self.colour[where] * (1 - wet) + paint[keep] * wet
        rim = 0.9 * np.exp(-(((np.abs(t) - 0.8) / 0.16) ** 2))
        bulk = 1.0 + 0.75 * hair + rim + 0.6 * np.exp(-((s / 0.1) ** 2)) - 0.7 * s
        self.height[where] = 0.3 * self.height[where] + np.clip(bulk, 0, None)[keep] * width**0.5

    def dab(self, x: float, y: float, radius: float, stretch: float, angle: float, colour: Array) -> None:
        """One dome-shaped touch of the brush tip."""
        reach = int(radius * stretch) + 1
        x0, x1 = max(0, int(x) - reach), min(self.n, int(x) + reach + 1)
        y0, y1 = max(0, int(y) - reach), min(self.n, int(y) + reach + 1)
        dx, dy = np.arange(x0, x1)[None, :] - x, np.arange(y0, y1)[:, None] - y
        c, s = np.cos(angle), np.sin(angle)
        r2 = ((dx * c + dy * s) / (radius * stretch)) ** 2 + ((dy * c - dx * s) / radius) ** 2
        keep = r2 < 1
        where = (np.arange(y0, y1)[:, None] * self.n + np.arange(x0, x1)[None, :])[keep]
        dome = np.sqrt(1 - r2[keep])
        self.colour[where] = self.colour[where] * 0.06 + 0.94 * (colour + 0.05 * (dome[:, None] - 0.7))
        self.height[where] = 0.35 * self.height[where] + dome * radius**0.7

    def lit(self, depth: float, gloss: float = 0.1, weave: Array | None = None) -> Array:
        """The finished painting under a raking light, with the weave of the cloth if given."""
        height = self.height.reshape(self.n, self.n)
        height = ndi.gaussian_filter(height, 0.8) if weave is None else ndi.gaussian_filter(height, 0.8) + weave
        return relight(self.colour.reshape(self.n, self.n, 3), height, depth, gloss)


def trace(angle: Array, starts: Array, length: Array, steps: int) -> Array:
    """Follow the direction field from many points at once: paths (strokes, steps, 2)."""
    n = len(angle)
    at = starts.astype(np.float64).copy()
    stride = (length / steps)[:, None]
    paths = [at]
    for _ in range(steps - 1):
        ix, iy = np.clip(at, 0, n - 1).astype(int).T
        a = angle[iy, ix]
        at = at + np.stack([np.cos(a), np.sin(a)], 1) * stride
        paths.append(at)
    return np.stack(paths, 1)


def flow_pass(
    canvas: Canvas,
    scene: Array,
    angle: Array,
    rng: Rng,
    count: int,
    width: float,
    length: float,
    jitter: float,
    where: Array | None = None,
) -> None:
    """Cover the canvas with strokes along the direction field, coloured from the scene."""
    n = canvas.n
    if where is None:
        starts = rng.uniform(-0.02, 1.0, (count, 2)) * n
    else:
        spots = rng.choice(np.flatnonzero(where), count)
        starts = np.stack([spots % n, spots // n], 1) + rng.uniform(0, 1, (count, 2))
    lengths = length * rng.uniform(0.6, 1.4, count)
    paths = trace(angle, starts, lengths, 14)
    for path in paths:
        ix, iy = np.clip(path[5], 0, n - 1).astype(int)
        jx, jy = np.clip(path[5] + rng.normal(0, width, 2), 0, n - 1).astype(int)
        shade = 1 + jitter * rng.standard_normal()
        tint = jitter * 0.35 * rng.standard_normal(3)
        colour = scene[iy, ix] * shade + tint
        canvas.stroke(path, width * rng.uniform(0.7, 1.3), colour, rng, scene[jy, jx] * shade - tint)


def canvas_weave(n: int) -> Array:
    """The relief of a woven cloth."""
    x = np.arange(n) * (2 * np.pi / 6)
    return (0.35 * np.sin(x)[None, :] * np.sin(x)[:, None]).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------
# Styles


def starry_oil() -> Array:
    """Oil on canvas: a night sky of swirling strokes over a village, a cypress on the left."""
    rng = np.random.default_rng(11)
    n = SIZE * 2
    u, v = unit_grid(n)

    # Direction field: a stream function with three whirls, and rings round the stars.
    stars = table("0.86 0.15 0.075, 0.1 0.13 0.033, 0.3 0.07 0.03, 0.57 0.09 0.036, 0.42 0.27 0.026")
    stars += [(0.70, 0.37, 0.030), (0.93, 0.44, 0.026), (0.31, 0.47, 0.030)]
    stream = v + 0.05 * np.sin(5 * u + 1.0) * np.cos(3 * v) + 0.012 * noise(n, 4, rng)
    for x, y, r, turn in [(0.47, 0.35, 0.13, 0.24), (0.66, 0.23, 0.09, -0.16), (0.16, 0.36, 0.10, 0.12)]:
        stream = stream + turn * np.exp(-((u - x) ** 2 + (v - y) ** 2) / r**2)
    bands = stream.copy()
    for x, y, r in stars:
        stream = stream + 0.35 * r / 0.05 * np.exp(-((u - x) ** 2 + (v - y) ** 2) / (1.6 * r) ** 2)
    gy, gx = np.gradient(ndi.gaussian_filter(stream, 3))
    angle = np.arctan2(-gx, gy)

    # Scene colours: bands of blue along the stream, glowing stars and moon.
    blues = palette("0c1a4b 12307c 1c4fa6 3f7fc4 86b4d4 d8e2cc 5a96c6 1d56ab 142f80")
    tone = 0.5 + 0.5 * np.sin(46 * bands + 1.3 * noise(n, 5, rng) * 0.5)
    scene = ramp(blues, np.clip(0.12 + 0.62 * tone * (0.45 + 0.75 * v) + 0.05 * noise(n, 10, rng), 0, 1))
    scene = mix(scene, rgb("b9c9a4"), 0.55 * smoothstep(0.45, 0.66, v))
    rings = palette("fff6c0 ffe36a f7b92c f3d764 a9c98f 6fa5b8")
    for x, y, r in stars:
        d = np.hypot(u - x, v - y) / r
        glow = smoothstep(2.7, 1.3, d)
        scene = mix(scene, ramp(rings, np.clip(d / 2.3 + 0.09 * np.sin(9 * d), 0, 1)), glow)
    moon = (np.hypot(u - 0.86, v - 0.15) < 0.05) & (np.hypot(u - 0.835, v - 0.135) > 0.042)
    scene[moon] = rgb("ffc531")

    # Hills, village and cypress.
    far = 0.66 - 0.07 * np.sin(4.3 * u + 0.6) - 0.035 * np.sin(10 * u)
    near = 0.76 + 0.05 * np.sin(5.1 * u + 2.4)
    land = v > far
    scene[land] = ramp(palette("2e5a8f 26437a 1b2c5c 33586a"), np.clip((v - far) * 6, 0, 1))[land]
    scene[(v - far > 0) & (v - far < 0.012)] = rgb("86b0c4")
    meadow = v > near
    scene[meadow] = ramp(palette("4d7247 2f5444 1d3748 12213c"), np.clip((v - near) * 4.5, 0, 1))[meadow]
    slope = np.gradient(near[0]) * n
    angle = np.where(land, np.arctan(slope)[None, :] + 0.25 * np.sin(14 * u + 9 * v), angle)
    details = np.zeros((n, n), bool)
    for _ in range(26):
        x = rng.uniform(0.32, 0.97)
        y = np.interp(x, u[0], near[0]) + rng.uniform(-0.005, 0.05)
        w, h = rng.uniform(0.016, 0.03), rng.uniform(0.014, 0.024)
        house = (np.abs(u - x) < w) & (np.abs(v - y) < h)
        roof = (v < y - h) & (v > y - h - 0.02 * (1 - np.abs(u - x) / w / 1.15))
        scene[house] = rgb(rng.choice(["3f5f86", "5a7a94", "2d4a78", "7f8f86"]))
        scene[roof] = rgb(rng.choice(["7c3d2f", "9a5433", "43304a"]))
        for _ in range(rng.integers(1, 3)):
            lamp = np.hypot(u - x - rng.uniform(-0.6, 0.6) * w, (v - y) * 0.8) < 0.0055
            scene[lamp] = rgb("ffd34d")
        details |= house | roof
    spire = (np.abs(u - 0.64) < 0.045 * (v - 0.60) + 0.002) & (v > 0.60) & (v < 0.78)
    scene[spire] = rgb("39507c")
    sway = 0.175 + 0.018 * np.sin(13 * v) + 0.01 * np.sin(31 * v)
    spread = 0.085 * np.clip((v - 0.2) / 0.7, 0, 1) ** 0.75 + 0.006 * np.sin(60 * v)
    cypress = (np.abs(u - sway) < spread) & (v > 0.2)
    leaf = palette("0d1c1f 17352c 2c4a2d 54602f 1b2b35")
    scene[cypress] = ramp(leaf, np.clip(0.5 + 0.5 * np.sin(70 * (u - sway) / (spread + 0.1) + 3 * v), 0, 1))[cypress]
    angle = np.where(cypress, -np.pi / 2 + 0.55 * np.sin(26 * v + 25 * u), angle)

    canvas = Canvas(scene * 0.72)
    flow_pass(canvas, scene, angle, rng, 2600, 21, 125, 0.09)
    flow_pass(canvas, scene, angle, rng, 6000, 12, 85, 0.09)
    halo = np.zeros((n, n), bool)
    for x, y, r in stars:
        halo |= np.hypot(u - x, v - y) < 2.0 * r
    flow_pass(canvas, scene, angle, rng, 1500, 9, 46, 0.05, halo & ~land)
    flow_pass(canvas, scene, angle, rng, 2600, 8, 70, 0.10, (tone > 0.6) & ~land & ~cypress)
    flow_pass(canvas, scene, angle * 0.2, rng, 1500, 7, 18, 0.05, details | spire)
    flow_pass(canvas, scene, angle, rng, 1100, 10, 85, 0.12, cypress)
    lamps = (scene[..., 0] > 0.98) & land & ~cypress
    flow_pass(canvas, scene, angle * 0, rng, 160, 7, 10, 0.03, lamps)
    return canvas.lit(0.16, 0.22, canvas_weave(n))


class Leading:
    """A stained-glass or mosaic drawing: every pixel has a piece number, every piece a colour."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.piece = np.zeros((n, n), np.int64)
        self.colours: list[Array] = [np.zeros(3, np.float32)]

    def place(self, mask: Array, part: Array, colour: Callable[[int], Array]) -> None:
        """Lay the pieces numbered by `part` where `mask` holds, over what was there."""
        values, number = np.unique(part[mask], return_inverse=True)
        self.piece[mask] = number + len(self.colours)
        self.colours += [colour(int(value)) for value in values]

    def flat(self) -> Array:
        """The picture with every piece in its plain colour."""
        return np.stack(self.colours)[self.piece]

    def edge_distance(self) -> Array:
        """Distance of each pixel to the nearest border between pieces."""
        p = self.piece
        border = np.zeros(p.shape, bool)
        border[:, 1:] |= p[:, 1:] != p[:, :-1]
        border[1:] |= p[1:] != p[:-1]
        return ndi.distance_transform_edt(~border)


def cells(n: int, u: Array, v: Array, seeds: Array) -> Array:
    """Number of the nearest seed (u, v) for every pixel."""
    return cKDTree(seeds).query(np.stack([u.ravel(), v.ravel()], 1))[1].reshape(n, n)


def stained_glass() -> Array:
    """Leaded window: a sun with rays over mountains and a lake, tulips in front."""
    rng = np.random.default_rng(5)
    n = SIZE * 3
    u, v = unit_grid(n)
    wu, wv = u + 0.004 * noise(n, 7, rng), v + 0.004 * noise(n, 7, rng)
    window = Leading(n)
    everywhere = np.ones((n, n), bool)

    def shades(codes: str, spread: float = 0.07) -> Callable[[int], Array]:
        colours = palette(codes)
        return lambda _: rng.choice(colours) * (1 + spread * rng.standard_normal()) + rng.normal(0, 0.025, 3)

    # Sky: rings of rays round the sun, from gold through rose to ultramarine.
    sx, sy = 0.60, 0.34
    r, turn = np.hypot(wu - sx, wv - sy), (np.arctan2(wv - sy, wu - sx) / (2 * np.pi)) % 1
    edges = np.array([0.045, 0.115, 0.20, 0.29, 0.40, 0.54, 0.72])
    ring = np.searchsorted(edges, r.ravel()).reshape(n, n)
    rays = np.array([1, 10, 20, 20, 20, 40, 40, 40])[ring]
    shift = np.array([0, 0, 0, 0.5, 0, 0, 0.5, 0])[ring]
    part = ring * 100 + (np.floor(turn * rays + shift).astype(int) % rays)
    tones = palette("fff3a8 ffd23b ff9a26 f2603a d33a6a 8a3f9e 3c4fc0 1d3fa8")
    others = palette("ffe88a ffb726 ffc04a ff8a4a f0668a 5f58c0 2a7ad0 2d2f8f")

    def sky(code: int) -> Array:
        base = (others if code % 2 else tones)[code // 100]
        return base * (1 + 0.10 * rng.standard_normal()) + rng.normal(0, 0.03, 3)

    window.place(everywhere, part, sky)

    # Mountains in facets, then a lake of long wavy panes with the sun's track.
    for top, bend, codes, count in [
        (0.47, (0.10, 7.0, 0.4, 0.045, 17.0), "4a5fb8 6f6fd0 3f80c8 7f5fb0 9fb0e8", 60),
        (0.56, (0.06, 9.0, 2.4, 0.03, 23.0), "1f8f86 2fae8a 157a6a 59c08a 1a6a86", 70),
    ]:
        amp, f, phase, small, f2 = bend
        ridge = top + amp * np.abs(np.sin(f * u * 0.5 + phase)) * -1.1 + small * np.sin(f2 * u + phase)
        seeds = rng.uniform(0, 1, (count, 2))
        facets = cells(n, wu * 1.0 + 0.35 * wv, wv * 0.8, seeds * [1.3, 0.8])
        window.place(wv > ridge, facets, shades(codes, 0.12))
    water = wv > 0.625 + 0.008 * np.sin(9 * u)
    band = np.floor((wv - 0.6 + 0.010 * np.sin(11 * wu + 9 * wv)) / (0.028 + 0.035 * (wv - 0.6))).astype(int)
    piece = np.floor(wu * 5.3 + 0.37 * band + 0.15 * np.sin(band * 2.1)).astype(int)
    window.place(water, band * 50 + piece + 500, shades("1aa7b8 1489b0 35c2c0 0f6f9f 6fd6cf 1c5fa8", 0.10))
    track = water & (np.abs(wu - sx - 0.02 * np.sin(40 * wv)) < 0.035 + 0.10 * (wv - 0.62))
    window.place(track, band + 50, shades("ffcf4a ff9f3f ffe27a f7784a", 0.06))

    # Tulips: lens-shaped leaves, stems, three petals each.
    def lens(x0: float, y0: float, x1: float, y1: float, fat: float, bend: float = 0.0) -> Array:
        dx, dy = x1 - x0, y1 - y0
        size = np.hypot(dx, dy)
        s = ((u - x0) * dx + (v - y0) * dy) / size**2
        t = ((v - y0) * dx - (u - x0) * dy) / size - bend * np.sin(np.pi * np.clip(s, 0, 1))
        return (s > 0) & (s < 1) & (np.abs(t) < fat * np.sin(np.pi * np.clip(s, 0, 1) ** 0.8))

    zero = np.zeros((n, n), int)
    greens = shades("2f9e3f 1f7a34 7fc043 4fae4a a8d04a", 0.08)
    for x, y, size, lean in [(0.13, 0.58, 1.15, 0.02), (0.31, 0.73, 0.9, -0.03), (0.88, 0.66, 1.0, -0.03)]:
        foot = x + lean
        for side in (-1, 1):
            tip = foot + side * 0.10 * size
            leaf = lens(foot, 1.04, tip, y + 0.17 * size, 0.036 * size, -0.03 * side)
            half = lens(foot, 1.04, tip, y + 0.17 * size, 0.018 * size, -0.03 * side - 0.018 * size)
            window.place(leaf, half + (np.floor(v * 9).astype(int) * 2), greens)
        stem = (np.abs(u - (x + lean * smoothstep(y, 1.0, v))) < 0.0085) & (v > y)
        window.place(stem, np.floor(v * 7).astype(int), greens)
        reds = shades("d81f3a f03a2f b3123f ff5a4a e0286a", 0.08)
        for dx, tall, fat in table("-0.058 0.15 0.03, 0.058 0.15 0.03, -0.018 0.165 0.032, 0.018 0.165 0.032"):
            base = (x, y + 0.02 * size)
            window.place(lens(*base, x + dx * size, y - tall * size, fat * size, -0.4 * dx * size), zero, reds)
        window.place(lens(x, y + 0.024 * size, x, y - 0.125 * size, 0.042 * size), zero, reds)

    # A border of small panes.
    rim = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    lap = np.where(np.minimum(u, 1 - u) < np.minimum(v, 1 - v), v, u)
    sides = np.floor(lap * 14.999).astype(int) + 20 * ((u > v).astype(int) + 2 * (u + v > 1))
    window.place(rim < 0.035, sides, shades("7a1f4f 1f3f8f b3123f 2f5fb8 e0a030 1f7a6a", 0.1))

    # Glass: streaks, seeds (bubbles), darker towards the lead, light from behind.
    gap = window.edge_distance()
    glass = window.flat()
    swirl = noise(n, (9, 30), rng, 3) * np.cos(window.piece * 2.4) + noise(n, (30, 9), rng, 3) * np.sin(
        window.piece * 2.4
    )
    glass = glass * (1 + 0.085 * swirl + 0.05 * noise(n, 120, rng, 2))[..., None]
    glass = glass * (0.62 + 0.5 * smoothstep(2, 34, gap))[..., None]
    glow = np.exp(-((r / 0.33) ** 2))
    glass = glass * (0.90 + 0.30 * glow)[..., None] + (0.05 * glow * smoothstep(5, 40, gap))[..., None]
    ripple = ndi.gaussian_filter(rng.standard_normal((n, n)), 5) * 22 + noise(n, 40, rng) * 2
    glass = relight(glass, ripple, 0.13, 0.35)

    # Lead: rounded strips, thicker round the main shapes, catching light on top.
    half = 6.2 + 1.1 * noise(n, 40, rng)
    came = np.sqrt(np.clip(1 - (gap / half) ** 2, 0, 1)) * half
    pits = ndi.gaussian_filter(rng.standard_normal((n, n)), 1.5)
    lead = relight(np.full((n, n, 3), rgb("35363c")) * (1 + 0.25 * pits)[..., None], came + pits, 0.8, 0.5)
    bloom = ndi.gaussian_filter(glass * (gap > half)[..., None], (14, 14, 0))
    return mix(glass, lead, smoothstep(half + 1, half - 1, gap)) + 0.10 * bloom


def paper(n: int, rng: Rng, tint: str) -> Array:
    """Hand-made paper: cream, cloudy, with fine grain and a few fibres."""
    grain = 0.6 * noise(n, n / 5, rng) + 0.5 * noise(n, n / 2.2, rng)
    fibres = Image.new("F", (n, n))
    draw = ImageDraw.Draw(fibres)
    for _ in range(420):
        x, y, a = rng.uniform(0, n), rng.uniform(0, n), rng.uniform(0, 2 * np.pi)
        bends = []
        for _ in range(rng.integers(5, 16)):
            bends.append((x, y))
            a += rng.normal(0, 0.3)
            x, y = x + 6 * np.cos(a), y + 6 * np.sin(a)
        draw.line(bends, fill=float(rng.uniform(-1, 0.8)), width=2)
    sheet = rgb(tint) * (1 + 0.022 * noise(n, 5, rng, 3) + 0.022 * np.asarray(fibres))[..., None]
    return relight(sheet, grain, 0.09, 0.0)


class Ink:
    """Ink on paper, kept as an amount of ink per pixel."""

    def __init__(self, n: int, rng: Rng) -> None:
        self.n = n
        self.rng = rng
        self.amount = np.zeros(n * n, np.float32)

    def field(self) -> Array:
        """The ink as an editable field (n, n)."""
        return self.amount.reshape(self.n, self.n)

    def stroke(self, path: Array, width: Array | float, ink: float, dry: float = 0.4, wet_edge: float = 0.5) -> None:
        """One pull of a soft brush (path in u, v; width in pixels): darker rims, dry streaks at the end."""
        index, s, t = sweep(np.asarray(path) * self.n, width, self.n)
        hair = bristles(t.size, self.rng, 1.5)
        slow = np.interp(s, np.linspace(0, 1, 9), self.rng.normal(0, 0.35, 9))
        load = 1.25 - dry * 2.2 * s**1.6 + 0.5 * hair * (0.4 + dry) + 0.4 * dry * slow
        rim = wet_edge * np.exp(-(((np.abs(t) - 0.88) / 0.12) ** 2))
        tone = ink * (0.75 + 0.16 * hair + 0.25 * slow + rim - 0.18 * t)
        keep = (load > 0.35) & (np.abs(t) < 1 + 0.08 * hair)
        self.amount[index[keep]] = np.maximum(self.amount[index[keep]] * 0.55 + tone[keep] * 0.6, tone[keep])

    def splash(self, x: float, y: float, count: int, reach: float, ink: float) -> None:
        """Drops flung from the brush."""
        for _ in range(count):
            a, d = self.rng.uniform(0, 2 * np.pi), reach * self.rng.exponential(0.5)
            cx, cy, r = (
                (x + d * np.cos(a)) * self.n,
                (y + d * np.sin(a)) * self.n,
                1.2 + self.rng.exponential(1.7),
            )
            ys, xs = np.mgrid[int(cy - r - 2) : int(cy + r + 3), int(cx - r - 2) : int(cx + r + 3)]
            inside = (np.hypot(xs - cx, ys - cy) < r) & (xs >= 0) & (ys >= 0) & (xs < self.n) & (ys < self.n)
            self.field()[ys[inside], xs[inside]] = ink * self.rng.uniform(0.5, 1.0)


def ink_wash() -> Array:
    """Sumi-e: misty mountains in grey washes, bamboo in black ink, a red seal, on cream paper."""
    rng = np.random.default_rng(23)
    n = SIZE * 2
    u, v = unit_grid(n)
    ink = Ink(n, rng)
    sheet = paper(n, rng, "f1e7d0")
    bleed = noise(n, 9, rng, 4)
    pool = noise(n, (14, 26), rng, 4)

    # Mountains, far to near: ink along the ridge, fading into mist below; then dry texture strokes.
    for top, rough, fade, tone, peaks in [
        (0.33, 0.030, 0.16, 0.30, [(0.62, 0.15, 0.17), (0.30, 0.08, 0.13)]),
        (0.46, 0.040, 0.17, 0.60, [(0.36, 0.25, 0.10), (0.22, 0.12, 0.09), (0.95, 0.10, 0.15)]),
        (0.66, 0.045, 0.16, 1.00, [(0.08, 0.24, 0.10), (0.60, 0.10, 0.11), (0.24, 0.10, 0.08)]),
    ]:
        line = u[0]
        ridge = top - sum(h * np.exp(-(((line - x) / w) ** 2)) for x, h, w in peaks)
        ridge = ridge + rough * noise(n, (9, 4), rng, 6)[n // 2] * 0.45
        depth = v - ridge[None, :] + 0.004 * bleed
        body = smoothstep(-0.002, 0.003, depth) * np.exp(-np.clip(depth, 0, 1) / fade)
        wash = tone * body * np.clip(0.55 + 0.22 * pool + 0.12 * bleed, 0.08, 1.4)
        wash += tone * 0.55 * np.exp(-(((depth - 0.003) / 0.004) ** 2)) * np.clip(0.6 + 0.5 * bleed, 0, 1.2)
        below = smoothstep(0, 0.05, depth)
        ink.field()[:] = ink.field() * (1 - below * 0.85 * smoothstep(0.3, 0.0, depth)) * (1 - 0.15 * below) + wash
        for _ in range(int(150 * tone)):
            x = rng.uniform(0, 1)
            y = np.interp(x, line, ridge) + abs(rng.normal(0, 0.05)) + 0.004
            down = np.interp(x + 0.01, line, ridge) - np.interp(x - 0.01, line, ridge)
            lean, size = np.clip(down * 25, -0.9, 0.9), rng.uniform(0.015, 0.05)
            path = [(x, y), (x + lean * size * 0.5, y + size * 0.5), (x + lean * size, y + size)]
            strength = tone * rng.uniform(0.3, 0.65) * np.exp(-(y - np.interp(x, line, ridge)) / 0.09)
            ink.stroke(spline(path, 6), np.linspace(rng.uniform(5, 13), 1, 13), strength, 0.75, 0.2)
    # Pines on the near ridge, reeds of mist and birds.
    for _ in range(22):
        x = rng.uniform(0.0, 0.40)
        y = np.interp(x, line, ridge) + 0.008
        tall = rng.uniform(0.03, 0.06)
        ink.stroke(np.array([(x, y), (x + 0.002, y - tall)]), 2.2, 1.3, 0.1)
        for k in range(4):
            w = tall * (0.45 - 0.08 * k)
            branch = [
                (x - w, y - tall * (0.35 + 0.2 * k) + 0.003),
                (x, y - tall * (0.42 + 0.2 * k)),
                (x + w, y - tall * (0.35 + 0.2 * k)),
            ]
            ink.stroke(spline(branch, 5), 2.8, 1.2, 0.5, 0.1)
    for x, y, s in [(0.30, 0.125, 0.026), (0.37, 0.095, 0.020), (0.41, 0.135, 0.016), (0.25, 0.085, 0.015)]:
        wings = [
            (x - s, y - 0.4 * s),
            (x - 0.4 * s, y - 0.55 * s),
            (x, y),
            (x + 0.5 * s, y - 0.6 * s),
            (x + 1.1 * s, y - 0.2 * s),
        ]
        ink.stroke(spline(wings, 8), np.interp(np.linspace(0, 1, 33), [0, 0.5, 1], [1.5, 5, 1.5]), 1.9, 0.1)

    # Water: a few long dry strokes.
    for _ in range(16):
        x, y, w = rng.uniform(0.25, 0.7), rng.uniform(0.80, 0.96), rng.uniform(0.08, 0.28)
        path = spline([(x, y), (x + w / 2, y + rng.normal(0, 0.004)), (x + w, y + rng.normal(0, 0.004))], 12)
        ink.stroke(
            path,
            np.interp(np.linspace(0, 1, len(path)), [0, 0.3, 1], [2, 9, 2]),
            rng.uniform(0.15, 0.4),
            0.8,
            0.2,
        )

    # Bamboo: jointed stalks, then leaves in groups.
    for x, lean, width, tone in [(0.90, -0.06, 25, 0.9), (0.80, 0.05, 18, 1.4), (0.965, 0.01, 15, 0.55)]:
        y, joint = 1.03, 0
        while y > -0.1:
            size = 0.145 - 0.006 * joint + rng.normal(0, 0.008)
            a, b = (x + lean * (1 - y), y), (x + lean * (1 - y + size), y - size + 0.008)
            mid = ((a[0] + b[0]) / 2 + rng.normal(0, 0.001), (a[1] + b[1]) / 2)
            path = spline([a, mid, b], 20)
            swell = np.interp(np.linspace(0, 1, len(path)), [0, 0.06, 0.5, 0.94, 1], [1.12, 0.98, 0.92, 0.98, 1.15])
            ink.stroke(path, width * swell * (1 - 0.03 * joint), tone, 0.30, 0.55)
            knot = spline(
                [
                    (b[0] - width / n * 0.62, b[1] - 0.002),
                    (b[0], b[1] - 0.007),
                    (b[0] + width / n * 0.62, b[1] - 0.003),
                ],
                8,
            )
            ink.stroke(knot, 5, 1.9, 0.2)
            y, joint = y - size, joint + 1
    for x, y, count, spread, tone in [
        (0.80, 0.30, 6, 1.0, 2.1), (0.70, 0.36, 5, 0.8, 1.7), (0.88, 0.14, 6, 1.0, 2.0),
        (0.76, 0.11, 5, 0.8, 1.1), (0.93, 0.42, 5, 0.9, 1.9), (0.83, 0.56, 4, 0.7, 1.2),
        (0.95, 0.66, 4, 0.8, 0.8), (0.64, 0.22, 4, 0.6, 0.8),
    ]:  # fmt: skip
        twig = spline([(x + 0.07, y - 0.05), (x + 0.03, y - 0.015), (x, y)], 8)
        ink.stroke(twig, np.linspace(4, 2.5, len(twig)), tone * 0.8, 0.3)
        for k in range(count):
            a = np.pi / 2 + 0.35 + spread * (k / (count - 1) - 0.5) * 2.3 + rng.normal(0, 0.12)
            size = rng.uniform(0.09, 0.155)
            bend = rng.normal(0, 0.12)
            d, e = np.array([np.cos(a), np.sin(a)]), np.array([-np.sin(a), np.cos(a)])
            at = np.array([x, y])
            path = spline([tuple(at), tuple(at + d * size * 0.5 + e * size * bend), tuple(at + d * size)], 16)
            leaf = np.interp(np.linspace(0, 1, len(path)), [0, 0.1, 0.38, 0.75, 1], [2, 6, 21, 9, 0.8])
            ink.stroke(path, leaf * size / 0.13, tone * rng.uniform(0.75, 1.1), 0.42, 0.25)
    ink.splash(0.72, 0.47, 50, 0.12, 1.5)
    ink.splash(0.22, 0.86, 34, 0.10, 0.9)

    # Ink sinks into the paper: soft bleeding, granulation in the grain.
    amount = 0.72 * ndi.gaussian_filter(ink.field(), 0.8) + 0.28 * ndi.gaussian_filter(ink.field(), 5)
    amount = np.clip(amount, 0, 2.6) * np.clip(1 + 0.10 * noise(n, 300, rng) + 0.06 * noise(n, 60, rng, 2), 0.5, 1.5)
    picture = sheet * np.exp(-amount[..., None] * np.array([1.18, 1.12, 1.02]))

    # The seal: a carved red square.
    du, dv = u - 0.105, v - 0.885
    stamp = np.maximum(np.abs(du), np.abs(dv)) + 0.0015 * noise(n, 60, rng)
    carved = (np.abs(dv + 0.017) < 0.004) | (np.abs(dv - 0.018) < 0.004) | ((np.abs(du) < 0.004) & (dv > -0.016))
    carved |= (np.abs(np.hypot(du, dv - 0.002) - 0.014) < 0.0035) & (du > 0)
    red = (stamp < 0.036) & ~((stamp < 0.029) & carved)
    press = np.clip(0.82 + 0.16 * noise(n, 90, rng, 3), 0, 0.95) * ndi.gaussian_filter(red.astype(np.float32), 1)
    return mix(picture, picture * rgb("c22a1e") * 1.05, press)


def tile_rows(
    free: Array, field: Array, pitch: float, size: tuple[float, float], rng: Rng
) -> list[tuple[float, float, float, Array, Array]]:
    """Lay tesserae along the level lines of `field` (in pixels of distance) over the `free` pixels.

    Each tile is (x, y, angle, rows, columns of its pixels); a tile is cut to the pixels still free, and
    dropped if too little is left.  `free` is updated.
    """
    n = len(free)
    gy, gx = np.gradient(ndi.gaussian_filter(field, 3))
    slope = np.hypot(gx, gy) + 1e-6
    gx, gy = gx / slope, gy / slope
    row = np.round(field / pitch)
    starts = np.flatnonzero(free & (np.abs(field - row * pitch) < 0.8))
    starts = starts[np.lexsort((rng.random(len(starts)), row.ravel()[starts]))]
    used = ~free
    along, across = size
    half = np.hypot(along, across) / 2 + 1
    tiles = []

    def try_tile(x: float, y: float, least: float) -> bool:
        ix, iy = int(x), int(y)
        if not (0 <= ix < n and 0 <= iy < n) or used[iy, ix]:
            return False
        c, s = -gy[iy, ix], gx[iy, ix]
        y0, y1, x0, x1 = max(0, int(y - half)), int(y + half) + 1, max(0, int(x - half)), int(x + half) + 1
        block = used[y0:y1, x0:x1]
        dy, dx = np.ogrid[y0 - y : y0 - y + block.shape[0], x0 - x : x0 - x + block.shape[1]]
        p, q = dx * c + dy * s, dy * c - dx * s
        box = (np.abs(p) <= along / 2) & (np.abs(q) <= across / 2)
        cut = box & ~block
        if cut.sum() < least * along * across:
            return False
        ys, xs = np.nonzero(cut)
        tiles.append((x, y, np.arctan2(s, c), ys + y0, xs + x0))
        grown = (np.abs(p) <= along / 2 + 1.2) & (np.abs(q) <= across / 2 + 1.2)
        block[grown] = True
        return True

    for start in starts:
        x, y = start % n + 0.5, start // n + 0.5
        if not try_tile(x, y, 0.72):
            continue
        for way in (1, -1):
            px, py = x, y
            for _ in range(600):
                ix, iy = min(int(px), n - 1), min(int(py), n - 1)
                stride = way * (along + rng.uniform(1.6, 3.0))
                px, py = px - gy[iy, ix] * stride, py + gx[iy, ix] * stride
                if not (0 <= px < n and 0 <= py < n):
                    break
                ix, iy = int(px), int(py)
                off = np.clip((field[iy, ix] - np.round(field[iy, ix] / pitch) * pitch) / slope[iy, ix], -4, 4)
                px, py = px - gx[iy, ix] * off, py - gy[iy, ix] * off
                if not try_tile(px, py, 0.45):
                    break
    for spot in rng.permutation(np.flatnonzero(~used))[:40000]:
        if not used.ravel()[spot]:
            try_tile(spot % n + 0.5, spot // n + 0.5, 0.2)
    free &= ~used
    return tiles


def mosaic() -> Array:
    """Roman floor: a leaping fish in gold and terracotta over teal waves, tiles laid along the shapes."""
    rng = np.random.default_rng(8)
    n = SIZE * 2
    u, v = unit_grid(n)

    # Shapes, as polygons.
    spine = spline(table("0.17 0.6, 0.27 0.41, 0.46 0.31, 0.64 0.36, 0.76 0.5, 0.79 0.6"), 30)
    girth = np.interp(
        np.linspace(0, 1, len(spine)),
        [0, 0.12, 0.35, 0.6, 0.85, 1],
        [0.008, 0.075, 0.125, 0.105, 0.045, 0.03],
    )
    normal = np.gradient(spine, axis=0)
    normal = np.stack([-normal[:, 1], normal[:, 0]], 1) / np.hypot(*normal.T)[:, None]
    body = polygon_mask(n, np.concatenate([spine + normal * girth[:, None], (spine - normal * girth[:, None])[::-1]]))
    tail = spline(
        table("0.785 0.57, 0.88 0.6, 0.935 0.7, 0.84 0.69, 0.79 0.68, 0.74 0.73, 0.66 0.8, 0.67 0.69, 0.75 0.61"),
        12,
        True,
    )
    back = spline(table("0.33 0.28, 0.38 0.16, 0.52 0.12, 0.66 0.2, 0.73 0.37, 0.64 0.3, 0.5 0.22"), 12, True)
    belly = spline(table("0.42 0.42, 0.5 0.53, 0.5 0.62, 0.39 0.57, 0.34 0.46"), 12, True)
    fins = (polygon_mask(n, tail) | polygon_mask(n, back) | polygon_mask(n, belly)) & ~body
    fish = body | fins
    tree = cKDTree(spine)
    gap, nearest = tree.query(np.stack([u.ravel(), v.ravel()], 1))
    gap, along = gap.reshape(n, n), (nearest / len(spine)).reshape(n, n)
    rim = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    frame = rim < 0.085
    sea_line = 0.73 + 0.028 * np.sin(17 * u + 0.5) + 0.012 * np.sin(31 * u)
    sun = np.hypot(u - 0.80, v - 0.22) < 0.085
    eye_at = np.hypot(u - 0.262, v - 0.475)

    # Level-line fields: rows of tiles follow these.
    outside = ndi.distance_transform_edt(~fish)
    inside = ndi.distance_transform_edt(body)
    waves = n * (v - sea_line)
    sunset = n * np.hypot(u - 0.80, v - 0.22)
    lobes = n * np.hypot(u - 0.76, v - 0.55)

    sea = (v > sea_line) & ~fish & ~frame
    sky = ~sea & ~fish & ~frame & ~sun
    near = sky & (outside < 34)
    eye = eye_at < 0.021
    zones = [
        (eye, n * eye_at, 9.0),
        (body & ~eye, inside - 6.0, 11.5),
        (fins, lobes, 11.5),
        (sun & ~fish & ~frame & ~sea, sunset, 13.0),
        (sea, waves, 13.5),
        (near, outside - 6.5, 13.0),
        (sky & ~near, 0.65 * outside + 0.35 * sunset, 14.0),
        (frame, n * rim, 14.6),
    ]
    gold, clay = palette("f0c14a e3a72f d98a2b f6d77a"), palette("b5482a c9603a 9a3a24 d57a4c")
    teal, deep = palette("2f8f8c 4fb0a4 1f6f78 7cc6b4"), palette("17515f 1c6a7a 0f3f50 2a8490")
    cream, dusk = palette("efe3c6 e4d4ae f6eeda dac79c"), palette("c9d8c0 b7cdbb e2dfc2 d6e0cc")

    def tone(x: float, y: float) -> Array:
        """Colour of a tile from where it lies."""
        ix, iy = min(int(x), n - 1), min(int(y), n - 1)
        pick = rng.integers(4)
        if eye[iy, ix]:
            return rgb("1a1c22") if eye_at[iy, ix] < 0.011 else rgb("f8f0dc")
        if body[iy, ix]:
            if along[iy, ix] < 0.22:
                return (clay if inside[iy, ix] < 12 else gold)[pick]
            if inside[iy, ix] < 10:
                return clay[2] * rng.uniform(0.85, 1.1)
            side = (x / n - spine[int(along[iy, ix] * len(spine))][0]) * 0.2 + y / n
            below = side > spine[int(along[iy, ix] * len(spine))][1]
            scale = int(along[iy, ix] * 22 + 1.6 * np.cos(gap[iy, ix] * 70)) % 2
            if below and gap[iy, ix] > 0.035:
                return cream[pick]
            return gold[pick] if scale else clay[pick]
        if fins[iy, ix]:
            return (clay if int(lobes[iy, ix] / 23) % 2 else gold)[pick]
        if frame[iy, ix]:
            band = int(rim[iy, ix] * n / 14.6 + 0.5)
            if band in (2, 3, 4):
                lap = x if min(y, n - y) < min(x, n - x) else y
                return (clay if int(lap / 29 + (band % 2) * 0.5) % 2 else cream)[pick]
            return (deep[2] if band in (1, 5) else clay[2]) * rng.uniform(0.85, 1.2)
        if sea[iy, ix]:
            line = int(waves[iy, ix] / 13.5 + 0.5)
            return (
                cream[pick]
                if line == 0 or (line == 5 and rng.random() < 0.5)
                else (teal if line % 4 in (1, 2) else deep)[pick]
            )
        if sun[iy, ix]:
            return (gold if int(sunset[iy, ix] / 26) % 2 else clay)[pick]
        if near[iy, ix] and outside[iy, ix] < 13:
            return deep[2] * rng.uniform(0.9, 1.15)
        glow = np.exp(-sunset[iy, ix] / n / 0.16)
        return mix((dusk if rng.random() < 0.75 else cream)[pick], gold[pick], 0.75 * glow * (rng.random() < 0.8))

    grout = rgb("8b7d68") * (0.8 + 0.09 * noise(n, 200, rng, 2) + 0.04 * noise(n, 12, rng))[..., None]
    picture, height = grout.astype(np.float32), 0.9 * noise(n, 260, rng)
    for mask, field, pitch in zones:
        free = ndi.binary_erosion(mask, iterations=1)
        for x, y, angle, ys, xs in tile_rows(free, field, pitch, (pitch * rng.uniform(0.95, 1.1), pitch - 2.2), rng):
            colour = tone(x, y) * (1 + 0.09 * rng.standard_normal()) + rng.normal(0, 0.018, 3)
            picture[ys, xs] = colour
            tilt = rng.normal(0, 0.11, 2)
            height[ys, xs] = 7 + (xs - x) * tilt[0] + (ys - y) * tilt[1] + 0.5 * rng.standard_normal()
            vein = 0.035 * np.sin(0.9 * ((xs - x) * np.cos(2 * angle) + (ys - y)) + 6 * rng.random())
            picture[ys, xs] += vein[:, None]
    stone = ndi.gaussian_filter(rng.standard_normal((n, n)), 1.2)
    picture = picture * (1 + 0.14 * stone + 0.03 * noise(n, 6, rng, 3))[..., None]
    picture = picture * (0.75 + 0.25 * smoothstep(1.5, 6, ndi.gaussian_filter(height, 2.0)))[..., None]
    return relight(picture, ndi.gaussian_filter(height, 1.1) + 0.4 * stone, 0.32, 0.25)


def pointillism() -> Array:
    """Dots of pure colour: a river at sunset between poplars, a sail, a flowery bank in front."""
    rng = np.random.default_rng(31)
    n = SIZE * 2
    u, v = unit_grid(n)
    cloud = noise(n, (5, 16), rng, 4)

    # Scene: glowing sky, violet hills, water that mirrors them, trees, bank.
    horizon = 0.50
    sky = ramp(palette("3f78b4 6fa6c0 b9cba6 f6d98a fbb95a f58a48"), np.clip(v / horizon + 0.05 * cloud, 0, 1))
    sky = mix(sky, rgb("f58a78"), 0.75 * smoothstep(0.5, 1.5, cloud) * smoothstep(0.02, 0.3, v))
    sky = mix(sky, rgb("fff0c0"), 0.9 * np.exp(-(((u - 0.40) ** 2 + (v - 0.415) ** 2) / 0.09**2)))
    sky = mix(sky, rgb("fff8dc"), smoothstep(0.046, 0.040, np.hypot(u - 0.40, v - 0.415)))
    kind = np.zeros((n, n), int)
    scene = sky.copy()

    def lay(mask: Array, colour: Array, number: int) -> None:
        scene[mask] = np.broadcast_to(colour, scene.shape)[mask]
        kind[mask] = number

    upper = v < horizon
    hill = horizon - 0.075 - 0.045 * np.sin(5 * u + 2.2) - 0.02 * np.sin(13 * u)
    lay(upper & (v > hill), ramp(palette("7a6cae 8d78b4 b08aa6"), np.clip((v - hill) / 0.1, 0, 1)), 1)
    low = horizon - 0.028 - 0.012 * np.sin(11 * u + 1) - 0.007 * np.sin(29 * u)
    lay(upper & (v > low), ramp(palette("3f6f6a 5f8a5a 7f9a52"), np.clip((v - low) / 0.04, 0, 1)), 1)
    leafy = noise(n, 26, rng, 3)
    for x, top, wide in table(
        "0.7 0.1 0.034, 0.775 0.03 0.042, 0.86 0.13 0.036, 0.935 0.06 0.045, 0.07 0.24 0.03, 0.125 0.31 0.024"
    ):
        s = np.clip((v - top) / (horizon + 0.012 - top), 0, 1)
        edge = wide * np.sin(np.pi * np.clip(s, 0.0, 0.94) ** 0.75) * (1 + 0.16 * leafy)
        tree = (np.abs(u - x) < edge) & (v > top) & (v < horizon + 0.012)
        light = np.clip(0.5 - 0.5 * (u - x) / wide + 0.2 * leafy, 0, 1)
        lay(tree, ramp(palette("1f3a5f 2a5f5a 4f8a45 a8b23f e8c04a"), light), 2)
    mirrored = np.clip((2 * horizon - v + 0.02) * n + 5 * np.sin(90 * v + 6 * u), 0, n - 1).astype(int)
    drift = np.clip(u * n + (8 * np.sin(120 * v + 9 * cloud)) * smoothstep(0.5, 0.6, v), 0, n - 1).astype(int)
    reflection = scene[mirrored, drift] * np.array([0.80, 0.84, 0.92])
    ripple = np.sin(95 * np.clip(v - 0.5, 0, 1) ** 0.85 + 1.6 * noise(n, (4, 12), rng, 2))
    water = v >= horizon + 0.004
    shine = np.exp(-(((u - 0.40) / (0.03 + 0.16 * (v - 0.5))) ** 2))
    surface = mix(
        reflection * 0.95,
        ramp(palette("5f6fb8 2f6fb0 1f5f9a 2a4f86"), np.clip((v - 0.5) * 2.6, 0, 1)),
        np.clip(0.46 + 0.36 * ripple, 0, 1),
    )
    surface = mix(surface, rgb("ffdf8a"), 0.92 * shine * smoothstep(0.5, -0.3, ripple))
    lay(water & (kind != 2), surface, 3)
    sail = polygon_mask(n, np.array([(0.285, 0.365), (0.29, 0.525), (0.225, 0.525)]))
    jib = polygon_mask(n, np.array([(0.295, 0.39), (0.297, 0.525), (0.335, 0.525)]))
    lay(sail, rgb("fbe9c8"), 4)
    lay(jib, rgb("f2b58a"), 4)
    lay(
        polygon_mask(n, np.array([(0.205, 0.532), (0.345, 0.532), (0.325, 0.555), (0.23, 0.555)])),
        rgb("5a2f4f"),
        4,
    )
    lay(
        (np.abs(u - 0.27) < 0.04 * (1 - (v - 0.56) / 0.14)) & (v > 0.56) & (v < 0.68) & (ripple > -0.2),
        rgb("e8cfae"),
        3,
    )
    bank = 0.80 + 0.10 * np.sin(3.0 * u + 0.4) * 0.8 - 0.035 * np.sin(9 * u)
    meadow = ramp(palette("c9c04a 7fa03f 3f7a4a 24505a 2a3566"), np.clip((v - bank) / 0.24 + 0.07 * leafy, 0, 1))
    lay(v > bank, meadow, 5)
    flowers = (v > bank + 0.015) & (noise(n, 42, rng, 2) > 1.05)
    patch = ramp(palette("f2603a f7c53a f28ab0 f6efe0 d8406a"), np.clip(0.5 + 0.3 * noise(n, 7, rng, 2), 0, 1))
    lay(flowers, patch, 6)

    # Divide every colour: neighbours shift towards warm or cool, a few dots take the complement.
    accents = palette("f08a3c 3f6fc0 e85a6a 3fa08a f6d24a 8a5fb8")
    slant = np.where(kind == 3, 0.0, np.where(kind == 5, -1.2, np.where(kind == 2, 1.2, 0.5 + 0.4 * cloud)))
    canvas = Canvas(mix(scene * 0.75, rgb("e9dcc0"), 0.35))
    for count, radius, wild in [(7000, 10.0, 0.07), (12000, 7.6, 0.085), (11000, 6.0, 0.075)]:
        spots = rng.uniform(0, n, (count, 2))
        for x, y in spots:
            ix, iy = int(x), int(y)
            what = kind[iy, ix]
            colour = scene[iy, ix] + wild * 0.9 * rng.standard_normal(3) * (0.4 if what == 4 else 1)
            luck = rng.random()
            if luck < 0.035 and what != 4:
                colour = mix(colour, accents[rng.integers(6)], 0.62)
            elif luck < 0.20 and what not in (4, 6):
                colour = mix(colour, accents[rng.integers(6)], 0.36)
            grey = colour.mean()
            colour = np.clip(grey + (colour - grey) * 1.22, 0, 1)
            stretch = 1.5 if what in (2, 3, 5) else 1.15
            size = radius * rng.uniform(0.7, 1.2) * (0.8 if what == 4 else 1)
            canvas.dab(x, y, size, stretch * rng.uniform(0.9, 1.15), slant[iy, ix] + rng.normal(0, 0.25), colour)
    return canvas.lit(0.34, 0.12, canvas_weave(n))


def woodcut_waves() -> Array:
    """Colour woodcut: a great breaking wave in indigo on cream, a snow-capped mountain, a red sun."""
    rng = np.random.default_rng(17)
    n = SIZE * 3
    u, v = unit_grid(n)
    ink, mid, pale, cream = rgb("1b2a57"), rgb("33619a"), rgb("9dbdc8"), rgb("f3e8cd")
    grain = noise(n, (5, 150), rng, 3) * 0.6 + noise(n, (40, 320), rng) * 0.5
    image = Image.new("RGB", (n, n))

    def fill(colour: Array) -> tuple[int, ...]:
        return tuple(int(c * 255) for c in colour)

    # Sky with wiped gradation (bokashi): warm grey above, cream, rose at the horizon.
    sky = ramp(palette("6f7f8f b9b49c e6d6b0 f0dfba f0cfae e8b79a"), np.clip(v / 0.72, 0, 1))
    sky = mix(sky, rgb("cf3d2c"), smoothstep(0.0875, 0.086, np.hypot(u - 0.80, v - 0.25)))
    for y, x, w in [(0.19, 0.80, 0.16), (0.275, 0.88, 0.15), (0.33, 0.70, 0.10), (0.13, 0.62, 0.12)]:
        cloud = smoothstep(
            0.011,
            0.0098,
            np.abs(v - y + 0.004 * np.sin(30 * u)) / np.sqrt(np.clip(1 - ((u - x) / w) ** 2, 1e-6, 1)),
        )
        sky = mix(sky, rgb("efe0bd"), cloud * (np.abs(u - x) < w))
    image = Image.fromarray((np.clip(sky, 0, 1) * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)

    def shape(outline: Array, colour: Array) -> None:
        draw.polygon([tuple(p) for p in np.asarray(outline) * n], fill=fill(colour))

    def line(path: Array, width: Array | float, colour: Array) -> None:
        """A carved line of varying width: a chain of discs, with a slightly unsteady hand."""
        path = np.asarray(path, float)
        step = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
        at = np.linspace(0, step[-1], max(2, int(step[-1] * n / 1.5)))
        x, y = (np.interp(at, step, path[:, i]) * n for i in (0, 1))
        wide = np.interp(at, step, np.broadcast_to(width, len(path)))
        wide = wide * (1 + 0.16 * np.interp(at, np.linspace(0, step[-1], 30), rng.standard_normal(30)))
        for px, py, r in zip(x, y, wide / 2, strict=True):
            draw.ellipse((px - r, py - r, px + r, py + r), fill=fill(colour))

    def taper(count: int, width: float, start: float = 0.2) -> Array:
        return width * np.interp(np.linspace(0, 1, count), [0, 0.25, 0.7, 1], [start, 1, 0.9, 0.12])

    def bands(outer: Array, inner: Array, stops: list[tuple[float, Array]]) -> None:
        """Fill between two curves with stripes that follow both, ink lines between them."""
        edges = [outer * (1 - k) + inner * k for k, _ in stops] + [inner]
        for (_, colour), a, b in zip(stops, edges[:-1], edges[1:], strict=True):
            shape(np.concatenate([a, b[::-1]]), colour)
        for (_, colour), a, b in zip(stops, edges[:-1], edges[1:], strict=True):
            room = np.hypot(*(b - a).T).mean() * n
            other = pale if colour[2] < 0.5 else mix(ink, mid, 0.4)
            for k in np.linspace(0, 1, int(room / 15) + 2)[1:-1]:
                part = slice(rng.integers(0, len(a) // 3), len(a) - rng.integers(0, len(a) // 3))
                line((a * (1 - k) + b * k)[part], taper(len(a[part]), 2.6), mix(colour, other, 0.6))
        for edge in edges:
            line(edge, taper(len(edge), 5.0), ink)

    def foam(path: Array, size: float, side: float, claws: bool) -> None:
        """Scalloped foam along a crest: outlined puffs, and hooked fingers reaching forward."""
        d = np.gradient(path, axis=0)
        out = np.stack([d[:, 1], -d[:, 0]], 1) / (np.hypot(*d.T)[:, None] + 1e-9) * side
        puffs = []
        for k in np.arange(0, len(path), 2):
            swell = size * (0.45 + 0.75 * k / len(path)) * rng.uniform(0.7, 1.25)
            puffs.append((path[k] + out[k] * swell * 0.3 + rng.normal(0, size * 0.12, 2), swell))
        fingers = []
        for k in range(3, len(path), 3) if claws else []:
            reach = size * (1.1 + 0.9 * k / len(path)) * rng.uniform(0.75, 1.3)
            ahead = d[k] / np.hypot(*d[k])
            base = path[k] + out[k] * size * 0.2
            bend = base + out[k] * reach * 0.95 + ahead * reach * 0.10
            tip = base + out[k] * reach * 1.10 + ahead * reach * 0.60
            hook = tip + ahead * reach * 0.28 - out[k] * reach * 0.45
            fingers.append(spline([tuple(base), tuple(bend), tuple(tip), tuple(hook)], 10))
        for grow, colour in [(5.0, ink), (0.0, cream)]:
            for finger in fingers:
                line(finger, taper(len(finger), size * n * 0.30, 1.3) + grow * 1.5, colour)
            for (x, y), r in puffs:
                reach = r * n * 0.62 + grow
                draw.ellipse((x * n - reach, y * n - reach, x * n + reach, y * n + reach), fill=fill(colour))
        for (x, y), r in puffs:
            if rng.random() < 0.75:
                a, reach = rng.uniform(0, 360), r * n * rng.uniform(0.2, 0.42)
                box = (x * n - reach, y * n - reach, x * n + reach, y * n + reach)
                draw.arc(box, a, a + rng.uniform(110, 220), fill=fill(rng.choice([mid, pale, ink])), width=4)

    def spray(x: float, y: float, spread: tuple[float, float], count: int) -> None:
        for _ in range(count):
            px, py = (x + rng.normal(0, spread[0])) * n, (y + rng.normal(0, spread[1])) * n
            r = 2.0 + rng.exponential(3.2)
            draw.ellipse((px - r - 2, py - r - 2, px + r + 2, py + r + 2), fill=fill(mix(ink, pale, 0.35)))
            draw.ellipse((px - r, py - r, px + r, py + r), fill=fill(cream))

    # The mountain far away, with snow.
    hill = spline(table("0.52 0.705, 0.62 0.655, 0.69 0.585, 0.715 0.57, 0.74 0.585, 0.81 0.65, 0.93 0.71"), 12)
    shape(hill, rgb("3f5f8a"))
    snow = table(
        "0.66 0.617, 0.69 0.585, 0.715 0.57, 0.74 0.585, 0.772 0.617, 0.755 0.61, 0.745 0.632, 0.73 0.612, "
        "0.715 0.64, 0.7 0.612, 0.685 0.63, 0.678 0.61"
    )
    shape(np.array(snow), cream)
    line(hill, 4.0, ink)

    # Swells behind, then the great wave, then the swell in front.
    for y, amp, phase, tint in [(0.70, 0.022, 0.6, pale), (0.74, 0.03, 2.3, mid)]:
        x = np.linspace(-0.05, 1.05, 90)
        top = np.stack([x, y - amp * np.abs(np.sin(5.5 * x + phase)) ** 1.4], 1)
        low = np.stack([x, np.full_like(x, y + 0.16) - 0.3 * amp * np.sin(5.5 * x + phase)], 1)
        bands(top, low, [(0, cream), (0.10, tint), (0.30, mid), (0.42, pale), (0.60, ink)])
    outer = spline(
        table("-0.14 0.86, -0.05 0.5, 0.1 0.27, 0.26 0.145, 0.42 0.125, 0.55 0.195, 0.615 0.315, 0.6 0.41"),
        14,
    )
    inner = spline(table("0.95 1.04, 0.7 0.93, 0.5 0.8, 0.405 0.64, 0.385 0.48, 0.43 0.355, 0.52 0.325, 0.6 0.41"), 14)
    bands(
        outer,
        inner,
        [
            (0, ink), (0.10, mid), (0.17, cream), (0.215, mid), (0.30, ink), (0.39, pale), (0.45, mid),
            (0.53, cream), (0.575, mid), (0.65, ink), (0.76, pale), (0.82, mid), (0.91, cream), (0.94, mid),
        ],
    )  # fmt: skip
    foam(outer[26:], 0.030, 1.0, False)
    foam(inner[70:], 0.024, 1.0, True)
    foam(outer[62:], 0.036, 1.0, True)
    spray(0.66, 0.24, (0.06, 0.07), 70)
    spray(0.50, 0.46, (0.05, 0.05), 40)

    crest = spline(
        table("1.1 0.64, 1 0.655, 0.9 0.7, 0.8 0.8, 0.69 0.865, 0.55 0.9, 0.38 0.88, 0.2 0.82, 0.06 0.8, -0.06 0.82"),
        12,
    )
    floor = np.stack([np.linspace(1.1, -0.06, len(crest)), 1.12 + 0.02 * np.sin(np.linspace(0, 9, len(crest)))], 1)
    bands(
        crest,
        floor,
        [
            (0, mid),
            (0.10, cream),
            (0.14, mid),
            (0.25, ink),
            (0.38, pale),
            (0.45, mid),
            (0.58, cream),
            (0.62, ink),
            (0.8, mid),
        ],
    )
    foam(crest[:50][::-1], 0.026, -1.0, False)
    foam(crest[78:], 0.020, 1.0, False)
    spray(0.86, 0.66, (0.05, 0.03), 30)

    # Printing: wood grain in the ink, uneven pressure, paper fibres, slightly ragged edges.
    printed = np.asarray(image, np.float32) / 255
    ragged = [np.clip(np.mgrid[:n, :n][k] + 1.3 * noise(n, 160, rng), 0, n - 1) for k in (0, 1)]
    printed = np.stack([ndi.map_coordinates(printed[..., c], ragged, order=1) for c in range(3)], -1)
    cover = 1 - printed.mean(-1)
    pressure = np.clip(0.07 + 0.075 * grain + 0.05 * noise(n, 9, rng, 3), 0, 0.5)
    sheet = paper(n, rng, "f6ecd4")
    printed = mix(printed, cream, pressure * smoothstep(0.15, 0.6, cover))
    speck = (noise(n, n / 4, rng) > 2.6) & (cover > 0.3)
    printed = mix(printed, cream, 0.5 * ndi.gaussian_filter(speck.astype(np.float32), 1))
    return printed * sheet / rgb("f6ecd4") * np.array([1.0, 0.995, 0.98])


STYLES: dict[str, Callable[[], Array]] = {
    f.__name__: f for f in (starry_oil, stained_glass, ink_wash, mosaic, woodcut_waves, pointillism)
}


def save(name: str, picture: Array) -> Path:
    """Write one style as a JPEG, quality 90 or the next lower one that keeps it small."""
    path = OUT / f"{name}.jpg"
    for quality in range(90, 70, -2):
        shrink(picture).save(path, quality=quality, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            break
    print(f"{path.name}: quality {quality}, {path.stat().st_size / 1000:.0f} kB", end="")
    return path


def main(names: list[str]) -> None:
    """Paint the named styles, or all of them."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names or STYLES:
        began = time.perf_counter()
        save(name, STYLES[name]())
        print(f", {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
