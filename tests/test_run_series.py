"""tools/run_series.py on a series of two small notebooks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import series


@pytest.fixture
def in_step(toy: Path) -> Path:
    series.update(toy)
    return toy


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/run_series.py", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_it_runs_in_order_and_shows_the_answers(in_step: Path) -> None:
    done = run(in_step, "PROFILE=cpu", "MAX_STEPS=5")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [*series.slugs(in_step), "together"]
    assert "toy, 5 steps is asked: Q?" in lines
    assert lines[-1].split("|") == [f"{'on and on':<46} ", " A."]
    timings = json.loads((in_step / "artifacts/timings.json").read_text())
    assert list(timings) == series.slugs(in_step)
    for figures in timings.values():
        assert figures["seconds"] > 0 and figures["peak_rss_gib"] > 0.02
    first = (in_step / "artifacts/executed/01_data_loading.ipynb").read_text()
    assert "profile cpu seed 0" in first, "PROFILE did not reach the notebook"


def test_it_leaves_the_notebooks_as_they_were(in_step: Path) -> None:
    before = {p: p.read_bytes() for p in in_step.glob("notebooks/**/*") if p.is_file()}
    assert run(in_step, "02").returncode == 0
    assert before == {p: p.read_bytes() for p in in_step.glob("notebooks/**/*") if p.is_file()}


def test_a_failing_cell_is_shown_and_stops_the_run(in_step: Path) -> None:
    twin = in_step / "notebooks/py/01_data_loading.py"
    twin.write_text(twin.read_text().replace("# We count.\n", "# We count.\n\n# %%\n1 / 0\n"))
    series.sync(in_step)
    done = run(in_step)
    assert done.returncode == 1
    assert "1 / 0" in done.stderr and "ZeroDivisionError: division by zero" in done.stderr
    assert "02_nf4_quantization" not in done.stdout


def test_unknown_constants_and_notebooks_are_named(in_step: Path) -> None:
    wrong = run(in_step, "STEPS=5")
    assert wrong.stderr == (
        "'STEPS=5' is not NAME=value with a NAME out of: MAX_STEPS, PROFILE, SEED.\n"
    )
    assert run(in_step, "07").stderr.startswith("No notebook 07; there are 01_data_loading")


def test_peak_memory_is_the_notebook_s_own(in_step: Path) -> None:
    """300 MB must show in the figure of the notebook that holds them, and only there."""
    twin = in_step / "notebooks/py/01_data_loading.py"
    heavy = "# We count.\n\n# %%\nimport time; held = b'x' * 3 * 10**8; time.sleep(1)\n"
    twin.write_text(twin.read_text().replace("# We count.\n", heavy))
    series.sync(in_step)
    assert run(in_step).returncode == 0
    timings = json.loads((in_step / "artifacts/timings.json").read_text())
    first, second = (figures["peak_rss_gib"] for figures in timings.values())
    assert first - second > 0.2
