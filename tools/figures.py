"""Figures for the notebooks: one look, and a text for those who cannot see them."""

import base64
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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
    bars = {"the original's recipe": found["seed"], "ours": found["ablation"]["ours, alone"]}
    older = [run["ablation"] for name, run in found.items() if name.endswith("_run")]
    for rows, mark in [(found["ablation"], ""), *((rows, " (earlier run)") for rows in older)]:
        bars |= {n + mark: v for n, v in rows.items() if n[:7] == "without" and "step_s" in v}
    paces = [v["useful_tokens_per_s"]["value"] for v in bars.values()]
    colours = [COLOURS[6], COLOURS[5], *[COLOURS[2]] * (len(bars) - 2)]
    axis.barh(list(bars), paces, color=colours)
    axis.invert_yaxis()
    axis.set(xlabel="useful tokens a second")


def draw_lora(axis: Any, n_out: int, n_in: int, rank: int) -> None:
    """Draw one linear layer and its adapter to scale: W, and B and A, with their counts.

    Args:
        axis: of a figure of this module.
        n_out, n_in: rows and columns of the layer's weight.
        rank: columns of B, rows of A.

    Example:
        >>> figure, axis = new_figure()
        >>> draw_lora(axis, 10, 20, 2)
        >>> axis.texts[0].get_text(), axis.texts[1].get_text()
        ('W, frozen, 4 bits\\n10 × 20 = 200', 'B, trained\\n10 × 2 = 20')
    """
    gap, middle, below = 0.16 * n_in, n_out / 2, -0.04 * n_out
    thin = max(rank, 0.004 * n_in)  # the least that can be seen; at rank 32 of 4,544 it is true
    left_b, left_a, low_a = n_in + gap, n_in + 2 * gap, middle - thin / 2
    for at, width, height, colour in (
        ((0, 0), n_in, n_out, COLOURS[2]),
        ((left_b, 0), thin, n_out, COLOURS[6]),
        ((left_a, low_a), n_in, thin, COLOURS[6]),
    ):
        axis.add_patch(Rectangle(at, width, height, facecolor=colour, edgecolor="none"))
    for x, y, name, high, wide in (
        (n_in / 2, middle, "W, frozen, 4 bits", n_out, n_in),
        (left_b, below, "B, trained", n_out, rank),
        (left_a + n_in / 2, low_a + below, "A, trained", rank, n_in),
    ):
        count = f"{name}\n{high:,} × {wide:,} = {high * wide:,}"
        axis.text(x, y, count, ha="center", va="center" if y == middle else "top")
    axis.text(n_in + gap / 2, n_out / 2, "+", ha="center", va="center", fontsize=16)
    axis.text(n_in + 1.5 * gap + thin / 2, n_out / 2, "·", ha="center", va="center", fontsize=16)
    axis.set(xlim=(0, 2 * n_in + 2 * gap), ylim=(-0.22 * n_out, n_out), aspect="equal")
    axis.set_axis_off()


def draw_losses(axis: Any, train: Sequence[tuple], held_out: Sequence[tuple]) -> None:
    """Draw both losses over the optimizer's steps, and a star at the lowest held-out one.

    Args:
        axis: of a figure of this module.
        train, held_out: (step, loss) pairs, losses in nats per answer token.

    Example:
        >>> figure, axis = new_figure()
        >>> draw_losses(axis, [(1, 3.0), (2, 2.0)], [(0, 4.0), (2, 3.0)])
        >>> [line.get_label() for line in axis.lines]
        ['rows trained on', 'rows held out', 'kept']
    """
    axis.plot(*zip(*train, strict=True), color=COLOURS[2], label="rows trained on")
    axis.plot(*zip(*held_out, strict=True), color=COLOURS[6], marker="o", label="rows held out")
    best = min(held_out, key=lambda point: point[1])
    axis.plot(*best, "*", markersize=16, color=COLOURS[0], label="kept")
    axis.set(xlabel="optimizer step", ylabel="loss, nats per answer token", ylim=(0, None))
    axis.legend()


def draw_resumed(axis: Any, path: Path) -> None:
    """Draw three runs of `tools/measure_faults.py`: unbroken, killed, and resumed after the kill.

    Args:
        axis: of a figure of this module.
        path: of what the script wrote.

    Example:
        >>> figure, axis = new_figure()
        >>> draw_resumed(axis, Path("results/cpu/faults.json"))
        >>> [line.get_label() for line in axis.lines]
        ['unbroken', 'killed', 'resumed']
    """
    runs = json.loads(path.read_text())["losses"]
    for name, style in (("unbroken", "-"), ("killed", "x"), ("resumed", ".")):
        first = runs["resumed_from_step"] + 1 if name == "resumed" else 1
        axis.plot(range(first, first + len(runs[name])), runs[name], style, label=name)
    axis.set(xlabel="optimizer step", ylabel="loss, nats per answer token")
    axis.legend()


def draw_answers(axes: Any, sides: dict[str, Any], lines: int = 26) -> None:
    """Write answers side by side, as they are; from the first invented turn on in orange.

    Args:
        axes: as many as there are sides, of a figure of this module.
        sides: raw answers by name, with `.text`, `.n_tokens` and `.finished`.
        lines: at most so many of each; an ellipsis stands for the rest.

    Example:
        >>> from types import SimpleNamespace as Said
        >>> figure, axes = new_figure(columns=2)
        >>> one = Said(text=" Rest.\\n<HUMAN>: And?", n_tokens=9, finished=False)
        >>> draw_answers(axes, {"base": one, "adapter": one})
        >>> [(text.get_text(), text.get_color()) for text in axes[0].texts]
        [('Rest.', '#000000'), ('<HUMAN>: And?', '#D55E00')]
    """
    from helpers.prompts import ROLE_TAG  # here, as other figures are drawn without the helpers

    for axis, (name, said) in zip(axes, sides.items(), strict=True):
        end = "stopped by itself" if said.finished else "cut at the limit"
        axis.set_title(f"{name}: {said.n_tokens} tokens, {end}", loc="left", fontsize=9)
        wrapped, colour = [], COLOURS[0]
        for part in filter(str.strip, said.text.splitlines()):
            colour = COLOURS[6] if ROLE_TAG.search(part) else colour
            wrapped += [(line, colour) for line in textwrap.wrap(part.strip(), 62)]
        if len(wrapped) > lines:
            wrapped = [*wrapped[: lines - 1], ("…", wrapped[lines - 1][1])]
        for row, (line, ink) in enumerate(wrapped):
            axis.text(0, lines - row, line, color=ink, fontsize=8, va="top", parse_math=False)
        axis.set(xlim=(0, 1), ylim=(0, lines))
        axis.set_axis_off()


WAYS = {  # of benchmarks/decoding.py: what is on, and how the bar is called
    "seed": ("adapter", "as the original called it"),
    "adapter": ("adapter", "compiled"),
    "joined adapter": ("adapter", "compiled, joined"),
    "joined adapter, own loop": ("adapter", "compiled, joined, our loop"),
    "seed base": ("base", "as the original called it"),
    "base": ("base", "compiled"),
    "joined base": ("base", "compiled, joined"),
}


def draw_decoding(axis: Any, path: Path) -> None:
    """Draw what `benchmarks/decoding.py` wrote: tokens a second of each way, with its range.

    Args:
        axis: of a figure of this module.
        path: the benchmark's file; a way that it did not measure is left out.

    Example:
        >>> figure, axis = new_figure()
        >>> draw_decoding(axis, Path("results/h100/decoding.json"))
        >>> axis.get_yticklabels()[0].get_text()
        'adapter, as the original called it'
    """
    found = json.loads(path.read_text())
    ways = {k: f"{on}, {way}" for k, (on, way) in WAYS.items() if "value" in found.get(k, {})}
    values, lows, highs = ([found[k][e] for k in ways] for e in ("value", "low", "high"))
    spread = [[v - low for v, low in zip(values, lows, strict=True)],
              [high - v for v, high in zip(values, highs, strict=True)]]  # fmt: skip
    colours = [COLOURS[6 if "seed" in k else 2 if "base" in k else 5] for k in ways]
    axis.barh([*ways.values()], values, xerr=spread, color=colours, error_kw={"capsize": 2})
    for row, (value, high) in enumerate(zip(values, highs, strict=True)):
        axis.annotate(f"{value:.0f}", (high, row), (4, 0), textcoords="offset points", va="center")
    axis.invert_yaxis()
    axis.set(xlabel="tokens a second, one prompt; lines from least to most")


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
        points = [p for p in found if bool(p["checkpointing"]) is again]
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
