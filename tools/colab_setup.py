"""What the setup cell of every notebook does once it has found the repository.

Only the standard library and `packaging` are imported here: in Colab this runs before the pins
are installed.
"""

import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.script_args import override

__all__ = ["override", "prepare"]

# peft refuses to wrap a layer while a torchao older than 0.16 is installed; Colab brings 0.10.
UNWANTED = ("torchao",)
RESTARTED = "Restarted. Press Run all again."


def prepare(root: Path) -> str:
    """Make the repository's folder the working folder; in Colab, install its pins.

    PyTorch is told to grow its blocks of GPU memory, so that less is held and not used
    (docs/memory.md).

    Args:
        root: the folder that holds `requirements.txt`.

    Returns:
        What the notebook runs on: versions, GPU, number formats (`helpers.profiles.report`).

    Raises:
        SystemExit: "Restarted. Press Run all again.", in Colab and once only, after a package
            was replaced that the running kernel had already imported. Elsewhere, one sentence
            if a package is missing.
    """
    os.chdir(root)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less is wasted
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # one of many processes: the first one speaks
    if "google.colab" in sys.modules and install_pins(Path("requirements.txt").read_text()):
        restart_kernel()
    try:
        from helpers.profiles import report
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: run `pip install -r requirements.txt` in {root}.")
    return report()


def read_pins(text: str) -> list[Requirement]:
    """Parse a requirements file, without the lines that are not meant for this Python.

    Args:
        text: what stands in the file. Comments and empty lines are passed over.

    Returns:
        One requirement for each line that holds here.

    Example:
        >>> [str(pin) for pin in read_pins("# pins\\ntorch>=2.8,<2.14\\nold; python_version < '3'")]
        ['torch<2.14,>=2.8']
    """
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    pins = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]


def installed_versions() -> dict[str, str]:
    """List what is installed now, by canonical name.

    Example:
        >>> installed_versions()["packaging"] == importlib.metadata.version("packaging")
        True
    """
    importlib.invalidate_caches()
    found = importlib.metadata.distributions()
    # The first one on the path is the one that an import takes.
    versions: dict[str, str] = {}
    for dist in found:
        versions.setdefault(canonicalize_name(dist.metadata["Name"]), dist.version)
    return versions


def pip_commands(pins: Iterable[Requirement], installed: dict[str, str]) -> list[list[str]]:
    """Say what pip has to do so that the pins hold, without touching the torch that is there.

    Args:
        pins: the requirements.
        installed: version by canonical name.

    Returns:
        Arguments for pip, one list for each call; empty if everything fits already. Torch is
        asked for by the version that is installed, so that no other package can replace it.

    Example:
        >>> pins = read_pins("torch>=2.8,<2.14\\ntrl==1.16.0")
        >>> pip_commands(pins, {"torch": "2.11.0+cu128", "torchao": "0.10.0"})
        [['uninstall', '--yes', 'torchao'], ['install', 'torch==2.11.0+cu128', 'trl==1.16.0']]
        >>> pip_commands(pins, {"torch": "2.11.0+cu128", "trl": "1.16.0"})
        []
    """
    commands = [["uninstall", "--yes", name] for name in UNWANTED if name in installed]
    pins = list(pins)
    held = [p for p in pins if canonicalize_name(p.name) == "torch" and "torch" in installed]
    free = [p for p in pins if p not in held]
    if any(installed.get(canonicalize_name(p.name), "0") not in p.specifier for p in free):
        keep = [f"torch=={installed['torch']}"] if held else []
        commands.append(["install", *keep, *(f"{p.name}{p.specifier}" for p in free)])
    return commands


def imported_and_changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """List the packages that were replaced although the running Python had imported them.

    Args:
        before: version by canonical name, before the installation.
        after: the same afterwards.

    Returns:
        Their canonical names, sorted. Packages that are merely new are not among them.

    Example:
        >>> imported_and_changed({"packaging": "1.0", "never-seen": "1"}, {"packaging": "2.0"})
        ['packaging']
    """
    changed = {name for name, version in before.items() if after.get(name) != version}
    roots = {name.partition(".")[0] for name in list(sys.modules)}
    owners = importlib.metadata.packages_distributions()
    in_use = {canonicalize_name(dist) for root in roots for dist in owners.get(root, ())}
    return sorted(changed & in_use)


def install_pins(requirements: str) -> list[str]:
    """Install what the pins ask for and this machine lacks.

    Args:
        requirements: the text of the requirements file.

    Returns:
        The packages that were replaced although they had been imported. They make a restart
        necessary; an empty list means that the kernel can go on.

    Raises:
        SystemExit: with one sentence, if pip fails.
    """
    before = installed_versions()
    for arguments in pip_commands(read_pins(requirements), before):
        print("pip", *arguments, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"pip could not {arguments[0]} the packages: {done.stderr.strip()[-600:]}")
    return imported_and_changed(before, installed_versions())


def restart_kernel() -> None:
    """Restart the notebook's kernel, and stop the cells that are waiting to run.

    Raises:
        SystemExit: always; its text tells the reader what to do next.
    """
    from IPython import get_ipython

    get_ipython().kernel.do_shutdown(True)
    sys.exit(RESTARTED)
