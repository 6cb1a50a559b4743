"""The pins against Colab's published image: what is kept, what is replaced, what goes.

This test asks the package index; nothing is installed.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.colab_setup import pip_commands

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.13"


def data_lines(name: str) -> list[str]:
    lines = (ROOT / "tests/data" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def image() -> dict[str, str]:
    """Version by canonical name, as in Colab."""
    pairs = (line.split("==") for line in data_lines("colab_freeze.txt"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def changes() -> dict[str, tuple[str, str]]:
    """(before, after) of each package that the setup cell changes."""
    rows = (line.split() for line in data_lines("colab_changes.txt"))
    return {name: (before, after) for name, before, after in rows}


@pytest.fixture(scope="module")
def commands(image: dict[str, str]) -> list[list[str]]:
    """What the setup cell gives to pip there."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.15"}
    return pip_commands([p for p in pins if not p.marker or p.marker.evaluate(here)], image)


def stand_in(folder: Path, name: str, version: str) -> None:
    """Write an empty wheel, for a package that is installed there and on no index."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        about = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", ""]
        kind = ["Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any", ""]
        wheel.writestr(f"{info}/METADATA", "\n".join(about))
        wheel.writestr(f"{info}/WHEEL", "\n".join(kind))
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def resolved(
    tmp_path_factory: pytest.TempPathFactory,
    image: dict[str, str],
    changes: dict[str, tuple[str, str]],
    commands: list[list[str]],
) -> dict[str, str]:
    """What pip takes for Python 3.13 while all but the listed packages stay as they are."""
    folder = tmp_path_factory.mktemp("colab")
    stand_in(folder, "torch", image["torch"])
    kept = (f"{name}=={version}" for name, version in image.items() if name not in changes)
    (folder / "constraints.txt").write_text("\n".join(kept))
    target = ["--ignore-installed", "--target", str(folder / "none"), "--only-binary=:all:"]
    python = ["--python-version", PYTHON, "--implementation", "cp"]
    sources = ["--find-links", str(folder), "--constraint", str(folder / "constraints.txt")]
    report = folder / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report)]
    done = subprocess.run(
        [*pip, *target, *python, *sources, *commands[-1][1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row["metadata"] for row in json.loads(report.read_text())["install"]]
    return {canonicalize_name(row["name"]): row["version"] for row in rows}


def test_torch_is_kept_and_torchao_goes(
    commands: list[list[str]], resolved: dict[str, str], image: dict[str, str]
) -> None:
    assert commands[0] == ["uninstall", "--yes", "torchao"]
    assert f"torch=={image['torch']}" in commands[1]
    assert resolved["torch"] == image["torch"] == "2.11.0+cu128"
    assert not any(name.startswith("nvidia") for name in resolved)


def test_exactly_the_listed_packages_change(
    resolved: dict[str, str], image: dict[str, str], changes: dict[str, tuple[str, str]]
) -> None:
    moved = {n: v for n, v in resolved.items() if Version(image.get(n, "0")) != Version(v)}
    assert sorted(moved) == sorted(n for n, (_, after) in changes.items() if after != "-")
    for name, (before, after) in changes.items():
        assert image.get(name, "-") == before
        assert after in ("*", "-", moved.get(name)), f"{name} becomes {moved.get(name)}"


def test_the_python_kernel_itself_is_not_touched(resolved: dict[str, str]) -> None:
    kernel = {"ipykernel", "ipython", "jupyter-client", "tornado", "traitlets", "pyzmq"}
    assert not kernel & resolved.keys()


def test_numpy_and_pandas_stay_since_the_kernel_has_imported_them(
    resolved: dict[str, str], image: dict[str, str]
) -> None:
    for name in ("numpy", "pandas", "matplotlib", "scipy", "scikit-learn"):
        assert resolved[name] == image[name]
