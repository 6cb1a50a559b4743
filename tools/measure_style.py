"""Count the style of the five notebooks, beside the notebooks that the series modernises.

    python tools/measure_style.py                      writes results/cpu/style.json
    python tools/measure_style.py ORIGINAL=page.ipynb  prints the same counts of another notebook

What is counted is form. Whether a sentence is true, no script can say.

introduced: a code cell whose text cell before it ends in prose, not in a heading or a table.
outputs: code cells that show something: text, a result, a picture. stderr and progress widgets of
    another notebook are no outputs here.
we_see: outputs of which the first paragraph of the text that follows says "we see".
number: outputs of which that paragraph repeats a number of two digits or more.
word: outputs of which it repeats a word of five letters or more; of a picture, from its alt text.
read_aloud: any of the three. This is generous: a word may be the same by chance, above all after a
    long output, and "we see" may be followed by anything. It is also strict: "the second is
    longer" reads an output aloud and is not counted. What follows a heading is not counted.
"""

import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbformat

from tools.links import dead_links, pages, prose
from tools.outputs import WIDGET
from tools.results import this_command, write_result
from tools.script_args import override
from tools.series import TITLES

ORIGINAL = ""

# Counted once, by hand, in two notebooks that are no part of this repository. All seven text cells
# of the first are bare headings. What is missing here was not counted.
BEFORE = {
    "source": "https://github.com/iamarunbrahma/finetuned-qlora-falcon7b-medical",
    "training": {
        "file": "funetuned_qlora_falcon7b.ipynb",
        "code_cells": 22,
        "text_cells": 7,
        "outputs": 15,
        "read_aloud": 0,
    },
    "chat": {"file": "gradio_chatbot_app.ipynb", "code_cells": 10, "text_cells": 0},
}


def code_lines(cell: Any) -> int:
    """Lines of a cell that are not empty."""
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def is_introduced(before: Any | None) -> bool:
    """Tell whether a text cell ends in prose.

    Example:
        >>> new = nbformat.v4.new_markdown_cell
        >>> is_introduced(new("# Title")), is_introduced(new("# Title\\nWe load."))
        (False, True)
    """
    if before is None or before.cell_type != "markdown" or not before.source.strip():
        return False
    last = before.source.rstrip().split("\n\n")[-1].splitlines()[-1]
    return not re.match(r"[|<#]", last)


def shown(cell: Any) -> str:
    """The text that a code cell shows; of a picture, its alt text. Empty if it shows nothing.

    Example:
        >>> cell = nbformat.v4.new_code_cell("x")
        >>> cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="42 weights")]
        >>> shown(cell)
        '42 weights'
    """
    parts = []
    for output in cell.get("outputs", []):
        if output.get("name") == "stderr" or output.output_type == "error":
            continue
        if WIDGET in output.get("data", {}):
            continue
        if alts := pictures(output):
            parts += [alt or "a picture without alt text" for alt in alts.values()]
        else:
            parts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(parts).strip()


def pictures(output: Any) -> dict[str, str]:
    """The pictures of one output with their alt texts, "" for one that has none."""
    kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
    return {kind: output.get("metadata", {}).get(kind, {}).get("alt", "") for kind in kinds}


def follows(cells: list[Any], at: int) -> str:
    """The first paragraph between a code cell and the next one; a heading ends it."""
    after = cells[at + 1] if at + 1 < len(cells) else None
    if after is None or after.cell_type == "code":
        return ""
    text = re.split(r"^#{1,6} ", after.source, maxsplit=1, flags=re.MULTILINE)[0]
    return text.strip().split("\n\n")[0]


def numbers(text: str) -> set[str]:
    """The numbers of a text with two digits or more, without commas.

    Example:
        >>> sorted(numbers("about 6,922 of 7 in 0.35 s"))
        ['0.35', '6922']
    """
    found = (n.replace(",", "") for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text))
    return {n.rstrip(".") for n in found if sum(c.isdigit() for c in n) > 1}


def long_words(text: str) -> set[str]:
    """The words of a text with five letters or more, in small letters.

    Example:
        >>> sorted(long_words("Adapter from artifacts, 2 of h_to_4h"))
        ['adapter', 'artifacts']
    """
    return {word.lower() for word in re.findall(r"[^\W\d_]{5,}", text)}


def count(notebook: Any) -> dict[str, int]:
    """Count one notebook.

    Returns:
        Whole numbers, so that those of several notebooks can be added.
    """
    cells = notebook.cells
    code = [n for n, cell in enumerate(cells) if cell.cell_type == "code"]
    speaks = [n for n in code if shown(cells[n])]
    drawn = {
        n: [a for o in cells[n].get("outputs", []) for a in pictures(o).values()] for n in code
    }
    pairs = {n: (follows(cells, n), shown(cells[n])) for n in speaks}
    see = {n for n, (after, _) in pairs.items() if re.search(r"\bwe see\b", after, re.IGNORECASE)}
    number = {n for n, (after, out) in pairs.items() if numbers(after) & numbers(out)}
    word = {n for n, (after, out) in pairs.items() if long_words(after) & long_words(out)}
    words = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    words = re.sub(r"^```.*?^```", "", words, flags=re.DOTALL | re.MULTILINE)
    alts = [alt for found in drawn.values() for alt in found]
    return {
        "code_cells": len(code),
        "text_cells": sum(cell.cell_type == "markdown" for cell in cells),
        "introduced": sum(n > 0 and is_introduced(cells[n - 1]) for n in code),
        "outputs": len(speaks),
        "we_see": len(see),
        "number": len(number),
        "word": len(word),
        "read_aloud": len(see | number | word),
        "figures": len(alts),
        "figures_with_alt_text": sum(bool(alt.strip()) for alt in alts),
        "words": len(re.findall(r"\S+", words)),
    }


def lengths(notebook: Any) -> list[int]:
    """The lines of each code cell."""
    return [code_lines(cell) for cell in notebook.cells if cell.cell_type == "code"]


def shares(counts: dict[str, int], lines: list[int]) -> dict[str, Any]:
    """Add what is computed from the counts: median, longest, shares.

    Example:
        >>> counts = {"code_cells": 4, "introduced": 3, "outputs": 2, "read_aloud": 1}
        >>> found = shares(counts, [1, 2, 9])
        >>> found["median_lines"], found["longest_lines"], found["share_introduced"]
        (2, 9, 0.75)
    """
    more = {"median_lines": statistics.median(lines), "longest_lines": max(lines)}
    more["share_up_to_10_lines"] = sum(n <= 10 for n in lines) / len(lines)
    for share, whole in (("introduced", "code_cells"), ("read_aloud", "outputs")):
        if counts.get(whole):
            more[f"share_{share}"] = counts[share] / counts[whole]
    return counts | more


def measure(root: Path = ROOT) -> dict[str, Any]:
    """Count the series: each notebook, all together, the links, and the notebooks before.

    Returns:
        What results/cpu/style.json holds.
    """
    books = {s: nbformat.read(root / f"notebooks/{s}.ipynb", as_version=4) for s in TITLES}
    counts = {slug: count(book) for slug, book in books.items()}
    lines = {slug: lengths(book) for slug, book in books.items()}
    together = {key: sum(c[key] for c in counts.values()) for key in next(iter(counts.values()))}
    found = pages(root)
    text = re.findall(r"!\[([^\]]*)\]\(", "\n".join(prose(page) for page in found))
    return {
        "notebooks": {slug: shares(counts[slug], lines[slug]) for slug in books},
        "together": shares(together, sum(lines.values(), [])),
        "dead_links": sum(len(dead_links(page, root)) for page in found),
        "pages_with_links": len(found),
        "pictures_in_text": len(text),
        "pictures_in_text_with_alt_text": sum(bool(alt.strip()) for alt in text),
        "before": BEFORE,
    }


def main() -> None:
    """Count, print, write."""
    override(globals(), sys.argv[1:])
    if ORIGINAL:
        book = nbformat.read(ORIGINAL, as_version=4)
        found = shares(count(book), lengths(book))
        print("\n".join(f"{key}: {value}" for key, value in found.items()))
        return
    figures = measure()
    for slug, found in figures["notebooks"].items():
        print(f"{slug}: {found['code_cells']} code, {found['words']} words, median "
              f"{found['median_lines']} lines, {found['read_aloud']} of {found['outputs']} read "
              f"aloud ({found['we_see']} by 'we see', {found['number']} by a number)")  # fmt: skip
    print("dead links:", figures["dead_links"])
    print(write_result("style", figures, "the style of the notebooks, counted", this_command()))


if __name__ == "__main__":
    main()
