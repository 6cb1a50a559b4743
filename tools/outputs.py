"""What may stay of a notebook's outputs: text and pictures. GitHub is the reading room."""

import re
from pathlib import Path
from typing import Any

WIDGET = "application/vnd.jupyter.widget-view+json"
KEPT_CELL_METADATA = ("tags", "active")
PROBLEMS = {"error": "an error", "stderr": "stderr", WIDGET: "a widget"}


def kinds(output: dict[str, Any]) -> set[str]:
    """Name what an output is made of: its type, its stream, and its formats.

    Example:
        >>> sorted(kinds({"output_type": "stream", "name": "stderr", "text": "..."}))
        ['stderr', 'stream']
    """
    return {output["output_type"], output.get("name", ""), *output.get("data", {})} - {""}


def last_state(text: str) -> str:
    """Leave of each line what a terminal would still show: what follows the last return.

    Example:
        >>> last_state("10 %\\r100 %\\ndone")
        '100 %\\ndone'
    """
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def anonymous(text: str, root: Path) -> str:
    """Take this machine's folders out of a text: the repository's, and the home folder.

    Example:
        >>> anonymous("saved /data/series/artifacts/a.csv", Path("/data/series"))
        'saved artifacts/a.csv'
    """
    text = text.replace(f"{root}/", "").replace(str(root), ".")
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def clean_output(output: Any, root: Path) -> Any:
    """Make one output fit to be committed; None if nothing of it stays.

    Args:
        output: an nbformat output. Changed in place.
        root: the repository.

    Returns:
        The output, or None for stderr and widgets. Errors stay, for a check to find.
    """
    found = kinds(output)
    if "stderr" in found or WIDGET in found:
        return None
    if "text" in output:
        output["text"] = anonymous(last_state(output["text"]), root)
    for kind, data in output.get("data", {}).items():
        if isinstance(data, str) and (kind.startswith("text/") or kind.endswith("+xml")):
            output["data"][kind] = anonymous(data, root)
    return output


def clean_notebook(notebook: Any, root: Path) -> Any:
    """Strip a notebook of what no reader needs, in place: widgets, stderr, times, parameters.

    Execution counts stay: they show that the page was run from top to bottom.

    Args:
        notebook: an nbformat notebook.
        root: the repository.

    Returns:
        The same notebook.
    """
    cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    notebook.cells = cells
    for key in ("widgets", "papermill", "jupytext", "language_info"):
        notebook.metadata.pop(key, None)
    for cell in cells:
        for key in [k for k in cell.metadata if k not in KEPT_CELL_METADATA]:
            del cell.metadata[key]
        if cell.cell_type == "code":
            cell.outputs = join_streams([o for o in cell.outputs if clean_output(o, root)])
    return notebook


def join_streams(outputs: list[Any]) -> list[Any]:
    """Join neighbouring pieces of stdout, which differ from run to run, into one.

    Example:
        >>> piece = {"output_type": "stream", "name": "stdout", "text": "a"}
        >>> [o["text"] for o in join_streams([dict(piece), dict(piece)])]
        ['aa']
    """
    joined: list[Any] = []
    for output in outputs:
        if joined and output["output_type"] == joined[-1]["output_type"] == "stream":
            joined[-1]["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def output_problems(notebook: Any) -> list[str]:
    """List what must not be committed, one sentence for each finding.

    Args:
        notebook: an nbformat notebook.

    Returns:
        Sentences that begin with the cell's number; empty if all is well.
    """
    problems = []
    if "widgets" in notebook.metadata:
        problems.append("the notebook's metadata holds widgets, which GitHub refuses to render")
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", []):
            bad = kinds(output) & PROBLEMS.keys()
            problems += [f"cell {number} shows {PROBLEMS[name]}" for name in sorted(bad)]
            problems += [f"cell {number}: {fault}" for fault in picture_problems(output)]
    return problems


def picture_problems(output: dict[str, Any]) -> list[str]:
    """List the pictures of one output that have no text to stand in for them.

    Args:
        output: an nbformat output.

    Returns:
        A sentence for each picture without one.

    Example:
        >>> picture_problems({"output_type": "display_data", "data": {"image/png": "..."}})
        ['a picture without alt text: use show(figure, alt="...")']
    """
    data, metadata = output.get("data", {}), output.get("metadata", {})
    images = [kind for kind in data if kind.startswith("image/")]
    bare = [kind for kind in images if not metadata.get(kind, {}).get("alt", "").strip()]
    tags = re.findall(r"<img\b[^>]*>", "".join(data.get("text/html", "")))
    bare += [tag for tag in tags if not re.search(r"alt=(\"[^\"]+\"|'[^']+')", tag)]
    return ['a picture without alt text: use show(figure, alt="...")'] * len(bare)
