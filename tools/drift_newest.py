"""The same look-up against the newest published libraries, fetched into a temporary folder.

    make drift

Nothing that is installed is changed. torch stays as it is, since its builds belong to the machine.
Says which pins have moved, which keywords and names are gone there, and which mends may go.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packaging.utils import canonicalize_name

from tools.colab_setup import installed_versions, read_pins
from tools.drift import our_files

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
MENDS = ["tests/test_upstream.py", "tests/test_falcon.py", "tests/test_training.py"]
WITHOUT = "trap and (without or still or flag) or library_alone"


def pinned(root: Path = ROOT) -> dict[str, str]:
    """The packages in requirements.txt but torch, with the versions that are installed."""
    pins = read_pins((root / "requirements.txt").read_text())
    names = sorted({canonicalize_name(pin.name) for pin in pins} - {"torch"})
    return {name: importlib.metadata.version(name) for name in names}


def resolve_newest(names: list[str], work: Path) -> dict[str, str]:
    """Ask pip which versions it would take if the pins were not there.

    Args:
        names: packages that may move.
        work: a folder for pip's report.

    Returns:
        New version by name, for all that would change, what they depend on included.

    Raises:
        SystemExit: with one sentence, if pip cannot answer.
    """
    report, held = work / "report.json", work / "held.txt"
    held.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    ask = ["install", "--dry-run", "--upgrade", "--report", str(report), "--constraint", str(held)]
    run_pip([*ask, *names])
    rows = [row["metadata"] for row in json.loads(report.read_text())["install"]]
    return {canonicalize_name(row["name"]): row["version"] for row in rows}


def run_pip(arguments: list[str]) -> None:
    """Run pip; one sentence if it fails."""
    done = subprocess.run([*PIP, *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        sys.exit(f"pip could not {arguments[0]} the newest packages, is there a network? {last}")


def run_with(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository with the packages of a folder before the installed ones."""
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, [str(folder), before]))
    quiet = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
    )


def drift_with(folder: Path, files: list[Path]) -> str:
    """What tools/drift.py says of files when a folder's packages come first."""
    done = run_with(folder, ["tools/drift.py", *map(str, files)])
    return done.stdout.strip() or done.stderr.strip()[-2000:]


def needless_mends(folder: Path) -> list[str]:
    """Run the tests that show what each mend is for, with a folder's packages.

    Args:
        folder: packages that come before the installed ones.

    Returns:
        A sentence for each mend that may go, or for each such test that fails in another way; one
        sentence with the number of tests if all mends are still needed.
    """
    asked = ["-m", "pytest", "-q", "--no-header", "--durations=0", "-k", WITHOUT, *MENDS]
    done = run_with(folder, asked)
    if not done.returncode:
        return [f"Every mend is still needed: {done.stdout.strip().splitlines()[-1]}"]
    failed = re.findall(r"^FAILED (\S+?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    sentences = re.findall(r"AssertionError: (.*may go.*)", done.stdout)
    return sorted({*sentences, *(f"failed: {name}" for name, _ in failed)}) or [done.stderr[-800:]]


def compare() -> int:
    """Fetch, look up, print; 1 if a keyword or a name that we use is gone there."""
    here = pinned()
    with tempfile.TemporaryDirectory() as name:
        work, target = Path(name), Path(name) / "newest"
        moved = resolve_newest(list(here), work)
        for package in sorted(moved):
            old = here.get(package) or installed_versions().get(package, "not installed")
            print(f"{package} {old} -> {moved[package]}" + " (a pin)" * (package in here))
        if not set(moved) & set(here):
            print("Every pin is the newest that fits the others.")
            return 0
        wanted = [f"{package}=={version}" for package, version in moved.items()]
        run_pip(["install", "--no-deps", "--target", str(target), *wanted])
        said = drift_with(target, our_files())
        print(said, *needless_mends(target), sep="\n")
    return int("still there" not in said)
