"""Figures for the notebooks: one look, and a text for those who cannot see them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's eight colours, told apart by colour-blind readers too; black comes first.
# Source: https://jfly.uni-koeln.de/color/
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

SHOWN_DPI = 80
MAX_BYTES = 150_000


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8.0, 3.6)) -> Any:
    """Make an empty figure in the notebooks' own look: white ground, thin grid, no top frame.

    Args:
        rows: how many axes stand above each other.
        columns: how many stand side by side.
        size: width and height in inches; 8 fill the column of a notebook.

    Returns:
        (figure, axes), as `matplotlib.pyplot.subplots` does, but unknown to pyplot: a figure
        made here is shown by `show` alone and never twice.

    Example:
        >>> figure, axes = new_figure(columns=2)
        >>> len(axes), figure.get_facecolor()
        (2, (1.0, 1.0, 1.0, 1.0))
    """
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_prop_cycle(color=COLOURS[5:6] + COLOURS[1:2] + COLOURS[3:4] + COLOURS[6:8])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[0, 0] if rows == columns == 1 else axes.squeeze()


def draw_speed(axis: Any, path: Path) -> None:
    """Draw what `benchmarks/training.py` wrote: the original's pace, ours, and ours without a mend.

    Args:
        axis: of a figure of this module.
        path: the benchmark's file.

    Example:
        >>> figure, axis = new_figure()
        >>> draw_speed(axis, Path("results/h100/training.json"))
        >>> [label.get_text() for label in axis.get_yticklabels()[:2]]
        ["the original's recipe", 'ours']
    """
    found = json.loads(path.read_text())
    measured = found["ablation"] | found.get("second_run", {}).get("ablation", {})
    bars = {"the original's recipe": found["seed"], "ours": measured["ours, alone"]}
    bars |= {name: v for name, v in measured.items() if name[:7] == "without" and "step_s" in v}
    paces = [v["useful_tokens_per_s"]["value"] for v in bars.values()]
    colours = [COLOURS[6], COLOURS[5], *[COLOURS[2]] * (len(bars) - 2)]
    axis.barh(list(bars), paces, color=colours)
    axis.invert_yaxis()
    axis.set(xlabel="useful tokens a second")


def draw_memory(axis: Any, path: Path) -> tuple[int, float]:
    """Draw the memory plan over the measured peak, for the points that are scored.

    Args:
        axis: of a figure of this module.
        path: the file of `benchmarks/memory.py`.

    Returns:
        How many points there are, and how far off the worst is, as a share.

    Example:
        >>> figure, axis = new_figure()
        >>> n_points, worst = draw_memory(axis, Path("results/h100/memory.json"))
        >>> n_points >= 24, worst <= 0.05
        (True, True)
    """
    found = [p for p in json.loads(path.read_text())["points"] if not p["calibration"]]
    for again, name in ((False, "activations kept"), (True, "computed again")):
        points = [p for p in found if p["checkpointing"] is again]
        peaks = [p["peak"] / 2**30 for p in points]
        shares = [p["predicted"] / p["peak"] for p in points]
        axis.plot(peaks, shares, "x" if again else "o", label=name)
    axis.axhline(1, color=COLOURS[0], linewidth=0.8)
    axis.set(xlabel="peak measured, GiB", ylabel="plan over measured", ylim=(0.9, 1.1))
    axis.legend()
    return len(found), max(abs(p["predicted"] / p["peak"] - 1) for p in found)


def to_png(figure: Figure | Path | bytes) -> tuple[bytes, int, int]:
    """Turn a figure, or a picture, into a PNG of at most 150 kB on a white ground.

    Args:
        figure: a matplotlib figure, the path of a picture, or a picture's own bytes.

    Returns:
        (png, width, height): the bytes, and the size to show it at in CSS pixels. A figure has
        twice as many pixels each way, so that it stays crisp.

    Raises:
        ValueError: if 16 colours still do not bring it under 150 kB.

    Example:
        >>> png, width, height = to_png(new_figure(size=(4.0, 2.0))[0])
        >>> png[1:4], width, height    # 4 and 2 inches at 80 pixels each
        (b'PNG', 320, 160)
    """
    scale = 1
    if isinstance(figure, Figure):
        scale, buffer = 2, io.BytesIO()
        figure.savefig(buffer, format="png", dpi=SHOWN_DPI * scale, facecolor="white")
        figure = buffer.getvalue()
    raw = figure if isinstance(figure, bytes) else Path(figure).read_bytes()
    image = Image.open(io.BytesIO(raw)).convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(ground, image).convert("RGB")
    for colours in (256, 64, 16):
        buffer = io.BytesIO()
        flat.quantize(colours).save(buffer, format="png", optimize=True)
        if buffer.tell() <= MAX_BYTES:
            return buffer.getvalue(), flat.width // scale, flat.height // scale
    raise ValueError(f"The picture takes {buffer.tell():,} bytes; make it smaller or simpler.")


def show(figure: Figure | Path | bytes, alt: str) -> None:
    """Show a figure in a notebook, with the text that stands in for it.

    The output holds the PNG, and the text twice: as `alt` in the output's metadata, where
    nbconvert and nbviewer take an image's alternative text from, and as plain text, for
    terminals and diffs.

    Args:
        figure: a matplotlib figure, the path of a picture, or a picture's own bytes.
        alt: what a reader sees in it, in one or two sentences: what is drawn, and what it shows.

    Raises:
        ValueError: if the text is shorter than 20 characters.

    Example:
        >>> show(new_figure()[0], alt="curve")
        Traceback (most recent call last):
        ValueError: alt='curve' tells nothing: say what is drawn and what it shows.
    """
    if len(alt.strip()) < 20:
        raise ValueError(f"{alt=} tells nothing: say what is drawn and what it shows.")
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ModuleNotFoundError:  # a machine without Jupyter
        get_ipython = bool
    if not get_ipython():  # a script: the text stands in
        print(alt)
        return
    png, width, height = to_png(figure)
    bundle = {"image/png": base64.b64encode(png).decode(), "text/plain": alt}
    metadata = {"image/png": {"alt": alt, "width": width, "height": height}}
    display(bundle, metadata=metadata, raw=True)
