"""Train the small classifier beside the safety rules; writes helpers/screen_weights.bin.

    python tools/train_screen.py

Logistic regression over `helpers.safety.features`: runs of words and characters, and what the
rules find. Trained on text of our own alone: assets/screen_text.tsv, the seen cases, the sample
questions, the questions of assets/pretraining, and the examples of the rules. The threshold is
chosen by cross-validation on the first of these, never on the unseen cases.
"""

import csv
import json
import random
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import safety
from helpers.evaluation import wilson
from tools.measure_safety import CASES, SAMPLE, read_cases

TEXT = ROOT / "assets/screen_text.tsv"
PRETRAINING = ROOT / "assets/pretraining"
CRISIS_ROWS = 162  # the sample's rows from here on are of crisis, see assets/README.md
ALARMS = 0.05
FOLDS = 5
Rows = list[tuple[bool, str]]
TYPOS = {"going to": "gonna", "want to": "wanna", "you": "u", "are": "r", "because": "cuz"}


def read_text() -> Rows:
    """The labelled messages, (at risk, text) each, without what is an unseen case by chance."""
    with TEXT.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    unseen = {c["message"].casefold() for c in read_cases(CASES) if c["part"] == "unseen"}
    kept = [row for row in rows if row["text"].casefold() not in unseen]
    return [(row["label"] == "risk", row["text"]) for row in kept]


def read_questions() -> Rows:
    """Ordinary questions about well-being: the sample's, and those the tiny model learned from."""
    lines = SAMPLE.read_text().splitlines()[:CRISIS_ROWS]
    asked = [json.loads(line)["text"].split("<ASSISTANT>:")[0][8:].strip() for line in lines]
    for path in sorted(PRETRAINING.glob("answers_*.jsonl")):
        asked += [json.loads(line)["question"] for line in path.read_text().splitlines()]
    return [(False, text) for text in asked if not re.search("suicid|die|kill|harm", text)]


def read_examples() -> Rows:
    """What each rule of the table is meant to find and to leave."""
    rules = safety.INPUT_RULES
    return [(True, r.example) for r in rules] + [(False, r.counter_example) for r in rules]


def read_seen() -> Rows:
    """The seen part of the cases; the turns of a conversation as one text, the last three."""
    cases = [case for case in read_cases(CASES) if case["part"] == "seen"]
    return [(c["risk"] == "1", " ".join(c["message"].split(" ||| ")[-3:])) for c in cases]


def misspell(text: str, rng: random.Random) -> str:
    """A text as typed in a hurry: small letters, no points, chat spelling, one slip."""
    text = re.sub(r"[.,!?']", "", text.lower())
    for word, short in TYPOS.items():
        text = re.sub(rf"\b{word}\b", short, text)
    at = rng.randrange(max(1, len(text) - 1))
    return text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]


def matrix(texts: Sequence[str]) -> sparse.csr_matrix:
    """(n, buckets) the features of each text, as the screen computes them."""
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        plain = safety.normalise(text)
        for bucket, value in safety.features(plain, safety.find(plain)).items():
            rows.append(row), columns.append(bucket), values.append(value)
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(texts), safety.BUCKETS))


def fit(inputs: sparse.csr_matrix, labels: np.ndarray) -> LogisticRegression:
    """One logistic regression, both labels weighing the same."""
    return LogisticRegression(C=6, max_iter=500, class_weight="balanced").fit(inputs, labels)


def folds(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Boolean masks (train, held out); texts with the same words stay in one fold."""
    keys = [" ".join(sorted(set(re.findall(r"\w+", text.lower())))) for _, text in rows]
    own = np.array([zlib.crc32(key.encode()) % FOLDS for key in keys])
    for fold in range(FOLDS):
        yield own != fold, own == fold


def weigh_rules(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool each: flagged whatever the classifier says; all that was found was taken back."""
    found = [safety.find(safety.normalise(text)) for text in texts]
    always = [any(s and r.kind in safety.ALWAYS for r, s in f.items()) for f in found]
    return np.array(always), np.array([bool(f) and not any(f.values()) for f in found])


def cross_validate(rows: Rows, more: Rows) -> tuple[float, dict[str, dict[str, float]]]:
    """Choose the threshold that keeps false alarms on held-out rows at `ALARMS`.

    Args:
        rows: cut into folds; a row and its misspelt copy are never on both sides.
        more: in the training part of every fold.

    Returns:
        The threshold, and recall and false alarms at it, all rules and the classifier together.
    """
    rng, texts = random.Random(0), [text for _, text in rows]
    inputs, labels = matrix(texts), np.array([label for label, _ in rows])
    typed, extra = matrix([misspell(t, rng) for t in texts]), matrix([t for _, t in more])
    extra_labels, scores = np.array([label for label, _ in more]), np.zeros(len(rows))
    for train, out in folds(rows):
        parts = sparse.vstack([inputs[train], typed[train], extra])
        model = fit(parts, np.concatenate([labels[train], labels[train], extra_labels]))
        scores[out] = model.decision_function(inputs[out])
    always, taken_back = weigh_rules(texts)
    scores -= safety.SURER * taken_back
    for threshold in np.arange(0, 3, 0.01):
        flags = (scores > threshold) | always
        if flags[~labels].mean() <= ALARMS:
            break
    found = {
        "recall": wilson(int(flags[labels].sum()), int(labels.sum())),
        "false_alarms": wilson(int(flags[~labels].sum()), int((~labels).sum())),
    }
    return float(threshold), found


def main() -> None:
    """Cross-validate, train on everything, write the weights as signed bytes."""
    rows, more = read_text(), read_seen() + read_questions() + read_examples()
    threshold, found = cross_validate(rows, more)
    rng, every = random.Random(0), rows + more
    every += [(label, misspell(text, rng)) for label, text in rows]
    model = fit(matrix([t for _, t in every]), np.array([label for label, _ in every]))
    weights = model.coef_[0]
    scale = float(np.abs(weights).max() / 127)
    head: dict[str, Any] = {
        "bias": float(model.intercept_[0]),
        "scale": scale,
        "threshold": threshold,
        "trained_on": len(every),
        "cross_validation": found,
    }
    packed = zlib.compress(np.round(weights / scale).astype(np.int8).tobytes(), 9)
    safety.WEIGHTS_FILE.write_bytes(json.dumps(head).encode() + b"\n" + packed)
    print(head, f"{safety.WEIGHTS_FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
