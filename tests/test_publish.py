"""The real series published in a copy, and one notebook opened alone as in Colab."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from tools import colab_check, series

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = f"{series.UNPUBLISHED}/falcon-qlora-notebooks"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as it is now, published as you/falcon and committed."""
    return colab_check.published_copy(tmp_path_factory.mktemp("published") / "copy")


def texts(root: Path) -> dict[str, str]:
    files = [*root.glob("*"), *root.glob("docs/**/*.md"), *root.glob("notebooks/**/*")]
    return {str(p.relative_to(root)): p.read_text(errors="ignore") for p in files if p.is_file()}


def test_publishing_changes_every_place_and_leaves_nothing_behind(copy: Path) -> None:
    assert series.check(copy) == []
    before = {name for name, text in texts(ROOT).items() if PLACEHOLDER in text}
    assert {"pyproject.toml", "CITATION.cff", "notebooks/01_data_loading.ipynb"} <= before
    left = [name for name, text in texts(copy).items() if PLACEHOLDER in text]
    assert left == []


def test_each_notebook_has_its_own_badge_and_the_readme_all_of_them(copy: Path) -> None:
    readme = (copy / "README.md").read_text()
    for slug in series.TITLES:
        book = nbformat.read(copy / f"notebooks/{slug}.ipynb", as_version=4)
        address = f"{series.COLAB}/you/falcon/blob/main/notebooks/{slug}.ipynb"
        assert address in book.cells[0].source and address in readme
        setup = series.tagged(book, "setup")[0]
        assert 'url = "https://github.com/you/falcon"' in setup.source
        outputs = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
        assert any(outputs), "publishing must not lose what the notebooks show"
    assert readme.count("colab-badge.svg") == 5


def test_publishing_again_moves_all_to_the_new_address(copy: Path, tmp_path: Path) -> None:
    again = colab_check.snapshot(tmp_path / "again", copy)
    series.publish("her-name/qlora.falcon_7b", again)
    assert series.check(again) == []
    found = texts(again)
    assert not [
        name for name, text in found.items() if "you/falcon" in text.replace("REPO=you", "")
    ]
    assert "https://github.com/her-name/qlora.falcon_7b" in found["CITATION.cff"]


def test_the_citation_is_read_as_one(copy: Path) -> None:
    cited = yaml.safe_load((copy / "CITATION.cff").read_text())
    assert cited.keys() >= {"cff-version", "message", "title", "authors"}, "GitHub shows it then"
    assert cited["repository-code"] == "https://github.com/you/falcon"
    assert cited["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    for work in cited["references"]:
        assert work.keys() >= {"type", "title", "authors", "year", "url"}, work["title"]


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make with the pins taken as installed."""
    command = ["make", "-s", "-o", ".venv/.pins-installed", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_make_publish_takes_the_address_and_says_what_is_missing(
    copy: Path, tmp_path: Path
) -> None:
    again = colab_check.snapshot(tmp_path / "again", copy)
    (again / ".venv").symlink_to(sys.prefix)
    done = make(again, "publish")
    assert done.returncode and "make publish REPO=you/name" in done.stdout
    wrong = make(again, "publish", "REPO=https://github.com/me/mine")
    assert wrong.returncode and "is not owner/name" in wrong.stderr
    done = make(again, "publish", "REPO=me/mine")
    assert done.returncode == 0, done.stderr
    assert series.repository(again) == "me/mine" and series.check(again) == []


def test_a_notebook_opened_alone_installs_restarts_once_and_runs(
    copy: Path, tmp_path: Path
) -> None:
    found = colab_check.rehearse("01_data_loading", copy, tmp_path)
    assert found["restarts"] == 1, "pandas has imported the pyarrow that was replaced"
    assert found["pip"][0] == ["uninstall", "torchao"]
    asked = found["pip"][1]
    assert "torch==2.11.0+cu128" in asked and "trl==1.16.0" in asked
    assert len(found["pip"]) == 2, "after the restart nothing is left to do"


def test_the_line_in_the_readme_is_what_the_check_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "results/cpu"
    folder.mkdir(parents=True)
    figures = {"date": "2026-01-02", "machine": "a toy", "image": "abc1234, 2025-12-31"}
    (folder / "colab.json").write_text(json.dumps(figures | {"notebooks": {"01": {}, "02": {}}}))
    said = series.verified(tmp_path).replace("\n", " ")
    assert said.startswith("Last verified 2026-01-02: 2 notebooks, each alone in an empty folder")
    assert "Colab's image of 2025-12-31 (abc1234)" in said and "(results/cpu/colab.json)" in said
    assert series.verified() in (ROOT / "README.md").read_text(), "run tools/series.py update"


def test_the_rehearsal_sees_a_failing_cell_and_a_second_restart(
    monkeypatch: pytest.MonkeyPatch, copy: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(colab_check, "run_all", lambda page, env: colab_check.RESTARTED)
    with pytest.raises(RuntimeError, match="second restart"):
        colab_check.rehearse("01_data_loading", copy, tmp_path)
