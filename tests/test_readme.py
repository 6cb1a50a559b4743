"""The README and the first lines of the pages say what results/ says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tools.predict_needs import needs as needs_now
from tools.series import TITLES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def results(name: str) -> Any:
    return json.loads((ROOT / f"results/{name}.json").read_text())


def test_the_order_is_that_of_a_stranger() -> None:
    headings = re.findall(r"^## (.*)", README, re.MULTILINE)
    assert headings == [
        "One question, before and after",
        "The notebooks",
        "Run it",
        "Fine-tune, prompt or retrieve?",
        "Measured",
        "What fails, and what is not done yet",
        "What the article got wrong",
        "Limits",
        "If you need help",
        "Licences",
    ]
    top = README.split("\n## ")[0]
    assert top.count("![") == 1 and len(top.split("![")[0].split()) < 170, "30 seconds"


def test_it_names_the_commands_and_pages() -> None:
    wanted = ("make demo", "make test", "make chat", "make run", "make drift", "make colab")
    pages = ("recipe.md", "speed.md", "memory.md", "many-gpus.md", "leaving.md")
    missing = [
        w
        for w in (*wanted, *(f"](docs/{page})" for page in (*pages, "upstream/README.md")))
        if w not in README
    ]
    assert not missing


def test_before_and_after_are_what_the_text_says() -> None:
    shown = README.split("<!-- answers")[1].split("<!-- end -->")[0]
    before, after = shown.split("After, with the adapter:")
    words = re.search(r"cut at (\d+) words", " ".join(README.split()))
    assert words and f"<!-- answers {words[1]} -->" in README
    assert "`<HUMAN>:`" in before and "`<HUMAN>:`" not in after
    parameters = results("h100/tiny_falcon")["parameters"]
    assert f"Tiny Falcon, {parameters / 1e6:.1f} M parameters" in README


def test_fine_tune_prompt_or_retrieve_is_what_was_measured() -> None:
    systems = results("cpu/crossval")["sample"]["systems"]

    def figure(system: str, name: str, end: str = "value") -> float:
        return systems[system][name][end]

    # "A stop string does it ...; the adapter without one still invents a turn now and then."
    assert figure("base_examples", "turn_leak_rate") == 0 == figure("base_stop", "turn_leak_rate")
    assert 0 < figure("adapter", "turn_leak_rate") < 0.2
    # "Search ranks the true answer highest."
    others = [name for name in systems if "rank_mrr" in systems[name] and name != "nearest"]
    assert len(others) == 5
    assert all(figure(o, "rank_mrr", "high") < figure("nearest", "rank_mrr", "low") for o in others)
    # "Nothing else lowers the loss of true answers. But shuffled answers lower it nearly as far."
    base, adapter = figure("base", "answer_loss"), figure("adapter", "answer_loss")
    assert figure("base_examples", "answer_loss") > 0.95 * base
    assert figure("adapter", "answer_loss", "high") < figure("base", "answer_loss", "low")
    assert base - figure("shuffled", "answer_loss") > 0.9 * (base - adapter)


def test_116_passes_did_what_the_readme_says() -> None:
    # "The tiny Falcon knows its rows by heart, and new rows lose most of what they had gained."
    curve = results("cpu/crossval")["sample"]["memory"]["long"]["curve"]
    known, new = ([point[key]["value"] for point in curve] for key in ("in_loss", "out_loss"))
    assert known[-1] < 0.01 and round(curve[-1]["passes"]) == 116
    assert new[0] - new[-1] < 0.5 * (new[0] - min(new))


@pytest.mark.parametrize("slug", TITLES)
def test_needs_tables_agree_with_the_run(slug: str) -> None:
    seconds = results("cpu/series")["notebooks"][slug]["seconds"]
    twin = (ROOT / f"notebooks/py/{slug}.py").read_text()
    row = re.search(r"^# \| Minutes \|.*\| (.+?) \|$", twin, re.MULTILINE)
    assert row
    holds = {"under 1": seconds < 60, "about 1": 30 <= seconds < 90, "about 2": 90 <= seconds < 150}
    assert holds[row[1]], f"{slug} took {seconds} s"


def test_page_03_and_the_readme_say_what_is_predicted_of_cards_we_had_not() -> None:
    needs = results("predicted/needs")
    assert needs_now() == {name: needs[name] for name in ("a100", "t4", "cpu")}
    both = [needs["a100"], needs["t4"]]
    twin = (ROOT / "notebooks/py/03_qlora_finetuning.py").read_text()
    for row, key in (("GPU memory, GiB", "gpu_gib"), ("Minutes", "minutes")):
        figures = " | ".join(f"{need[key]:.0f}, predicted" for need in both)
        assert f"# | {row} | {figures} |" in twin, row
    assert "column: T4 (15 GiB) = results/predicted/needs.json#t4.{}" in README
    assert results("h100/memory")["worst_error"] <= 0.05, "the sentence under Limits"
    assert "within 5 % of an H100's allocator" in README
