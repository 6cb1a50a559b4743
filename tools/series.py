"""Keep the five notebooks a series: first cells, setup cells, tables, twins, outputs.

    python tools/series.py update            write the generated parts of twins, README, docs anew
    python tools/series.py sync              twins (notebooks/py) -> notebooks, outputs kept;
                                             with --fail-on-change it says so by its exit code
    python tools/series.py pull 02           notebooks -> twins, after an edit inside Jupyter
    python tools/series.py execute 02 04     run notebooks on the CPU profile, keep their outputs
    python tools/series.py check             say what is out of step; exit code 1 if anything is
    python tools/series.py publish you/name  the repository's address, everywhere

The twin is the source. `update` ends with `sync`; `sync` also strips stderr, widgets and times.
"""

import hashlib
import json
import os
import re
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jupytext
import nbformat

from tools.outputs import clean_notebook, output_problems
from tools.tables import MISSING, fill

TITLES = {
    "01_data_loading": "Dialogues",
    "02_nf4_quantization": "Four bits per weight",
    "03_qlora_finetuning": "Fine-tuning",
    "04_base_vs_peft": "Base against adapter",
    "05_gradio_chat": "A chat page",
}
# What the README's table says of each: what one knows after it.
KNOWN = {
    "01_data_loading": "what the rows look like in tokens, and where the loss falls",
    "02_nf4_quantization": "where NF4's levels come from, and a model's size before it is loaded",
    "03_qlora_finetuning": "what LoRA adds; a run with a held-out loss that survives a kill",
    "04_base_vs_peft": "what the adapter changed, against simpler rivals, with intervals",
    "05_gradio_chat": "a chat page, and what must stand around a model that people type to",
}
UNPUBLISHED = "OWNER"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB = "https://colab.research.google.com/github"
TWIN = {
    "extension": ".py",
    "format_name": "percent",
    "notebook_metadata_filter": "-all",
    "cell_metadata_filter": "tags,active,-all",
}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SERIES_BLOCK = re.compile(r"<!-- series -->\n.*?<!-- end -->", re.DOTALL)
ANSWERS_BLOCK = re.compile(r"<!-- answers (\d+) -->\n.*?<!-- end -->", re.DOTALL)
VERIFIED_BLOCK = re.compile(r"<!-- verified -->\n.*?<!-- end -->", re.DOTALL)

# The same ten lines open all five notebooks. URL becomes the address in pyproject.toml.
SETUP = """\
import subprocess, sys
from pathlib import Path

url = "https://github.com/REPOSITORY"
here = Path(globals().get("__file__", "notebook")).resolve()
root = next((p for p in here.parents if (p / "requirements.txt").exists()), Path("falcon-qlora"))
if not root.exists():  # the notebook alone was opened, as in Colab: fetch the rest
    subprocess.check_call(["git", "clone", "--depth=1", url, root])
sys.path.insert(0, str(root := root.resolve()))
from tools.colab_setup import override, prepare

print(prepare(root))  # in Colab it installs the pins; everywhere it says what we run on"""


def repository(root: Path = ROOT) -> str:
    """Read the repository's address, owner/name, from pyproject.toml."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    return settings["tool"]["series"]["repository"]


def slugs(root: Path = ROOT) -> list[str]:
    """List the notebooks of the series that have a twin, in reading order."""
    return [slug for slug in TITLES if (root / f"notebooks/py/{slug}.py").exists()]


def name(slug: str) -> str:
    """Write a notebook's number and title, as its heading and the links to it show them.

    Example:
        >>> name("02_nf4_quantization")
        '02 · Four bits per weight'
    """
    return f"{slug[:2]} · {TITLES[slug]}"


def badge(slug: str, repo: str) -> str:
    """Write the Colab badge of a notebook; nothing while the repository has no owner.

    Args:
        slug: the notebook's file name without its ending.
        repo: owner/name.

    Returns:
        A markdown picture with a link, or an empty text.

    Example:
        >>> badge("05_gradio_chat", "OWNER/falcon")
        ''
    """
    if repo.startswith(f"{UNPUBLISHED}/"):
        return ""
    return f"[![Open in Colab]({BADGE})]({COLAB}/{repo}/blob/main/notebooks/{slug}.ipynb)"


def first_cell(slug: str, repo: str) -> str:
    """Write a notebook's first cell: heading, badge, links to its neighbours.

    Args:
        slug: the notebook's file name without its ending.
        repo: owner/name.

    Returns:
        Markdown.

    Example:
        >>> print(first_cell("01_data_loading", "OWNER/falcon"))
        # 01 · Dialogues
        <BLANKLINE>
        [02 · Four bits per weight →](02_nf4_quantization.ipynb)
    """
    order = list(TITLES)
    at = order.index(slug)
    links = [f"[← {name(s)}]({s}.ipynb)" for s in order[max(at - 1, 0) : at]]
    links += [f"[{name(s)} →]({s}.ipynb)" for s in order[at + 1 : at + 2]]
    parts = [f"# {name(slug)}", badge(slug, repo), " | ".join(links)]
    return "\n\n".join(part for part in parts if part)


def setup_cell(repo: str) -> str:
    """Write the setup cell, the same in all five."""
    return SETUP.replace("REPOSITORY", repo)


def series_table(root: Path, repo: str) -> str:
    """Write the README's table of notebooks, with the minutes that each took on a CPU.

    Args:
        root: the repository's folder.
        repo: owner/name.

    Returns:
        A markdown table; it has a column for the badges once there is an owner, and says where
        the minutes come from once they were measured.
    """
    path, badges = root / "results/cpu/series.json", bool(badge(list(TITLES)[0], repo))
    run = json.loads(path.read_text()) if path.exists() else {}
    seconds = {slug: took["seconds"] for slug, took in run.get("notebooks", {}).items()}
    lines = ["| Notebook | After it you know | GPU | Minutes without one |" + " Colab |" * badges]
    lines += ["| --- | --- | --- | ---: |" + " --- |" * badges]
    for slug in TITLES:
        took = f"{seconds[slug] / 60:.1f}" if slug in seconds else MISSING
        gpu = "none" if slug == list(TITLES)[0] else "A100, T4 or none"
        line = f"| [{name(slug)}](notebooks/{slug}.ipynb) | {KNOWN[slug]} | {gpu} | {took} |"
        lines.append(line + (f" {badge(slug, repo)} |" if badges else ""))
    if seconds:
        total = f"together {sum(seconds.values()) / 60:.1f} minutes"
        lines += [
            "",
            f"Measured with the tiny Falcon on {run['machine']}, {run['date']}: {total}; ",
        ]
        lines[-1] += f"[{path.name}]({path.relative_to(root)})."
    return "\n".join(lines)


def answers(root: Path, n_words: int) -> str:
    """Write both answers to the article's question, as notebook 04 shows them, for the README.

    Args:
        root: the repository's folder.
        n_words: where the base's answer is cut.

    Returns:
        Two quotations in markdown with a line before each; empty if 04 was not run.
    """
    path = root / "notebooks/04_base_vs_peft.ipynb"
    cells = nbformat.read(path, as_version=4).cells if path.exists() else []
    shown = [o.get("text", "") for cell in cells for o in cell.get("outputs", [])]
    parts = [re.split(r"^--- (?:base|adapter): .*\n", s, flags=re.MULTILINE) for s in shown]
    base, adapter = next((p[1:] for p in parts if len(p) == 3), ("", ""))
    if not base:
        return ""
    start = "".join(re.findall(r"\s*\S+", base)[:n_words])
    quoted = [quotation(start + " …" * (start != base.rstrip())), quotation(adapter)]
    return f"Before, the base:\n\n{quoted[0]}\n\nAfter, with the adapter:\n\n{quoted[1]}"


def quotation(text: str) -> str:
    """Quote an answer in markdown, its tags set as code.

    Example:
        >>> print(quotation("Sleep.\\n<HUMAN>: Why?"))
        > Sleep.
        >
        > `<HUMAN>:` Why?
    """
    lines = filter(None, map(str.strip, text.splitlines()))
    marked = (re.sub(r"(<[A-Z]+>:?)", r"`\1`", line) for line in lines)
    return "\n>\n".join(f"> {line}" for line in marked)


def verified(root: Path = ROOT) -> str:
    """Say when Colab was last rehearsed, from what tools/colab_check.py wrote.

    Args:
        root: the repository's folder.

    Returns:
        One sentence for the README.

    Example:
        >>> verified(Path("no/such/folder"))
        'Colab has not been rehearsed yet.'
    """
    found = [(json.loads(path.read_text()), path) for path in root.glob("results/*/colab.json")]
    if not found:
        return "Colab has not been rehearsed yet."
    last, path = max(found, key=lambda pair: pair[0]["date"])
    commit, _, day = last["image"].partition(", ")
    return (
        f"Last verified {last['date']}: {len(last['notebooks'])} notebooks, each alone in an empty "
        f"folder,\nrehearsed outside Colab on {last['machine']}, from the package\nlist of Colab's "
        f"image of {day} ({commit}); [{path.name}]({path.relative_to(root)})."
    )


def tagged(notebook: Any, tag: str) -> list[Any]:
    """List a notebook's cells that carry a tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def read_twin(slug: str, root: Path = ROOT) -> Any:
    """Read a notebook's twin.

    Raises:
        ValueError: if the twin has not exactly one first cell and one setup cell.
    """
    notebook = jupytext.read(root / f"notebooks/py/{slug}.py", fmt=TWIN)
    for tag in ("generated", "setup", "parameters"):
        if len(tagged(notebook, tag)) != 1:
            raise ValueError(f'notebooks/py/{slug}.py needs one cell with tags=["{tag}"].')
    return notebook


def twin_text(notebook: Any) -> str:
    """Write a notebook as its twin, without a header."""
    notebook.metadata.pop("jupytext", None)
    return jupytext.writes(notebook, fmt=TWIN)


def updated_twin(slug: str, root: Path = ROOT) -> str:
    """Write a twin's generated cells anew: first cell, setup cell, tables from results/.

    Args:
        slug: the notebook's file name without its ending.
        root: the repository's folder.

    Returns:
        The twin's whole text.
    """
    notebook, repo = read_twin(slug, root), repository(root)
    tagged(notebook, "generated")[0].source = first_cell(slug, repo)
    tagged(notebook, "setup")[0].source = setup_cell(repo)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = fill(cell.source, root, "../")
    return twin_text(notebook)


def updated_readme(root: Path = ROOT) -> str:
    """Write the README's generated blocks anew; an empty text if there is no README."""
    path = root / "README.md"
    text = path.read_text() if path.exists() else ""
    table = f"<!-- series -->\n{series_table(root, repository(root))}\n<!-- end -->"
    line = f"<!-- verified -->\n{verified(root)}\n<!-- end -->"
    text = VERIFIED_BLOCK.sub(lambda _: line, SERIES_BLOCK.sub(lambda _: table, text))
    text = ANSWERS_BLOCK.sub(
        lambda m: f"<!-- answers {m[1]} -->\n{answers(root, int(m[1]))}\n<!-- end -->", text
    )
    return fill(text, root, "")


def cell_id(source: str, taken: set[str]) -> str:
    """Name a cell by what stands in it, so that the same page is the same file.

    Example:
        >>> taken = set()
        >>> cell_id("x = 1", taken), cell_id("x = 1", taken)
        ('34bce5f7', '34bce5f7-1')
    """
    stem = hashlib.sha1(source.encode()).hexdigest()[:8]
    found = next(c for n in range(1000) if (c := f"{stem}-{n}" if n else stem) not in taken)
    taken.add(found)
    return found


def merged(twin: Any, old: Any | None) -> Any:
    """Make the notebook of a twin, with the outputs that its cells had before.

    Args:
        twin: the notebook as read from the twin.
        old: the notebook as it lies there, or None.

    Returns:
        A new notebook. A cell keeps its outputs if its code has not changed; the setup cell
        keeps them always.
    """
    known: dict[str, list[Any]] = {}
    for cell in old.cells if old else []:
        if cell.cell_type == "code":
            key = "setup" if "setup" in cell.metadata.get("tags", []) else cell.source
            known.setdefault(key, []).append(cell)
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
    taken: set[str] = set()
    for cell in twin.cells:
        cell = nbformat.from_dict(dict(cell) | {"id": cell_id(cell.source, taken)})
        if cell.cell_type == "code":
            key = "setup" if "setup" in cell.metadata.get("tags", []) else cell.source
            before = known[key].pop(0) if known.get(key) else None
            cell.outputs = before.outputs if before else []
            cell.execution_count = before.execution_count if before else None
        notebook.cells.append(cell)
    return notebook


def notebook_text(slug: str, root: Path = ROOT) -> str:
    """Write the notebook that belongs to a twin, outputs kept and cleaned."""
    path = root / f"notebooks/{slug}.ipynb"
    old = nbformat.read(path, as_version=4) if path.exists() else None
    notebook = clean_notebook(merged(read_twin(slug, root), old), root)
    return nbformat.writes(notebook) + "\n"


def write(path: Path, text: str) -> bool:
    """Write a file if that changes it, and say so.

    Returns:
        True if it changed.
    """
    if path.exists() and path.read_text() == text:
        return False
    path.write_text(text)
    print(f"wrote {path.name}")
    return True


def refuse_to_lose_edits(root: Path = ROOT) -> None:
    """Stop if a notebook was edited after its twin, since the twin would overwrite it.

    Raises:
        SystemExit: with one sentence that names the notebooks and both ways out.
    """
    edited = []
    for slug in slugs(root):
        twin, page = root / f"notebooks/py/{slug}.py", root / f"notebooks/{slug}.ipynb"
        if page.exists() and page.stat().st_mtime > twin.stat().st_mtime:
            pair = (nbformat.read(page, as_version=4), read_twin(slug, root))
            sources = [[cell.source for cell in notebook.cells] for notebook in pair]
            edited += [slug[:2]] if sources[0] != sources[1] else []
    if edited:
        sys.exit(
            f"Notebook {', '.join(edited)} was edited after its twin: take the edit over with "
            "`tools/series.py pull`, or touch the twin to drop it."
        )


def pull(slug: str, root: Path = ROOT) -> bool:
    """Take over into the twin what was edited in the notebook.

    Args:
        slug: the notebook's file name without its ending.
        root: the repository's folder.

    Returns:
        True if the twin changed.
    """
    page = nbformat.read(root / f"notebooks/{slug}.ipynb", as_version=4)
    return write(root / f"notebooks/py/{slug}.py", twin_text(page))


def updated_docs(root: Path = ROOT) -> dict[Path, str]:
    """The pages under docs/, their tables filled anew."""
    pages = sorted(root.glob("docs/**/*.md"))
    ups = {page: "../" * (len(page.relative_to(root).parts) - 1) for page in pages}
    return {page: fill(page.read_text(), root, ups[page]) for page in pages}


def sync(root: Path = ROOT) -> bool:
    """Bring the notebooks in step with their twins.

    Returns:
        True if a notebook changed.

    Raises:
        SystemExit: if a notebook was edited after its twin.
    """
    refuse_to_lose_edits(root)
    pages = {s: root / f"notebooks/{s}.ipynb" for s in slugs(root)}
    changed = [write(page, notebook_text(slug, root)) for slug, page in pages.items()]
    return any(changed)


def update(root: Path = ROOT) -> bool:
    """Write all generated parts anew, then bring the notebooks in step.

    Returns:
        True if a file changed.

    Raises:
        SystemExit: if a notebook was edited after its twin.
    """
    refuse_to_lose_edits(root)
    changed = [write(root / f"notebooks/py/{s}.py", updated_twin(s, root)) for s in slugs(root)]
    changed += [write(page, text) for page, text in updated_docs(root).items()]
    readme = updated_readme(root)
    return any([*changed, bool(readme) and write(root / "README.md", readme), sync(root)])


def execute(slug: str, root: Path = ROOT, timeout_s: int = 1800) -> float:
    """Run a notebook from top to bottom without a GPU and keep its outputs.

    Args:
        slug: the notebook's file name without its ending.
        root: the repository's folder.
        timeout_s: the longest that one cell may take, in seconds.

    Returns:
        The seconds that it took.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails. The notebook stays as it was.
    """
    from nbclient import NotebookClient

    os.environ.pop("WANDB_MODE", None)  # transformers prints a line of its own for it on the page
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    os.environ.update(offline, TOKENIZERS_PARALLELISM="false", GRADIO_ANALYTICS_ENABLED="False")
    path, start = root / f"notebooks/{slug}.ipynb", time.perf_counter()
    notebook = merged(read_twin(slug, root), None)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=timeout_s, kernel_name="python3", resources=folder).execute()
    write(path, nbformat.writes(clean_notebook(notebook, root)) + "\n")
    return time.perf_counter() - start


def check(root: Path = ROOT) -> list[str]:
    """List everything that is out of step, one sentence each; empty if nothing is."""
    problems = []
    for slug in slugs(root):
        twin, page = root / f"notebooks/py/{slug}.py", root / f"notebooks/{slug}.ipynb"
        if twin.read_text() != updated_twin(slug, root):
            problems.append(f"{twin.name}: generated parts are old: run tools/series.py update")
        if not page.exists():
            problems.append(f"{page.name} is missing: run tools/series.py sync")
            continue
        if page.read_text() != notebook_text(slug, root):
            problems.append(f"{page.name} and {twin.name} differ: run tools/series.py sync")
        found = output_problems(nbformat.read(page, as_version=4))
        problems += [f"{page.name}, {problem}" for problem in found]
    for page, text in updated_docs(root).items():
        if page.read_text() != text:
            problems.append(f"{page.name}: generated parts are old: run tools/series.py update")
    readme = root / "README.md"
    if readme.exists() and readme.read_text() != updated_readme(root):
        problems.append("README.md: generated parts are old: run tools/series.py update")
    return problems


def publish(repo: str, root: Path = ROOT) -> None:
    """Write the repository's address into pyproject.toml, badges, setup cells and documents.

    Args:
        repo: owner/name, as in the address of the repository on GitHub.
        root: the repository's folder.

    Raises:
        SystemExit: with one sentence, if that is no owner/name.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]+/[\w.-]+", repo):
        sys.exit(f"'{repo}' is not owner/name, as in make publish REPO=you/falcon-qlora-notebooks.")
    old = repository(root)
    texts = [*root.glob("*.md"), *root.glob("docs/**/*.md"), root / "CITATION.cff"]
    for path in [root / "pyproject.toml", *filter(Path.exists, texts)]:
        write(path, path.read_text().replace(old, repo))
    update(root)


def numbers_to_slugs(numbers: list[str], root: Path = ROOT) -> list[str]:
    """Turn 02 or 2 or 02_nf4_quantization into slugs; nothing means all of them."""
    wanted = {n.zfill(2)[:2] for n in numbers}
    known = slugs(root)
    if missing := wanted - {slug[:2] for slug in known}:
        sys.exit(f"No notebook {', '.join(sorted(missing))}; there are {', '.join(known)}.")
    return [slug for slug in known if not wanted or slug[:2] in wanted]


def main(argv: list[str]) -> int:
    """Do what the first argument says; the exit code is 1 if something was out of step."""
    command, *rest = argv or ["help"]
    if command in ("update", "sync"):
        changed = update() if command == "update" else sync()
        return int(changed and "--fail-on-change" in rest)
    if command == "pull":
        for slug in numbers_to_slugs(rest):
            pull(slug)
    elif command == "execute":
        for slug in numbers_to_slugs(rest):
            print(f"{slug}: {execute(slug):.0f} s", flush=True)
    elif command == "check":
        problems = check()
        print("\n".join(problems) or "Twins, notebooks, README and results are in step.")
        return int(bool(problems))
    elif command == "publish":
        publish("".join(rest[:1]))
    else:
        print(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
