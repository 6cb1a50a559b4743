"""Train the small classifier beside the safety rules; writes helpers/screen_weights.bin.

    python tools/train_screen.py

Logistic regression over `helpers.safety.features`: runs of words and characters, concepts, and
what the rules find. Trained on text of our own alone: assets/screen_text.tsv, the seen cases, the
sample questions, the questions of assets/pretraining, and the examples of the rules. The threshold
is chosen by cross-validation on the first of these, never on the unseen cases.
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
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import safety
from helpers.evaluation import wilson
from tools.measure_safety import CASES, SAMPLE, read_cases

TEXT = ROOT / "assets/screen_text.tsv"
PRETRAINING = ROOT / "assets/pretraining"
CRISIS_ROWS = 162  # the sample's rows from here on are of crisis, see assets/README.md
ALARMS = 0.1  # of harmless messages that were written to look like the others
ALIKE = 0.45  # cosine of the runs of words of two messages, from which they share a fold
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


def matrix(plains: Sequence[str]) -> sparse.csr_matrix:
    """(n, buckets) the features of each plain text, as the screen computes them."""
    rows, columns, values = [], [], []
    for row, plain in enumerate(plains):
        for bucket, value in safety.features(plain, safety.find(plain)).items():
            rows.append(row), columns.append(bucket), values.append(value)
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(plains), safety.BUCKETS))


def fit(inputs: sparse.csr_matrix, labels: np.ndarray) -> LogisticRegression:
    """One logistic regression, both labels weighing the same."""
    return LogisticRegression(C=6, max_iter=500, class_weight="balanced").fit(inputs, labels)


def folds(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Boolean masks (train, held out); messages that share many words stay in one fold."""
    runs = TfidfVectorizer(ngram_range=(1, 3), use_idf=False, token_pattern=safety.TOKEN.pattern)
    seen = runs.fit_transform([text.lower() for _, text in rows])
    _, group = connected_components(seen @ seen.T > ALIKE)
    own = np.random.default_rng(0).integers(FOLDS, size=group.max() + 1)[group]
    for fold in range(FOLDS):
        yield own != fold, own == fold


def weigh(model: LogisticRegression, texts: Sequence[str]) -> np.ndarray:
    """(n,) the score of each plain text: the highest among its pieces, as the screen takes it."""
    owners, every, leans = [], [], []
    for owner, text in enumerate(texts):
        for piece, found in safety.finds(text).items():
            owners.append(owner), every.append((piece, found))
            leans.append(safety.lean(found, piece != text))
    scores = np.full(len(texts), -np.inf)
    np.maximum.at(scores, owners, model.decision_function(matrix(every)) + leans)
    return scores


def cross_validate(rows: Rows, more: Rows) -> tuple[float, dict[str, dict[str, float]]]:
    """Choose the threshold that keeps false alarms on held-out rows at `ALARMS`.

    Args:
        rows: cut into folds; a row and its misspelt copy are never on both sides.
        more: in the training part of every fold.

    Returns:
        The threshold, and recall and false alarms at it, all rules and the classifier together.
    """
    rng, plains = random.Random(0), [safety.normalise(text) for _, text in rows]
    typed = matrix([safety.normalise(misspell(text, rng)) for _, text in rows])
    inputs, extra = matrix(plains), matrix([safety.normalise(text) for _, text in more])
    labels, extra_labels = (np.array([label for label, _ in part]) for part in (rows, more))
    scores = np.zeros(len(rows))
    for train, out in folds(rows):
        parts = sparse.vstack([inputs[train], typed[train], extra])
        model = fit(parts, np.concatenate([labels[train], labels[train], extra_labels]))
        scores[out] = weigh(model, [plains[row] for row in np.flatnonzero(out)])
    allowed = int(ALARMS * (~labels).sum())
    threshold = float(np.sort(scores[~labels])[-allowed - 1])
    flags = scores > threshold
    found = {
        "recall": wilson(int(flags[labels].sum()), int(labels.sum())),
        "false_alarms": wilson(int(flags[~labels].sum()), int((~labels).sum())),
    }
    return threshold, found


def main() -> None:
    """Cross-validate, train on everything, write the weights as signed bytes."""
    rows, more = read_text(), read_seen() + read_questions() + read_examples()
    threshold, found = cross_validate(rows, more)
    rng, every = random.Random(0), rows + more
    every += [(label, misspell(text, rng)) for label, text in rows]
    inputs = matrix([safety.normalise(text) for _, text in every])
    model = fit(inputs, np.array([label for label, _ in every]))
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
