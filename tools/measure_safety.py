"""Measure the safety screen: recall, false alarms, speed, and answers held back.

Stores counts by kind, and which of our own unseen cases it got wrong. Of answers only a count.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.evaluation import wilson
from helpers.safety import HEAD, screen_input, screen_output
from tools.results import write_result

CASES = ROOT / "tests" / "safety_cases.tsv"
SAMPLE = ROOT / "assets" / "sample_dialogues.jsonl"
ORIGIN = {
    "seen": "at hand while rules and classifier were made; the classifier was trained on them",
    "unseen": "written by somebody who saw neither rules nor training text; scored with one screen "
    "alone, whose rules, training text, weights and threshold were fixed before; one message that "
    "stood in the training text by chance is counted as seen",
}


HEAD_KEYS = ("trained_on", "threshold", "sets_held_out", "cross_validation")


def read_cases(path: Path) -> list[dict[str, str]]:
    """Rows of a file of cases: id, kind, risk ("0" or "1"), part, message."""
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file, delimiter="\t")
    return [dict(zip(head, row, strict=True)) for row in rows]


def screen_case(message: str) -> bool:
    """Screen one message, or a conversation whose user turns ` ||| ` parts."""
    *history, text = message.split(" ||| ")
    return screen_input(text, history).flag


def rates(cases: Sequence[dict[str, str]], risk: str) -> dict[str, Any]:
    """The share of flagged cases among those of one label, overall and by kind, with intervals."""
    flags = defaultdict(list)
    for case in cases:
        if case["risk"] == risk:
            flags[case["kind"]].append(screen_case(case["message"]))
    every = [flag for found in flags.values() for flag in found]
    by_kind = {kind: wilson(sum(found), len(found)) for kind, found in flags.items()}
    return {"overall": wilson(sum(every), len(every)), "by_kind": by_kind}


def milliseconds(cases: Sequence[dict[str, str]], rounds: int = 5) -> dict[str, float]:
    """CPU time in ms: median over all cases of the fastest of some rounds, and the slowest."""
    spent = []
    for case in cases:
        times = []
        for _ in range(rounds):
            start = time.thread_time()
            screen_case(case["message"])
            times.append(1000 * (time.thread_time() - start))
        spent.append(min(times))
    return {"median": statistics.median(spent), "slowest": max(spent)}


def read_answers(path: Path) -> list[str]:
    """The answers of a file of dialogues."""
    rows = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [row.split("<ASSISTANT>:")[1] for row in rows]


def adapter_answers() -> list[str]:
    """What the tiny Falcon with its embedded adapter says to the 18 test questions."""
    from peft import PeftModel

    from helpers.dialogues import load_dialogues, split_rows
    from helpers.falcon import load_falcon, load_tokenizer, use_fused_attention
    from helpers.generation import generate_texts, sampling
    from helpers.profiles import detect_profile
    from helpers.prompts import format_prompt, post_process_chat

    tiny = detect_profile("cpu")
    base = load_falcon(tiny.model, tiny)
    use_fused_attention(base)
    model = PeftModel.from_pretrained(base, tiny.adapter).eval()
    tokenizer = load_tokenizer(tiny.model)
    test = split_rows(load_dialogues(tiny.dataset)[0])["test"]
    prompts = [format_prompt(question) for question in test["question"]]
    said = generate_texts(model, tokenizer, prompts, sampling(tokenizer))
    return [post_process_chat(answer.text, answer.finished) for answer in said]


def held_back(answers: Sequence[str]) -> dict[str, float]:
    """The share of answers that the screen after the model holds back."""
    return wilson(sum(screen_output(answer).flag for answer in answers), len(answers))


def wrong(cases: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """The ids of the cases at risk that were missed, and of the harmless ones that were stopped."""
    off = [case for case in cases if screen_case(case["message"]) != (case["risk"] == "1")]
    return {
        name: [case["id"] for case in off if case["risk"] == risk]
        for name, risk in (("missed", "1"), ("stopped", "0"))
    }


def measure(cases: Sequence[dict[str, str]], data: Path | None) -> dict[str, Any]:
    """All figures of `results/cpu/safety.json`."""
    figures: dict[str, Any] = {}
    for part in ("seen", "unseen"):
        rows = [case for case in cases if case["part"] == part]
        if rows:
            figures[part] = {"origin": ORIGIN[part], "recall": rates(rows, "1")}
            figures[part]["false_alarms"] = rates(rows, "0")
            figures[part]["wrong"] = wrong(rows)
    figures["classifier"] = {k: HEAD[k] for k in HEAD_KEYS}
    figures["ms_per_message"] = milliseconds(cases)
    figures["outputs_blocked"] = {
        "sample": held_back(read_answers(SAMPLE)),
        "adapter": held_back(adapter_answers()),
    }
    if data:
        figures["outputs_blocked"]["original"] = held_back(read_answers(data))
    return figures


def main() -> None:
    """Measure, print by kind, and write the result unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, nargs="+", default=[CASES])
    parser.add_argument("--data", type=Path, help="a second data set of dialogues, counted only")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    figures = measure([row for path in options.cases for row in read_cases(path)], options.data)
    for part in ("seen", "unseen"):
        for name in ("recall", "false_alarms"):
            found = figures[part][name]
            every = {"overall": found["overall"]} | found["by_kind"]
            shares = (f"{kind} {rate['value']:.2f} of {rate['n']}" for kind, rate in every.items())
            print(part, name, *shares, sep="; ")
    print(figures["ms_per_message"], figures["outputs_blocked"])
    if not options.dry_run:
        command = "python tools/measure_safety.py" + (" --data DATA.jsonl" if options.data else "")
        write_result("safety", figures, "the safety screen on labelled messages", command)


if __name__ == "__main__":
    main()
