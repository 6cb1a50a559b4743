"""The house style, counted: notebooks, twins, helpers and the tree as a whole."""

import ast
import re
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

from tools import series
from tools.colab_setup import read_pins

ROOT = Path(__file__).resolve().parent.parent
SLUGS = list(series.TITLES)
HELPERS = sorted((ROOT / "helpers").glob("*.py"))
INDEPENDENT = ("profiles", "nf4", "safety")
MIB = 2**20

notebooks = pytest.mark.parametrize("slug", SLUGS)
helpers = pytest.mark.parametrize("path", HELPERS, ids=lambda path: path.stem)


def cells(slug: str, kind: str | None = None) -> list[nbformat.NotebookNode]:
    path = ROOT / f"notebooks/{slug}.ipynb"
    assert path.exists(), f"{path.name} is missing: run tools/series.py sync"
    page = nbformat.read(path, as_version=4)
    return [cell for cell in page.cells if kind in (None, cell.cell_type)]


def text(slug: str) -> str:
    """All text cells as one, without what stands inside code fences."""
    joined = "\n\n".join(cell.source for cell in cells(slug, "markdown"))
    return re.sub(r"^```.*?^```", "", joined, flags=re.DOTALL | re.MULTILINE)


def has_tag(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def code_lines(cell: nbformat.NotebookNode) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def test_the_whole_series_is_there_and_in_step() -> None:
    assert series.slugs() == SLUGS, "a notebook of the series has no twin"
    assert series.check() == []


@notebooks
def test_rule_1_first_cell_and_headings(slug: str) -> None:
    first, headings = cells(slug)[0], re.findall(r"^#+ .*", text(slug), re.MULTILINE)
    assert first.source == series.first_cell(slug, series.repository())
    assert [h for h in headings if h.startswith("# ")] == [f"# {series.name(slug)}"]
    numbers = [re.match(r"## (\d+)\. ", h) for h in headings if h.startswith("## ")]
    assert all(numbers), "a heading of the second level has no number"
    assert [int(n[1]) for n in numbers if n] == list(range(1, len(numbers) + 1))
    emoji = re.findall("[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]", text(slug))
    assert not emoji, f"no emoji: {emoji}"


@notebooks
def test_rule_1_links_and_badge_lead_to_the_file(slug: str) -> None:
    address = re.search(r"/blob/main/([^)]+)\)$", series.badge(slug, "you/falcon"))
    assert address and (ROOT / address[1]).exists()
    shown = "colab-badge" in cells(slug)[0].source
    assert shown != series.repository().startswith(series.UNPUBLISHED)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text(slug)):
        if not re.match(r"https?://|mailto:", target):
            assert (ROOT / "notebooks" / target).exists(), f"dead link: {target}"


@notebooks
def test_rule_2_goal_and_needs_table(slug: str) -> None:
    page = cells(slug)
    setup = next(n for n, cell in enumerate(page) if has_tag(cell, "setup"))
    opening = "\n\n".join(cell.source for cell in page[1:setup])
    goal = opening.split("\n\n")[0].splitlines()
    assert 3 <= len(goal) <= 5, f"the goal takes {len(goal)} lines"
    assert re.search(r"^\|.*\bNeeds\b.*\n\| ---|^\*\*Needs\*\*", opening, re.MULTILINE)
    table = [line for line in opening.splitlines() if line.startswith("|")]
    assert all(card in table[0] for card in ("A100", "T4", "CPU")), table[:1]
    rows = [line.split("|")[1].lower() for line in table[2:]]
    assert any("memory" in row for row in rows) and any("minutes" in row for row in rows)
    assert "from results/" not in opening, "use a <!-- table --> block, see tools/tables.py"


def test_rule_3_setup_cells_are_the_same_ten_lines() -> None:
    setups = {cell.source for slug in SLUGS for cell in cells(slug) if has_tag(cell, "setup")}
    assert setups == {series.setup_cell(series.repository())}
    assert sum(bool(line.strip()) for line in setups.pop().splitlines()) <= 10


@notebooks
def test_rule_3_no_pin_stands_outside_requirements(slug: str) -> None:
    source = "\n".join(cell.source for cell in cells(slug, "code"))
    assert not re.search(r"pip install|[\w-]+==\d", source)


@notebooks
def test_rule_4_one_constants_cell(slug: str) -> None:
    tagged = [cell for cell in cells(slug, "code") if has_tag(cell, "parameters")]
    assert len(tagged) == 1
    assert tagged[0].source.splitlines()[-1].startswith("override(globals())")
    for cell in cells(slug, "code"):
        for node in ast.parse(cell.source).body if cell is not tagged[0] else []:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper()]
            assert has_tag(cell, "parameters") or not names, f"{names} belongs to the constants"


@notebooks
def test_rule_5_every_code_cell_is_introduced_and_short(slug: str) -> None:
    page = cells(slug)
    for before, cell in zip([None, *page], page, strict=False):
        if cell.cell_type != "code":
            continue
        assert before is not None and before.cell_type == "markdown", f"bare cell:\n{cell.source}"
        last = before.source.rstrip().split("\n\n")[-1]
        is_prose = not re.match(r"[|<#]", last.splitlines()[-1])
        assert is_prose, f"no sentence before:\n{cell.source}"
    sizes = sorted(code_lines(cell) for cell in page if cell.cell_type == "code")
    assert len(sizes) <= 30
    assert statistics.median(sizes) <= 5, sizes
    assert sizes[int(0.9 * (len(sizes) - 1))] <= 10, sizes
    assert sizes[-1] <= 30, sizes


@notebooks
def test_rule_8_asides_are_of_four_kinds(slug: str) -> None:
    for cell in cells(slug, "markdown"):
        for aside in re.findall(r"(?:^>.*\n?)+", cell.source, re.MULTILINE):
            assert re.match(r"> \*\*(Note\.|Warning\.|Try it\.|Why\?)\*\*", aside), aside


@notebooks
def test_rule_9_ends_with_what_you_have_exercises_and_sources(slug: str) -> None:
    sections = re.split(r"^## \d+\. (.*)\n", text(slug), flags=re.MULTILINE)
    titles, bodies = sections[1::2], sections[2::2]
    assert titles[-3:-1] == ["What you have now", "Exercises"], titles[-3:]
    assert titles[-1].startswith("Sources")
    exercises = re.findall(r"^\d+\. .*(?:\n(?!\d+\. ).+)*", bodies[-2], re.MULTILINE)
    assert len(exercises) == 3
    assert all("xpect" in exercise for exercise in exercises), "say what is to be expected"


@notebooks
def test_rule_10_no_login_debug_or_empty_cells(slug: str) -> None:
    for cell in cells(slug):
        assert cell.source.strip(), "an empty cell"
    source = "\n".join(cell.source for cell in cells(slug, "code"))
    banned = r"notebook_login|wandb\.login|huggingface-cli|breakpoint\(|pdb|userdata\.get"
    assert not re.findall(banned, source)
    assert not re.search(r"filterwarnings\(\s*[\"']ignore[\"']\s*\)", source)
    assert not re.search(r"\bplt\.show\(", source), "use tools.figures.show(figure, alt=...)"


@notebooks
def test_no_notebook_is_too_long_to_read(slug: str) -> None:
    words = len(re.findall(r"\S+", text(slug)))
    assert words <= 2500, f"{words} words"
    page = ROOT / f"notebooks/{slug}.ipynb"
    assert page.stat().st_size < MIB, "GitHub does not render it well over 1 MB"
    for cell in cells(slug, "code"):
        for output in cell.outputs:
            shown = output.get("text") or output.get("data", {}).get("text/plain", "")
            assert len(shown.splitlines()) <= 100, "an output of over 100 lines"


@notebooks
def test_outputs_come_from_one_run_from_top_to_bottom(slug: str) -> None:
    counts = [cell.execution_count for cell in cells(slug, "code")]
    assert counts == list(range(1, len(counts) + 1)), f"run: tools/series.py execute {slug[:2]}"


@notebooks
def test_pictures_in_the_text_have_alt_text(slug: str) -> None:
    pictures = re.findall(r"!\[([^\]]*)\]\(|<img\b([^>]*)>", text(slug))
    for alt, attributes in pictures:
        assert alt.strip() or re.search(r"alt=[\"'][^\"']+", attributes)


def code_line_numbers(source: str) -> set[int]:
    """The lines that hold code: no docstrings, no comments, no empty lines."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        holds = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if holds and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), 1)
    code = {n for n, line in lines if line.strip() and not line.strip().startswith("#")}
    return code - documented


@helpers
def test_helpers_are_thin(path: Path) -> None:
    source = path.read_text()
    code = code_line_numbers(source)
    assert len(code) <= 200
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            size = sum(node.lineno <= n <= (node.end_lineno or 0) for n in code)
            assert size <= 25, f"{node.name} has {size} lines of code"


def test_helpers_are_thin_together() -> None:
    # 1,500 in ten modules until helpers.speed came: no library has it for packed multi-query rows,
    # for 4-bit LoRA that compiles whole, and for NF4 weights multiplied in fp8. 1,650 in eleven
    # until helpers.joined: none joins the four products of a Falcon layer either. Then came the
    # parts of plan_memory, other models, rows of every shape, a bar for each shard, the time left.
    # helpers.memory took the plan in, and the sentence for a GPU that was too small all the same.
    # Then ten lines that hand `generate` a decoding loop of our own. Last, the 4-bit product that
    # adds onto the adapter's and rounds once, and layers of which one in eight is computed again;
    # an optimizer that is paged again after a resume, and blocks that a resumed run compiles for
    # the sizes that it began with: no library does either.
    assert sum(len(code_line_numbers(path.read_text())) for path in HELPERS) <= 1985
    assert len([path for path in HELPERS if path.stem != "__init__"]) <= 13


@helpers
def test_helpers_are_typed_documented_and_quiet(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), "no mutable globals"
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") != "print", f"line {node.lineno} prints"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{node.name} does not say what it returns"
            bare = [a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None]
            assert not bare, f"{node.name}: {bare} have no type"


# Functions that still lack an example; the list may only get shorter.
WITHOUT_EXAMPLE = {"answer_losses", "passage_losses", "score_answers", "causal_mask_or_none"}
WITHOUT_EXAMPLE |= {"generate_texts", "stream_reply", "reply", "find", "features"}


@helpers
def test_helpers_show_an_example(path: Path) -> None:
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    public = [n for n in functions if not n.name.startswith("_")]
    bare = {n.name for n in public if ">>>" not in (ast.get_docstring(n) or "")}
    assert bare <= WITHOUT_EXAMPLE, f"no example in {sorted(bare - WITHOUT_EXAMPLE)}"


@helpers
def test_modules_below_all_others_import_none_of_them(path: Path) -> None:
    if path.stem in INDEPENDENT:
        assert not re.search(r"^\s*(from|import) helpers", path.read_text(), re.MULTILINE)


def test_the_chat_uses_screened_answers_alone() -> None:
    tree = ast.parse((ROOT / "notebooks/py/05_gradio_chat.py").read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "helpers.generation"
        for alias in node.names
    }
    assert names, "05 imports nothing from helpers.generation"
    assert "generate_texts" not in names


def tracked(others: bool = True) -> list[Path]:
    """The files that git holds and, with `others`, those it would take if all were added."""
    git = ["git", "ls-files", "-z", "--cached", *["--others", "--exclude-standard"] * others]
    out = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in out.split("\0") if name and (ROOT / name).is_file()]


def test_the_tree_is_small() -> None:
    total = sum(path.stat().st_size for path in tracked())
    assert total < 40 * MIB, f"{total / MIB:.1f} MiB"


def test_the_top_level_holds_what_a_reader_expects_and_nothing_else() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in tracked(others=False)}
    assert top == {
        ".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff",
        "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "assets", "benchmarks", "configs",
        "docs", "helpers", "notebooks", "pyproject.toml", "requirements-dev.txt",
        "requirements.txt", "results", "tests", "tools",
    }  # fmt: skip


def test_no_machine_shows_in_the_tree() -> None:
    machine = re.compile(r"(?:^|[^\w.:/])/(?:work|farm|root|tmp|opt/(?:pypi|wheels))/", re.M)
    for path in tracked():
        if path.suffix not in (".xz", ".safetensors", ".png"):
            found = machine.search(path.read_text(errors="ignore"))
            assert not found, f"{path.name} names a machine's folder: {found and found[0]}"


def test_what_is_installed_is_what_is_pinned() -> None:
    text = "".join((ROOT / f"requirements{part}.txt").read_text() for part in ("", "-dev"))
    pins: list[Requirement] = read_pins(text)
    assert len(pins) > 20
    off = [str(p) for p in pins if version(p.name) not in p.specifier]
    assert not off, f"run `make setup`; other versions are installed of: {off}"


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["codespell"]], ids=lambda t: t[0])
def test_linters_are_content(tool: list[str]) -> None:
    command = [str(Path(sys.executable).parent / tool[0]), *tool[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
