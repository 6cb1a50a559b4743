"""Run the notebooks in order, each in a process of its own, and say what they took.

    python tools/run_series.py PROFILE=cpu                 all five: this is `make demo`
    python tools/run_series.py 03 04 PROFILE=cpu SEED=1    some of them
    python tools/run_series.py --results PROFILE=auto      and write results/<machine>/series.json

NAME=value goes into every notebook whose constants have that name. Executed notebooks go to
artifacts/executed/, times to artifacts/timings.json.
"""

import ast
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbformat

from tools.script_args import parse
from tools.series import numbers_to_slugs, slugs

WIDTH = 46


def constants(notebook: Path) -> dict[str, Any]:
    """Read the constants that a notebook's cell tagged `parameters` sets.

    Args:
        notebook: the path of an .ipynb.

    Returns:
        The default by name, for the names in capitals; a default that is computed counts as None.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    source = "\n".join(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = literal(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            for target, value in zip(node.targets[0].elts, node.value.elts, strict=True):
                found[target.id] = literal(value)
    return {name: value for name, value in found.items() if name.isupper()}


def literal(node: ast.AST) -> Any:
    """Evaluate a literal; anything that is not one gives None."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def given(arguments: list[str], known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Hand every NAME=value to the notebooks that have such a constant.

    Args:
        arguments: NAME=value as typed.
        known: the constants of each notebook, by slug.

    Returns:
        What each notebook is given, by slug.

    Raises:
        SystemExit: with one sentence, if no notebook has such a constant.

    Example:
        >>> given(["MAX_STEPS=5"], {"01": {"SEED": 0}, "03": {"SEED": 0, "MAX_STEPS": None}})
        {'01': {}, '03': {'MAX_STEPS': 5}}
    """
    parameters: dict[str, dict[str, Any]] = {slug: {} for slug in known}
    every = sorted({name for names in known.values() for name in names})
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or name not in every:
            sys.exit(f"'{argument}' is not NAME=value with a NAME out of: {', '.join(every)}.")
        for slug in (s for s in known if name in known[s]):
            parameters[slug][name] = parse(name, text, known[slug][name])
    return parameters


def run_one(slug: str, parameters: dict[str, Any], root: Path = ROOT) -> dict[str, float]:
    """Run one notebook by papermill in a process of its own.

    Args:
        slug: the notebook's file name without its ending.
        parameters: what papermill writes below the cell tagged `parameters`.
        root: the repository's folder.

    Returns:
        {"seconds", "peak_rss_gib"}: the time, and the largest resident memory in GiB of any one
        process that took part, usually the notebook's kernel.

    Raises:
        RuntimeError: with the failing cell's own message.
    """
    out = root / "artifacts/executed"
    out.mkdir(parents=True, exist_ok=True)
    page, log = out / f"{slug}.ipynb", out / f"{slug}.log"
    page.unlink(missing_ok=True)
    job = {"input_path": f"notebooks/{slug}.ipynb", "output_path": str(page)}
    job |= {"cwd": "notebooks", "kernel_name": "python3", "progress_bar": False}
    code = "import json, sys, papermill; papermill.execute_notebook(**json.loads(sys.argv[1]))"
    arguments = [sys.executable, "-c", code, json.dumps(job | {"parameters": parameters})]
    start = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(arguments, cwd=root, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(failure(page, log))
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds": seconds, "peak_rss_gib": round(usage.ru_maxrss / unit, 2)}


def failure(page: Path, log: Path) -> str:
    """Find out what a failed run says about itself.

    Args:
        page: the executed notebook, as far as it got.
        log: what the process printed.

    Returns:
        The failing cell and its error, or the end of the log.
    """
    for cell in nbformat.read(page, as_version=4).cells if page.exists() else []:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                said = f"{output.ename}: {output.evalue}"
                return f"this cell failed:\n\n{textwrap.indent(cell.source, '    ')}\n\n{said}"
    return "\n".join(log.read_text().splitlines()[-15:])


def run_series(chosen: list[str], arguments: list[str], root: Path = ROOT) -> dict[str, Any]:
    """Run notebooks in order, one line each.

    Args:
        chosen: slugs.
        arguments: NAME=value as typed.
        root: the repository's folder.

    Returns:
        {slug: {"seconds", "peak_rss_gib"}}; also written to artifacts/timings.json.

    Raises:
        SystemExit: if a notebook fails, with its message.
    """
    known = {slug: constants(root / f"notebooks/{slug}.ipynb") for slug in chosen}
    parameters, timings = given(arguments, known), {}
    for slug in chosen:
        print(f"{slug:<24}", end="", flush=True)
        try:
            timings[slug] = run_one(slug, parameters[slug], root)
        except RuntimeError as error:
            print("failed")
            sys.exit(f"{slug}: {error}\n\nThe whole page: artifacts/executed/{slug}.ipynb")
        figures = timings[slug]
        print(f"{figures['seconds']:7.1f} s {figures['peak_rss_gib']:6.2f} GiB", flush=True)
    total = sum(figures["seconds"] for figures in timings.values())
    print(f"{'together':<24}{total:7.1f} s")
    (root / "artifacts/timings.json").write_text(json.dumps(timings, indent=2) + "\n")
    return timings


def side_by_side(left: str, right: str, width: int = WIDTH) -> str:
    """Set two texts beside each other.

    Args:
        left: a text; line ends are kept.
        right: another.
        width: of each column, in characters.

    Returns:
        Lines of at most twice the width and three characters between.

    Example:
        >>> print(side_by_side("base runs on", "stops", width=8))
        base     | stops
        runs on  |
    """
    columns = [
        [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        for text in (left, right)
    ]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(f"{one:<{width}} | {two}".rstrip() for one, two in rows)


def print_comparison(path: Path) -> None:
    """Print the answers of base and adapter side by side, as notebook 04 saved them.

    Args:
        path: a list of {"question", "base", "adapter", "model"}, or one of these.
    """
    rows = json.loads(path.read_text())
    for row in rows if isinstance(rows, list) else [rows]:
        print(f"\n{row['model']} is asked: {row['question']}\n")
        heads = side_by_side("the base answers", "with the adapter it answers")
        print(f"{heads}\n{'-' * WIDTH}-+-{'-' * WIDTH}")
        print(side_by_side(row["base"].strip(), row["adapter"].strip()))


def main(argv: list[str]) -> int:
    """Run what the arguments say, show the answers, and write results if asked to."""
    arguments = [a for a in argv if "=" in a]
    numbers = [a for a in argv if "=" not in a and a != "--results"]
    comparison = ROOT / "artifacts/comparison.json"
    chosen = numbers_to_slugs(numbers) if numbers else slugs()
    began = time.time()
    timings = run_series(chosen, arguments)
    if comparison.exists() and comparison.stat().st_mtime >= began:
        print_comparison(comparison)
    if "--results" in argv:
        from tools.results import this_command, write_result

        figures = {"notebooks": timings}
        head = "time and peak resident memory of each notebook"
        print(f"wrote {write_result('series', figures, head, this_command()).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
