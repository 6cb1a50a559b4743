"""Rehearse Colab without Colab: each notebook alone in an empty folder, Run all, as a reader would.

    python tools/colab_check.py         all five; writes results/<machine>/colab.json
    python tools/colab_check.py 02      one, and writes nothing

A copy of the tree is published as you/falcon and committed; git is told to take that address from
the copy. `google.colab` is a stand-in that imports pandas as Colab's kernel does. pip is another:
it finds the packages of Colab's published list where ours differ, and after its one call the pins
(tests/test_colab.py asks the real pip what it would do there). torch must stay as it is. What a
rehearsal cannot show: Colab's GPU, its Python, its files.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from tools import series
from tools.colab_setup import RESTARTED
from tools.outputs import output_problems
from tools.results import this_command, write_result

REPOSITORY = "you/falcon"
DATA = ROOT / "tests/data"

STAND_IN_PIP = """\
import json, pathlib, shutil, sys
site = pathlib.Path(__file__).resolve().parents[1]
asked = [a for a in sys.argv[1:] if not a.startswith("-")]
with open(site / "pip.log", "a") as log:
    log.write(json.dumps(asked) + "\\n")
for info in site.glob("*.dist-info"):
    name = info.name.split("-")[0]
    if name == "torch" or (asked[0] == "uninstall") != (name in asked):
        continue
    shutil.rmtree(info)
"""


def git(folder: Path, *arguments: str) -> None:
    """Run git as nobody in particular."""
    who = ["-c", "user.name=rehearsal", "-c", "user.email=rehearsal@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def snapshot(folder: Path, root: Path = ROOT) -> Path:
    """Copy what git holds or would take, as it is now, into a new folder.

    Args:
        folder: to be made.
        root: the repository.

    Returns:
        The folder; not yet a git repository.
    """
    ask = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(ask, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in out.split("\0"):
        if name and (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
    return folder


def published_copy(folder: Path) -> Path:
    """Make a repository of the tree as it is now, published as you/falcon."""
    copy = snapshot(folder)
    series.publish(REPOSITORY, copy)
    git(copy, "init", "--initial-branch=main")
    git(copy, "add", "--all")
    git(copy, "commit", "--message=copy")
    return copy


def rows(name: str) -> list[str]:
    """The lines of a file in tests/data that are no comments."""
    lines = (DATA / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def image() -> str:
    """Name the published image whose list we hold: commit and date.

    Example:
        >>> len(image().split(", "))
        2
    """
    head = (DATA / "colab_freeze.txt").read_text()
    found = re.search(r"backend-info, (\w+), (\d{4}-\d\d-\d\d)", head)
    if not found:
        raise ValueError("tests/data/colab_freeze.txt does not say of which image it is.")
    return f"{found[1]}, {found[2]}"


def stand_ins(site: Path) -> Path:
    """Write the stand-ins for google.colab, for pip and for Colab's older packages.

    Args:
        site: a folder that comes first on Python's path.

    Returns:
        The folder.
    """
    (site / "google/colab").mkdir(parents=True)
    (site / "google/colab/__init__.py").write_text("import pandas\n")
    (site / "sitecustomize.py").write_text(
        "import sys\nif 'ipykernel_launcher' in ' '.join(sys.orig_argv): import google.colab\n"
    )
    (site / "pip").mkdir()
    (site / "pip/__init__.py").touch()
    (site / "pip/__main__.py").write_text(STAND_IN_PIP)
    there = [tuple(row.split()[:2]) for row in rows("colab_changes.txt")]
    there += [tuple(row.split("==")) for row in rows("colab_freeze.txt") if row[:7] == "torch=="]
    for name, version in there:
        if version != "-":
            info = site / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            about = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", ""]
            (info / "METADATA").write_text("\n".join(about))
    return site


def environment(copy: Path, site: Path) -> dict[str, str]:
    """What the kernel gets: the stand-ins first, git's redirection, no GPU, no network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return kept | {
        "PYTHONPATH": str(site),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{copy}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://github.com/{REPOSITORY}",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


def run_all(page: Path, env: dict[str, str]) -> str:
    """Run every cell of a notebook in its own folder; the page is kept with its outputs.

    Returns:
        "" if all went well; the setup cell's word if it asked for a restart.

    Raises:
        CellExecutionError: if a cell fails in any other way.
    """
    book = nbformat.read(page, as_version=4)
    folder = {"metadata": {"path": str(page.parent)}}
    client = NotebookClient(book, timeout=1800, kernel_name="python3", resources=folder)
    try:
        client.execute(env=env, stderr=subprocess.DEVNULL)  # a kernel that restarts is noisy
    except (CellExecutionError, DeadKernelError) as error:
        setup = series.tagged(book, "setup")[0]
        said = [output.get("evalue", "") for output in setup.outputs]
        if RESTARTED not in said and RESTARTED not in str(error):
            raise
        return RESTARTED
    finally:
        nbformat.write(book, page)
    return ""


def rehearse(slug: str, copy: Path, work: Path) -> dict[str, Any]:
    """Open one notebook alone and press Run all, again after a restart.

    Args:
        slug: the notebook's file name without its ending.
        copy: a published copy of the repository.
        work: an empty folder outside any repository.

    Returns:
        {"seconds", "restarts", "pip"}: the time of all runs together, how often the kernel was
        restarted, and what pip was asked for.

    Raises:
        RuntimeError: with what went wrong, if the rehearsal fails.
    """
    alone, site = work / "alone", stand_ins(work / "site")
    alone.mkdir()
    page = Path(shutil.copy(copy / f"notebooks/{slug}.ipynb", alone))
    began, restarts = time.perf_counter(), 0
    while run_all(page, environment(copy, site)):
        restarts += 1
        if restarts > 1:
            raise RuntimeError(f"{slug}: the setup cell asked for a second restart")
    log = site / "pip.log"
    asked = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    left = sorted(path.name for path in alone.iterdir())
    if left != [f"{slug}.ipynb", "falcon-qlora"]:
        raise RuntimeError(f"{slug}: beside the notebook and its clone lies {left}")
    if not list(site.glob("torch-*.dist-info")):
        raise RuntimeError(f"{slug}: torch was replaced")
    book = nbformat.read(page, as_version=4)
    if faults := [fault for fault in output_problems(book) if "shows an error" in fault]:
        raise RuntimeError(f"{slug}: {faults[0]}")
    return {"seconds": round(time.perf_counter() - began, 1), "restarts": restarts, "pip": asked}


def main(numbers: list[str]) -> None:
    """Rehearse, say how it went, and keep it if all five were rehearsed."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = published_copy(Path(folder) / "copy")
        for slug in series.numbers_to_slugs(numbers):
            work = Path(folder) / slug
            work.mkdir()
            figures[slug] = rehearse(slug, copy, work)
            found = figures[slug]
            print(f"{slug}: {found['seconds']} s, {found['restarts']} restart", flush=True)
    if not numbers:
        head = "each notebook alone in an empty folder, Colab rehearsed without a GPU"
        more = {"image": image(), "notebooks": figures}
        print(write_result("colab", more, head, this_command()))


if __name__ == "__main__":
    main(sys.argv[1:])
