"""What a reader on GitHub meets: links that lead somewhere, pages that render, style by count."""

import json
import subprocess
from pathlib import Path

import nbformat
import pytest

from tools import links
from tools.measure_style import BEFORE, count, lengths, measure, shares
from tools.outputs import output_problems
from tools.series import TITLES

ROOT = Path(__file__).resolve().parent.parent
PAGES = links.pages()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    assert links.dead_links(path) == []


def test_all_that_people_read_is_looked_at() -> None:
    names = {str(path.relative_to(ROOT)) for path in PAGES}
    wanted = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/leaving.md"}
    assert wanted | {f"notebooks/{slug}.ipynb" for slug in TITLES} <= names


def test_dead_links_are_found(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n\n## Two words, twice\n\n## Two words, twice\n\n"
        "[ok](#two-words-twice-1) [ok](page.md#one) [web](https://example.org/none)\n"
        "`[code](none.md)` [gone](none.md) [lost](#three) [far](other.md#here)\n"
        "[out](../) ![picture](none.png)\n\n```\n[fenced](none.md)\n```\n"
    )
    (tmp_path / "other.md").write_text("# There\n")
    assert links.pages(tmp_path) == [tmp_path / "other.md", page]
    assert links.dead_links(page, tmp_path) == [
        "page.md: none.md is not there",
        "page.md: #three: page.md has no such heading",
        "page.md: other.md#here: other.md has no such heading",
        "page.md: ../ is not there",
        "page.md: none.png is not there",
    ]


@pytest.mark.parametrize("slug", TITLES)
def test_github_renders_it(slug: str) -> None:
    path = ROOT / f"notebooks/{slug}.ipynb"
    book = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(book)
    assert (book.nbformat, set(book.metadata)) == (4, {"kernelspec"}), "no widgets, nothing else"
    assert path.stat().st_size < 1_000_000
    assert output_problems(book) == []


def test_the_style_of_the_series_as_counted() -> None:
    found = measure()
    assert set(found["notebooks"]) == set(TITLES)
    together = found["together"]
    assert together["share_introduced"] == 1
    assert all(page["share_read_aloud"] >= 0.8 for page in found["notebooks"].values())
    assert together["figures"] > 0 and together["figures"] == together["figures_with_alt_text"]
    assert found["pictures_in_text"] == found["pictures_in_text_with_alt_text"] > 0
    assert found["dead_links"] == 0
    assert found["before"] == BEFORE


def test_the_figures_kept_have_the_same_keys() -> None:
    kept = json.loads((ROOT / "results/cpu/style.json").read_text())
    assert measure().keys() <= kept.keys(), "run: python tools/measure_style.py"


def test_counts_on_a_page_made_for_them() -> None:
    new = nbformat.v4
    cells = [
        new.new_code_cell("bare = 1"),
        new.new_markdown_cell("# Title"),
        new.new_code_cell("a = 1\n\nb = 2"),
        new.new_markdown_cell("We count to forty."),
        new.new_code_cell("print(42)"),
        new.new_markdown_cell("We see 42.\n\nThe rest is weights."),
        new.new_code_cell("print('weights')"),
        new.new_markdown_cell("## Next\nWe see nothing here, it follows a heading: weights."),
        new.new_code_cell("show()"),
        new.new_markdown_cell("The orange line falls."),
    ]
    outputs = {
        4: new.new_output("stream", name="stdout", text="42\n"),
        6: new.new_output("stream", name="stdout", text="weights\n"),
        8: new.new_output("display_data", data={"image/png": "", "text/plain": "<Figure>"},
                          metadata={"image/png": {"alt": "An orange curve"}}),
    }  # fmt: skip
    for at, output in outputs.items():
        cells[at].outputs = [output]
    cells[2].outputs = [new.new_output("stream", name="stderr", text="a warning")]
    book = new.new_notebook(cells=cells)
    found = shares(count(book), lengths(book))
    assert (found["code_cells"], found["text_cells"], found["introduced"]) == (5, 5, 3)
    assert (found["outputs"], found["we_see"], found["number"], found["word"]) == (3, 1, 1, 1)
    assert found["read_aloud"] == 2 and found["share_read_aloud"] == pytest.approx(2 / 3)
    assert (found["figures"], found["figures_with_alt_text"]) == (1, 1)
    assert (found["longest_lines"], found["median_lines"]) == (2, 1)
