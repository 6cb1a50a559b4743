"""All five notebooks run: in order, and each alone in a folder where nothing was run before.

papermill sets the constants to the CPU profile and a handful of steps, and changes nothing else.
Everything happens in copies of the tree, two notebooks at a time, or one in each of two processes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from tools.run_series import constants, given, run_one
from tools.series import TITLES

ROOT = Path(__file__).resolve().parent.parent
SLUGS = list(TITLES)
SMALL = ("PROFILE=cpu", "MAX_STEPS=6")
COPIED = ("helpers", "tools", "notebooks", "assets", "results", "docs")
COPIED += ("requirements.txt", "pyproject.toml")
ALONE = SLUGS[1:]  # the first of those in order is alone too


def copy_of_the_tree(folder: Path) -> Path:
    folder.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "pretraining", "facts", ".ipynb_checkpoints")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def files(folder: Path) -> dict[str, int]:
    """Size by name of all that is there, but for what git ignores."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path.stat().st_size for path in found}
    ignored = ("artifacts/", "wandb/", "__pycache__/", ".ipynb_checkpoints/")
    return {n: size for n, size in names.items() if not any(part in n for part in ignored)}


def run_in(root: Path, slug: str) -> None:
    known = {s: constants(root / f"notebooks/{s}.ipynb") for s in SLUGS}
    run_one(slug, given(list(SMALL), known)[slug], root)


def run_notebooks(folder: Path, chosen: list[str]) -> dict[str, str]:
    """Run notebooks in a new copy of the tree; what went wrong, by slug."""
    root, faults = copy_of_the_tree(folder), {}
    before = files(root)
    for slug in chosen:
        try:
            run_in(root, slug)
        except RuntimeError as error:
            faults[slug] = str(error)
    if files(root) != before:
        changed = sorted(dict(files(root).items() ^ before.items()))
        faults["tree"] = f"these were written beside artifacts/: {changed}"
    return faults


def run_script(folder: Path) -> dict[str, str]:
    """Run notebook 03's twin as a script; what went wrong."""
    root = copy_of_the_tree(folder)
    twin = [sys.executable, f"{root}/notebooks/py/03_qlora_finetuning.py", *SMALL]
    done = subprocess.run(twin, cwd=folder.parent, capture_output=True, text=True)
    return {"script": done.stderr[-2000:]} if done.returncode else {}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


class Jobs(dict):
    """Runs by name, each a `Future` of what went wrong; one that is asked for starts."""

    def __init__(self, base: Path, pool: ThreadPoolExecutor):
        super().__init__()
        self.base, self.pool = base, pool

    def __missing__(self, name: str) -> Future[dict[str, str]]:
        if name == "script":
            self[name] = self.pool.submit(run_script, self.base / name)
        else:
            chosen = SLUGS if name == "order" else [name]
            self[name] = self.pool.submit(run_notebooks, self.base / name, chosen)
        return self[name]


@pytest.fixture(scope="module")
def jobs(base: Path) -> Iterator[Jobs]:
    """Start everything at once, unless another process runs a part; each test waits for its own."""
    kept = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(max_workers=2) as pool:
        started = Jobs(base, pool)
        if "PYTEST_XDIST_WORKER" not in os.environ:
            [started[name] for name in ("order", *ALONE, "script")]
        yield started
        for job in started.values():
            job.cancel()
    os.environ.pop("OMP_NUM_THREADS")
    os.environ.update({"OMP_NUM_THREADS": kept} if kept else {})


def executed(root: Path, slug: str) -> nbformat.NotebookNode:
    return nbformat.read(root / f"artifacts/executed/{slug}.ipynb", as_version=4)


def check_page(root: Path, slug: str) -> None:
    """Every code cell was run, the one that papermill wrote too."""
    code = [cell for cell in executed(root, slug).cells if cell.cell_type == "code"]
    written = [cell for cell in code if "injected-parameters" in cell.metadata.get("tags", [])]
    assert len(written) == 1 and "cpu" in written[0].source
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("slug", SLUGS)
def test_in_order(slug: str, jobs: Jobs, base: Path) -> None:
    faults = jobs["order"].result()
    assert slug not in faults, faults[slug]
    check_page(base / "order", slug)


@pytest.mark.parametrize("slug", ALONE)
def test_alone(slug: str, jobs: Jobs, base: Path) -> None:
    assert jobs[slug].result() == {}
    check_page(base / slug, slug)


def test_nothing_is_written_beside_artifacts(jobs: Jobs) -> None:
    faults = jobs["order"].result()
    assert "tree" not in faults, faults["tree"]


def test_what_the_notebooks_leave(jobs: Jobs, base: Path) -> None:
    jobs["order"].result()
    artifacts = base / "order/artifacts"
    assert (artifacts / "dataset").is_dir()
    rows = json.loads((artifacts / "comparison.json").read_text())
    assert rows, "no answer was saved"
    for row in rows:
        texts = [row[key] for key in ("question", "base", "adapter", "model")]
        assert all(isinstance(text, str) and text.strip() for text in texts)
        assert row["base"] != row["adapter"], "the adapter changes nothing"


def test_the_twin_of_03_is_a_script(jobs: Jobs) -> None:
    faults = jobs["script"].result()
    assert not faults, faults["script"]


def test_a_finished_page_03_may_be_run_again(jobs: Jobs, base: Path) -> None:
    slug = "03_qlora_finetuning"
    assert slug not in jobs["order"].result()
    run_in(base / "order", slug)
    page = executed(base / "order", slug)
    said = "".join(o.get("text", "") for c in page.cells for o in c.get("outputs", []))
    assert "no step was left to take" in said
    assert not re.search(r"\bnan\b", said)
