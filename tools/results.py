"""The files under results/: who measured what, where, with what, and when."""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")


def machine_name() -> tuple[str, str]:
    """Name this machine, short for a folder and long for a label.

    Returns:
        (folder, label), such as ("h100", "NVIDIA H100 80GB HBM3") or
        ("cpu", "2 cores of x86_64, no GPU").
    """
    import torch

    if torch.cuda.is_available():
        label = torch.cuda.get_device_name(0)
        return gpu_folder(label), label
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "cpu", f"{cores} cores of {platform.machine()}, no GPU"


def gpu_folder(label: str) -> str:
    """Shorten a GPU's name to the folder that its results go to.

    Args:
        label: the name that the driver gives.

    Returns:
        The letter-and-number part in small letters; without one, the whole name, joined by dashes.

    Example:
        >>> gpu_folder("NVIDIA A100-SXM4-40GB"), gpu_folder("Tesla T4"), gpu_folder("Some GPU")
        ('a100', 't4', 'some-gpu')
    """
    found = re.search(r"\b([A-Z]{1,3}\d{1,4})\b", label)
    return found[1].lower() if found else re.sub(r"\W+", "-", label.lower()).strip("-")


def commit_name() -> str:
    """Give the commit that is checked out, with `-dirty` behind it if tracked files differ.

    The variable SERIES_COMMIT goes first: for a copy of the tree that is no checkout of its own.
    """
    if "SERIES_COMMIT" in os.environ:
        return os.environ["SERIES_COMMIT"]
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def provenance(figure: str, command: str) -> dict[str, Any]:
    """Say where a figure comes from: the keys that every file under results/ begins with.

    Args:
        figure: what the file holds, in a few words.
        command: what has to be typed to get it again.

    Returns:
        figure, command, date (ISO), commit, versions (by package) and machine.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "figure": figure,
        "command": command,
        "date": date.today().isoformat(),
        "commit": commit_name(),
        "versions": versions,
        "machine": machine_name()[1],
    }


def write_result(
    name: str, figures: dict[str, Any], figure: str, command: str, cards: int = 1,
    out: str | Path | None = None,
) -> Path:  # fmt: skip
    """Write figures, and where they come from, to results/<machine>/<name>.json.

    Args:
        name: the file's name without its ending.
        figures: what was measured. Every estimate is {"value", "low", "high", "n"}.
        figure: what the file holds, in a few words.
        command: what has to be typed to get it again.
        cards: how many GPUs took part; from two on the folder is `<machine>-x<cards>`.
        out: another file to write instead.

    Returns:
        The path of the file.

    Raises:
        ValueError: if a figure has the name of one of the provenance keys.
    """
    head = provenance(figure, command)
    if both := sorted(head.keys() & figures.keys()):
        raise ValueError(f"{', '.join(both)} is written by write_result itself: use another name.")
    folder = machine_name()[0]
    if cards > 1:
        folder, head["machine"] = f"{folder}-x{cards}", f"{cards} x {head['machine']}"
    path = Path(out) if out else ROOT / "results" / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | figures, indent=2) + "\n")
    return path


def this_command() -> str:
    """Give the command line of the running script, as one would type it in the repository.

    Folders of this machine are left out: a path is its last part, and `--out` is gone.

    Example:
        >>> before, sys.argv = sys.argv, ["a.py", "--out", "/x/y.json", "--model", "/x/f7"]
        >>> this_command().split("a.py ")[1]
        '--model f7'
        >>> sys.argv = before
    """
    words = sys.argv[1:]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    words = [Path(word).name if word.startswith("/") else word for word in words]
    return " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *words])
