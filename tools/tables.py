"""Tables that are filled from results/: the author writes the question, this writes the answer.

A block in a notebook's text cell or in the README reads

    <!-- table
    column: A100 = results/a100/series.json, results/predicted/a100.json
    column: CPU = results/cpu/series.json
    row: Minutes = notebooks.03_qlora_finetuning.minutes
    -->
    (everything here is written by `tools/series.py update`)
    <!-- end -->

A column takes the first of its files that exists, a row the figure under that dotted key. What
no file holds reads "not measured yet". A column may say where in its file to look, with {} in
place of the row's key, and what stands there if nothing can:

    column: Loss = results/cpu/crossval.json#sample.systems.{}.answer_loss or none
"""

import json
import re
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"<!-- table\n(?P<spec>.*?)-->\n(?P<body>.*?)<!-- end -->", re.DOTALL)
MISSING = "not measured yet"
SPOT = re.compile(r"(?P<file>[^#]+)(?:#(?P<key>\S+))?(?: or (?P<otherwise>.+))?")


def number(value: Any) -> str:
    """Write a figure for a reader: three digits that count, thousands apart, intervals in full.

    Args:
        value: a number, a text, or {"value", "low", "high", "n"}.

    Returns:
        What stands in the table.

    Example:
        >>> number(65273856), number(3.7312), number(13503.2)
        ('65,273,856', '3.73', '13,503')
        >>> number({"value": 0.944, "low": 0.727, "high": 0.999, "n": 18})
        '0.944 (0.727 to 0.999, n = 18)'
    """
    if isinstance(value, dict):
        value, low, high, n = (value[key] for key in ("value", "low", "high", "n"))
        return f"{number(value)} ({number(low)} to {number(high)}, n = {number(n)})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def look_up(data: Any, key: str) -> Any:
    """Follow a dotted key into nested dictionaries.

    Args:
        data: what a results file holds, or None if there is no file.
        key: names joined by dots; in a list, the place, counted from 0.

    Returns:
        What lies there, or None.

    Example:
        >>> look_up({"base": {"eos_rate": 0.1}}, "base.eos_rate"), look_up({}, "base.eos_rate")
        (0.1, None)
        >>> look_up({"padding": [0.46, 0.2]}, "padding.1"), look_up({"padding": []}, "padding.1")
        (0.2, None)
    """
    for name in key.split("."):
        if isinstance(data, list):
            data = {str(place): item for place, item in enumerate(data)}
        if not isinstance(data, dict) or name not in data:
            return None
        data = data[name]
    return data


def read_spec(spec: str) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Read the lines of a table's block.

    Args:
        spec: the lines between `<!-- table` and `-->`.

    Returns:
        columns as (title, files), rows as (title, key).

    Raises:
        ValueError: with the line, if it is neither a column nor a row.

    Example:
        >>> read_spec("column: CPU = results/cpu/a.json\\nrow: Minutes = minutes")
        ([('CPU', ['results/cpu/a.json'])], [('Minutes', 'minutes')])
    """
    columns, rows = [], []
    for line in filter(None, map(str.strip, spec.splitlines())):
        match = re.fullmatch(r"(column|row): (.+?) = (.+)", line)
        if not match:
            raise ValueError(f"'{line}' is neither 'column: title = file' nor 'row: title = key'.")
        kind, title, right = match.groups()
        if kind == "column":
            columns.append((title, [name.strip() for name in right.split(",")]))
        else:
            rows.append((title, right))
    return columns, rows


def render(spec: str, root: Path, up: str) -> str:
    """Write the table that a block asks for.

    Args:
        spec: the lines between `<!-- table` and `-->`.
        root: the repository.
        up: what leads from the page to the repository's root: "" for the README, "../" for a
            notebook.

    Returns:
        A markdown table, an empty line, and one line on where the figures were measured.
    """
    columns, rows = read_spec(spec)
    spots = [[m for f in files if (m := SPOT.fullmatch(f))] for _, files in columns]
    found = [next((m for m in there if (root / m["file"]).exists()), None) for there in spots]
    data = [json.loads((root / m["file"]).read_text()) if m else None for m in found]
    lines = [
        "| | " + " | ".join(title for title, _ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for title, key in rows:
        cells = [cell(m, d, key) for m, d in zip(found, data, strict=True)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    sources: dict[str, list[str]] = {}
    for (title, _), m, d in zip(columns, found, data, strict=True):
        file = m["file"] if m else ""
        link = f"[{Path(file).name}]({up}{file})"
        origin = f"{measured(m, d)}, {link}" if d else MISSING
        sources.setdefault(origin, []).append(title)
    whole = len(sources) == 1 and len(columns) > 1 and MISSING not in sources
    said = [o if whole else f"{', '.join(titles)}: {o}" for o, titles in sources.items()]
    guess = any(m and m["file"].startswith("results/predicted/") for m in found)
    word = "Where from: " if guess else "Measured on "
    return "\n".join([*lines, "", word + "; ".join(said) + "."])


def measured(spot: re.Match[str], data: dict[str, Any]) -> str:
    """Machine and date of a column: its part's own, if the file's parts were measured apart.

    Example:
        >>> old = {"machines": ["A", "B"], "date": "2026-01-01"}
        >>> file = {"machine": "B; C", "date": "2026-02-02", "old": old, "new": {}}
        >>> [measured(SPOT.fullmatch(f"x.json#{part}.loss"), file) for part in ("old", "new")]
        ['A; B, 2026-01-01', 'B; C, 2026-02-02']
    """
    part = data.get((spot["key"] or "").split(".")[0], {})
    own = part if isinstance(part, dict) and "date" in part else {}
    machines = "; ".join(own.get("machines", ())) or data["machine"]
    return f"{machines}, {own.get('date', data['date'])}"


def cell(spot: re.Match[str] | None, data: Any, key: str) -> str:
    """Write one cell of a table.

    Args:
        spot: where the column looks, as `SPOT` reads it; None if none of its files exists.
        data: what that file holds, or None.
        key: the row's key.

    Returns:
        The figure; else what the column names for it; else "not measured yet".

    Example:
        >>> spot = SPOT.fullmatch("a.json#systems.{}.loss or none")
        >>> cell(spot, {"systems": {"base": {"loss": 4.72}}}, "base"), cell(spot, {}, "base")
        ('4.72', 'none')
    """
    value = look_up(data, (spot["key"] or "{}").replace("{}", key)) if spot else None
    return number(value) if value is not None else (spot and spot["otherwise"]) or MISSING


def fill(text: str, root: Path, up: str) -> str:
    """Write the table of every block in a text anew.

    Args:
        text: a README or a notebook's text cell.
        root: the repository.
        up: what leads from the page to the repository's root.

    Returns:
        The text with all tables filled; a text without blocks comes back as it is.

    Example:
        >>> block = "<!-- table\\ncolumn: T4 = no.json\\nrow: Minutes = m\\n-->\\n<!-- end -->"
        >>> fill(block, Path("."), "").splitlines()[5:7]
        ['| --- | ---: |', '| Minutes | not measured yet |']
    """
    return BLOCK.sub(
        lambda m: f"<!-- table\n{m['spec']}-->\n{render(m['spec'], root, up)}\n<!-- end -->", text
    )
