"""Named colours: paint a drawing in one, and name the one that a drawing has.

Knows a table of hues and uint8 pixels on white; does not know objects, scenes or prompts. White is not among the
colours: it can't be told from the ground.
"""

from __future__ import annotations

import numpy as np

# What a drawing is painted with (0..255); `name_colour` gives every one of them its own name.
PAINTS = {
    "red": (222, 28, 36), "orange": (250, 132, 8), "yellow": (250, 214, 20), "green": (50, 165, 50),
    "blue": (30, 95, 225), "purple": (128, 50, 180), "pink": (250, 120, 185), "brown": (122, 70, 30),
    "black": (34, 34, 38),
}  # fmt: skip
COLOURS = tuple(PAINTS)
GROUND = 232  # a pixel whose least channel is above this is taken for white ground
_HUES = (  # where in the circle of 360 degrees a colour ends
    (14, "red"), (42, "orange"), (68, "yellow"), (168, "green"), (250, "blue"), (292, "purple"), (344, "pink"),
    (361, "red"),
)  # fmt: skip


def paint(drawing: np.ndarray, colour: str) -> np.ndarray:
    """Return a uint8 drawing (H, W, 3) on white in one named colour: its shades stay, white stays white."""
    if colour not in PAINTS:
        raise ValueError(f"colour {colour!r} is not one of {', '.join(PAINTS)}")
    pixels = drawing.astype(np.float32)
    solid = np.clip((255 - pixels.min(-1)) / 40, 0, 1)[..., None]  # soft edges stay soft
    light = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    inside = light[solid[..., 0] > 0.9]
    low, high = np.percentile(inside, (5, 95)) if inside.size else (0, 255)
    shade = np.clip((light - low) / max(high - low, 1), 0, 1)[..., None]
    full = np.array(PAINTS[colour], np.float32)
    # Twice as many shades below the paint as above it: lightened orange or red would soon be another colour.
    painted = np.where(shade < 2 / 3, full * (0.75 + 0.375 * shade), full + (255 - full) * (shade - 2 / 3) * 0.75)
    result: np.ndarray = (painted * solid + 255 * (1 - solid)).round().astype(np.uint8)
    return result


def name_colour(pixels: np.ndarray) -> str:
    """The name that most pixels (..., 3) uint8 have, white ground and greys left out; "white" where nothing else is."""
    pixels = pixels.reshape(-1, 3).astype(np.float32)
    pixels = pixels[pixels.min(-1) < GROUND]
    if not len(pixels):
        return "white"
    high, low = pixels.max(-1), pixels.min(-1)
    spread = np.maximum(high - low, 1e-6)
    red, green, blue = pixels.T
    sides = [(green - blue) / spread % 6, (blue - red) / spread + 2, (red - green) / spread + 4]
    hue = 60 * np.select([high == red, high == green], sides[:2], sides[2])
    value, purity = high / 255, spread / np.maximum(high, 1)
    ends, names = zip(*_HUES, strict=True)
    found = np.array(names, dtype=object)[np.searchsorted(ends, hue, side="right")]
    found[(hue >= 8) & (hue < 48) & (value < 0.68)] = "brown"
    found[((hue < 14) | (hue > 320)) & (value > 0.8) & (purity < 0.6)] = "pink"
    grey = purity < 0.25
    found[grey] = "grey"
    found[(value < 0.3) | (grey & (value < 0.45))] = "black"
    counts = {name: int((found == name).sum()) for name in COLOURS}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "white"
