"""Draw docs/images/method-*.svg: orders, what predicts what, and masks, as `nar.order` has them.

python scripts/method_drawings.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, Rectangle

from nar.order import Schedule, manhattan, par, raster, scales

IMAGES = Path(__file__).parents[1] / "docs/images"
EARLY, LATE = 0.95, 0.25  # of the colour map: later fronts are darker


def front_of(schedule: Schedule) -> torch.Tensor:
    """(N,) the front of each position, in raster layout."""
    front = torch.repeat_interleave(torch.arange(schedule.num_steps), torch.tensor(schedule.fronts))
    return torch.empty_like(front).scatter(0, schedule.order, front)


def cells(axes: Any, fronts: torch.Tensor, steps: int, corner: tuple[float, float] = (0, 0)) -> None:
    """Draw a (H, W) grid with the number of the front in each cell, from 1."""
    for row, line in enumerate(fronts.tolist()):
        for column, front in enumerate(line):
            shade = EARLY - (EARLY - LATE) * front / max(steps - 1, 1)
            place = (corner[0] + column, corner[1] + row)
            axes.add_patch(Rectangle(place, 1, 1, facecolor=colormaps["YlGnBu_r"](shade), edgecolor="white"))
            colour = "black" if shade > 0.6 else "white"
            axes.text(place[0] + 0.5, place[1] + 0.5, str(front + 1), ha="center", va="center", size=8, color=colour)


def finish(axes: Any, title: str, width: float, height: float, above: float = 0.1) -> None:
    """Set limits and title, and take frame and ticks away."""
    axes.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -above), aspect="equal")
    axes.set_title(title, size=9)
    axes.axis("off")


def save(figure: Any, name: str) -> None:
    """Write a drawing, the same bytes each time."""
    figure.savefig(IMAGES / f"method-{name}.svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def orders() -> None:
    """Draw the fronts of each order on 6x6 positions, and of NAR on a clip of three frames of 3x3."""
    figure, panels = plt.subplots(1, 4, figsize=(10, 2.7), width_ratios=[1, 1, 1, 1.75])
    for axes, (name, schedule) in zip(
        panels,
        {"raster": raster((6, 6)), "PAR, four regions": par((6, 6), (2, 2)), "NAR": manhattan((6, 6))}.items(),
        strict=False,
    ):
        cells(axes, front_of(schedule).reshape(6, 6), schedule.num_steps)
        finish(axes, f"{name}: {schedule.num_steps} steps", 6, 6)
    clip = manhattan((3, 3, 3))
    for time, frame in enumerate(front_of(clip).reshape(3, 3, 3)):
        cells(panels[3], frame, clip.num_steps, (3.5 * time, 1.5))
    finish(panels[3], f"NAR, a clip of three frames: {clip.num_steps} steps, in raster order 27", 10, 6)
    save(figure, "orders")


def sources() -> None:
    """Draw which neighbour's prediction each position reads: width and height, and time for a clip."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.7), width_ratios=[1, 2.1])
    colours = ("tab:red", "tab:blue", "tab:green")  # rows of predictions: width, height, time
    for axes, grid in zip(panels, ((4, 4), (2, 4, 4)), strict=True):
        schedule = manhattan(grid)
        fronts = front_of(schedule).reshape(-1, 4, 4)
        for time, frame in enumerate(fronts):
            cells(axes, frame, schedule.num_steps, (5.5 * time, 0))
        places = schedule.coordinates(schedule.order).tolist()
        for row, colour in enumerate(colours[: len(grid)]):
            for position, (slot, weight) in enumerate(zip(schedule.source[row], schedule.weight[row], strict=True)):
                if position and weight:
                    start, end = middle(places[int(slot) - 1]), middle(places[position])
                    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=7, shrinkA=6, shrinkB=6)
                    arrow.set(color=colour, linewidth=1, connectionstyle="arc3,rad=-0.12" if row == 2 else "arc3")
                    axes.add_patch(arrow)
        title = "red: head of width, blue: head of height" + (", green: head of time" if len(grid) == 3 else "")
        finish(axes, title, 5.5 * len(fronts) - 1.5, 4, above=0.3)
    save(figure, "heads")


def middle(place: list[int]) -> tuple[float, float]:
    """Where the middle of a cell is drawn; frames are side by side."""
    *time, row, column = place
    return 5.5 * (time[0] if time else 0) + column + 0.5, row + 0.5


def masks() -> None:
    """Draw which slots see which, on 4x4 positions: slots in generation order, and NAR's once more in raster order."""
    grid = (4, 4)
    figure, panels = plt.subplots(1, 5, figsize=(11, 2.6))
    named = {"raster": raster(grid), "PAR, four regions": par(grid, (2, 2)), "NAR": manhattan(grid)}
    named |= {"NAR, in raster order": manhattan(grid), "next scale: 1, 2, 3": scales((1, 2, 3))}
    for axes, (name, schedule) in zip(panels, named.items(), strict=True):
        levels = torch.cat([torch.tensor([-1]), schedule.slot_levels()])  # the condition is slot 0
        visible = levels[:, None] >= levels
        if "raster order" in name:
            slots = torch.cat([torch.tensor([0]), schedule.places.argsort() + 1])
            visible = visible[slots][:, slots]
        axes.imshow(visible, cmap=ListedColormap(["whitesmoke", "teal"]), vmin=0, vmax=1)
        edges = torch.arange(len(levels) + 1) - 0.5
        axes.hlines(edges, edges[0], edges[-1], color="white", linewidth=0.5)
        axes.vlines(edges, edges[0], edges[-1], color="white", linewidth=0.5)
        axes.set_title(name, size=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("query", size=8)
    panels[0].set_xlabel("key", size=8)
    save(figure, "masks")


if __name__ == "__main__":
    mpl.rcParams |= {"svg.hashsalt": "nar", "svg.fonttype": "path"}
    orders()
    sources()
    masks()
