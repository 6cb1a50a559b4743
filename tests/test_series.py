"""tools/series.py and what it uses, on a series of two small notebooks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools import colab_setup, series
from tools.outputs import clean_notebook, output_problems
from tools.script_args import override
from tools.tables import fill

FIRST = "01_data_loading"


@pytest.fixture
def in_step(toy: Path) -> Path:
    series.update(toy)
    return toy


def page(root: Path, slug: str = FIRST) -> nbformat.NotebookNode:
    return nbformat.read(root / f"notebooks/{slug}.ipynb", as_version=4)


def test_update_brings_a_series_in_step(toy: Path) -> None:
    assert len(series.check(toy)) == 5  # two twins, two missing notebooks, the README
    series.update(toy)
    assert series.check(toy) == []
    assert not series.update(toy), "a second update must change nothing"
    assert page(toy).cells[0].source.startswith("# 01 · Dialogues\n\n[02 · ")


def test_executed_outputs_are_text_and_pictures_only(in_step: Path) -> None:
    series.execute(FIRST, in_step)
    assert series.check(in_step) == []
    outputs = [output for cell in page(in_step).cells for output in cell.get("outputs", [])]
    assert [o.get("text") for o in outputs[:2]] == ["a toy machine\n", "profile auto seed 0\n"]
    assert outputs[2].metadata["image/png"]["alt"] == "A line that rises from zero to one."
    counts = [c.execution_count for c in page(in_step).cells if c.cell_type == "code"]
    assert counts == [1, 2, 3, 4]


def test_no_library_is_made_to_speak_on_the_pages(
    in_step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With WANDB_MODE set, transformers prints a line of its own as soon as it is imported. Page 03
    # sets the mode itself, so that nobody needs the variable.
    monkeypatch.setenv("WANDB_MODE", "offline")
    twin = in_step / f"notebooks/py/{FIRST}.py"
    speaks = "import transformers.integrations.integration_utils"
    twin.write_text(twin.read_text().replace('print("noise"', f'{speaks}\nprint("noise"'))
    series.execute(FIRST, in_step)
    shown = [o.get("text", "") for cell in page(in_step).cells for o in cell.get("outputs", [])]
    assert "profile auto seed 0\n" in shown, "no line more"
    assert "WANDB_MODE" not in (series.ROOT / "Makefile").read_text()


def test_sync_keeps_the_outputs_of_unchanged_cells_alone(in_step: Path) -> None:
    series.execute(FIRST, in_step)
    twin = in_step / f"notebooks/py/{FIRST}.py"
    twin.write_text(twin.read_text().replace('print("profile"', 'print("Profile"'))
    assert any("differ" in problem for problem in series.check(in_step))
    assert series.sync(in_step)
    code = [cell for cell in page(in_step).cells if cell.cell_type == "code"]
    assert [len(cell.outputs) for cell in code] == [1, 0, 0, 1]
    assert code[2].execution_count is None


def test_an_edit_inside_jupyter_is_not_lost(in_step: Path) -> None:
    file = in_step / f"notebooks/{FIRST}.ipynb"
    edited = file.read_text().replace("We count.", "We count aloud.")
    file.write_text(edited)
    later = (in_step / f"notebooks/py/{FIRST}.py").stat().st_mtime + 10
    os.utime(file, (later, later))
    with pytest.raises(SystemExit, match="Notebook 01 was edited after its twin"):
        series.update(in_step)
    assert file.read_text() == edited
    series.pull(FIRST, in_step)
    series.update(in_step)
    assert "# We count aloud." in (in_step / f"notebooks/py/{FIRST}.py").read_text()
    assert series.check(in_step) == []


def test_publish_writes_badges_setup_cells_and_readme(in_step: Path) -> None:
    series.execute(FIRST, in_step)
    assert "colab" not in page(in_step).cells[0].source
    series.publish("you/falcon", in_step)
    cells = page(in_step).cells
    address = f"{series.COLAB}/you/falcon/blob/main/notebooks/{FIRST}.ipynb"
    assert address in cells[0].source
    assert address in (in_step / "README.md").read_text()
    setup = series.tagged(page(in_step), "setup")[0]
    assert 'url = "https://github.com/you/falcon"' in setup.source
    assert setup.outputs, "publishing must not lose the setup cell's output"
    assert series.repository(in_step) == "you/falcon"
    assert series.check(in_step) == []


def test_publish_refuses_what_is_no_address(in_step: Path) -> None:
    with pytest.raises(SystemExit, match="is not owner/name"):
        series.publish("https://github.com/you/falcon", in_step)


def test_tables_take_figures_from_results(in_step: Path) -> None:
    assert "| Seconds | not measured yet |" in page(in_step).cells[-1].source
    file = in_step / "results/cpu/series.json"
    file.parent.mkdir(parents=True)
    figures = {"machine": "2 cores", "date": "2026-01-02"}
    file.write_text(json.dumps(figures | {"notebooks": {FIRST: {"seconds": 12.345}}}))
    assert series.check(in_step), "a new result must show as an old table"
    series.update(in_step)
    assert "| Seconds | 12.3 |" in page(in_step).cells[-1].source
    assert "2 cores, 2026-01-02, [series.json](../results/cpu/series.json)" in (
        page(in_step).cells[-1].source
    )


def test_the_readme_shows_what_notebook_04_shows(in_step: Path) -> None:
    new = nbformat.v4
    cell = new.new_code_cell("print()")
    said = "--- base: 9 tokens\nSleep  well,\nand long.\n<HUMAN>: And then?\n\n"
    said += "--- adapter: 2 tokens\nYes.\n"
    cell.outputs = [new.new_output("stream", name="stdout", text=said)]
    book = new.new_notebook(cells=[cell])
    nbformat.write(book, in_step / "notebooks/04_base_vs_peft.ipynb")
    readme = in_step / "README.md"
    readme.write_text("<!-- answers 5 -->\nold\n<!-- end -->\n")
    assert "README.md: generated parts are old: run tools/series.py update" in series.check(in_step)
    series.update(in_step)
    shown = readme.read_text().splitlines()
    assert shown[3:6] == ["> Sleep  well,", ">", "> and long."] and shown[7] == "> `<HUMAN>:` …"
    assert shown[-2:] == ["> Yes.", "<!-- end -->"] and "old" not in shown


def test_minutes_come_from_the_run(in_step: Path) -> None:
    assert "not measured yet" in series.series_table(in_step, "OWNER/falcon")
    file = in_step / "results/cpu/series.json"
    file.parent.mkdir(parents=True)
    took = {slug: {"seconds": 90.0} for slug in series.TITLES}
    file.write_text(json.dumps({"machine": "2 cores", "date": "2026-01-02", "notebooks": took}))
    table = series.series_table(in_step, "you/falcon").splitlines()
    assert table[2].split(" | ")[3] == "1.5" and "colab-badge.svg" in table[2]
    assert "2 cores, 2026-01-02: together 7.5 minutes" in table[-1]


def test_a_column_says_where_it_looks(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"machine": "2 cores", "date": "2026-01-02", "s": {"base": {"loss": 4.7}}})
    )
    spec = "column: Loss = a.json#s.{}.loss or none\ncolumn: Turns = a.json#s.{}.turns\n"
    text = f"<!-- table\n{spec}row: Base = base\nrow: Search = search\n-->\n<!-- end -->"
    lines = fill(text, tmp_path, "").splitlines()
    assert "| Base | 4.7 | not measured yet |" in lines
    assert "| Search | none | not measured yet |" in lines
    assert "Measured on 2 cores, 2026-01-02, [a.json](a.json)." in lines


def test_a_twin_without_setup_cell_is_named(in_step: Path) -> None:
    twin = in_step / f"notebooks/py/{FIRST}.py"
    twin.write_text(twin.read_text().replace('tags=["setup"]', ""))
    with pytest.raises(ValueError, match=r'01_data_loading.py needs one cell with tags=\["setup"'):
        series.check(in_step)


def test_widgets_stderr_errors_and_bare_pictures_are_found() -> None:
    new, data = nbformat.v4, {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    cell = new.new_code_cell("x")
    cell.outputs = [
        new.new_output("stream", name="stderr", text="warning"),
        new.new_output("display_data", data=data),
        new.new_output("error", ename="ValueError", evalue="", traceback=[]),
        new.new_output("display_data", data={"image/png": "..."}),
        new.new_output("display_data", data={"text/html": "<img src='x'>"}),
        new.new_output("stream", name="stdout", text="0 %\r99 %\nleft /data/series/a"),
    ]
    notebook = new.new_notebook(cells=[cell], metadata={"widgets": {}})
    assert len(output_problems(notebook)) == 6
    clean_notebook(notebook, Path("/data/series"))
    assert len(output_problems(notebook)) == 3  # the error, and two pictures without a text
    assert cell.outputs[-1].text == "99 %\nleft a"


def run_twin(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    twin = f"{root}/notebooks/py/{FIRST}.py"
    return subprocess.run(
        [sys.executable, twin, *arguments], cwd=root.parent, capture_output=True, text=True
    )


def test_a_twin_is_a_script_that_takes_its_constants(in_step: Path) -> None:
    done = run_twin(in_step, "SEED=7", "PROFILE=cpu")
    assert done.stdout == "a toy machine\nprofile cpu seed 7\n", done.stderr
    wrong = run_twin(in_step, "SEEDS=7")
    assert wrong.returncode == 1
    assert wrong.stderr == "'SEEDS=7' is not NAME=value with a NAME out of: PROFILE, SEED.\n"


def test_in_a_script_the_text_stands_in_for_a_picture(in_step: Path) -> None:
    twin = in_step / f"notebooks/py/{FIRST}.py"
    shown = "from tools.figures import new_figure, show\n"
    shown += "show(new_figure()[0], alt='A line that rises from zero.')"
    twin.write_text(f"import sys\nsys.path.insert(0, {str(in_step)!r})\n{shown}\n")
    done = run_twin(in_step)
    assert done.stdout == "A line that rises from zero.\n", done.stderr


@pytest.mark.parametrize("argument", ["SEED=seven", "SEED=1.5", "SEED=[1]", "SEED", "=1"])
def test_an_argument_of_another_kind_is_refused(argument: str) -> None:
    constants = {"SEED": 0}
    with pytest.raises(SystemExit, match="SEED takes a value of type int|is not NAME=value"):
        override(constants, [argument])
    assert constants == {"SEED": 0}


def test_override_does_nothing_inside_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "connection.json"])
    constants = {"SEED": 0}
    override(constants)
    assert constants == {"SEED": 0}


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=toy", "-c", "user.email=toy@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_setup_cell_fetches_the_repository_when_opened_alone(
    in_step: Path, tmp_path: Path
) -> None:
    """Only the notebook is there; git is told to take the address from a local folder."""
    git(in_step, "init", "--initial-branch=main")
    git(in_step, "add", ".")
    git(in_step, "commit", "-m", "toy")
    alone = tmp_path / "alone"
    alone.mkdir()
    cell = alone / "cell.py"
    later = "assert (root / 'requirements.txt').exists(), 'a later cell does not find its files'\n"
    cell.write_text("del __file__\n" + series.setup_cell("you/falcon") + f"\n{later}")
    redirect = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{in_step}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/you/falcon",
    }
    for _ in range(2):  # the second time the folder is there already, as after a restart
        run = [sys.executable, str(cell)]
        done = subprocess.run(
            run, cwd=alone, env=os.environ | redirect, capture_output=True, text=True
        )
        assert done.stdout == "a toy machine\n", done.stderr
        assert done.returncode == 0, done.stderr
    assert (alone / "falcon-qlora/helpers/profiles.py").exists()


class FakeKernel:
    restarts = 0

    def do_shutdown(self, restart: bool) -> None:
        assert restart
        self.restarts += 1


def prepare_in_colab(
    monkeypatch: pytest.MonkeyPatch, toy: Path, before: dict[str, str], after: dict[str, str]
) -> tuple[FakeKernel, list[list[str]], str]:
    """Run prepare() as in Colab: pip only noted, what is installed given."""
    kernel, calls, states = FakeKernel(), [], [before, after]

    def run(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(arguments[3:])
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.chdir(toy)
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr(colab_setup, "installed_versions", lambda: states.pop(0))
    monkeypatch.setattr(colab_setup.subprocess, "run", run)
    monkeypatch.setattr("IPython.get_ipython", lambda: type("Shell", (), {"kernel": kernel}))
    try:
        colab_setup.prepare(toy)
        said = ""
    except SystemExit as stop:
        said = str(stop)
    return kernel, calls, said


def test_colab_restarts_once_when_something_imported_was_replaced(
    monkeypatch: pytest.MonkeyPatch, toy: Path
) -> None:
    pins = colab_setup.read_pins((toy / "requirements.txt").read_text())
    good = {p.name: str(p.specifier).lstrip("=") for p in pins} | {"torch": "2.11.0+cu128"}
    old = good | {"torchao": "0.10.0", "pytest": "1.0", "trl": "0.1"}
    kernel, calls, said = prepare_in_colab(monkeypatch, toy, old, good | {"pytest": "2.0"})
    assert said == "Restarted. Press Run all again."
    assert kernel.restarts == 1
    assert calls[0] == ["--quiet", "uninstall", "--yes", "torchao"]
    assert "torch==2.11.0+cu128" in calls[1] and "trl==1.16.0" in calls[1]

    kernel, calls, said = prepare_in_colab(monkeypatch, toy, good, good)
    assert (kernel.restarts, calls, said) == (0, [], ""), "the second time nothing is left to do"


def test_outside_colab_the_setup_installs_nothing(
    monkeypatch: pytest.MonkeyPatch, toy: Path
) -> None:
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.chdir(toy)
    monkeypatch.setattr(colab_setup, "install_pins", lambda _: pytest.fail("pip was called"))
    assert colab_setup.prepare(toy)  # the project's own report
