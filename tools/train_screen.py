"""Train the small classifier beside the safety rules; writes helpers/screen_weights.bin.

    python tools/train_screen.py

Logistic regression over `helpers.safety.features`: runs of words and characters, concepts, and
what the rules find. Trained on text of our own alone: assets/screen_text.tsv, the seen cases, the
sample questions, some questions of assets/pretraining, and the examples of the rules. The
threshold is chosen by cross-validation on the first of these. Held-out sets of seen cases are
counted beside it, but flatter: text was written after they had been read. The unseen cases choose
nothing.
"""

import copy
import csv
import json
import lzma
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
LONG = 1500  # long messages of each label, made of two or three short ones
ORDINARY = ("everyday", "ordinary_low", "general_mh", "pets", "technology", "physical", "sports")
FOREIGN = "other_languages"
Rows = list[tuple[bool, str]]
TYPOS = {"going to": "gonna", "want to": "wanna", "you": "u", "are": "r", "because": "cuz"}


def read_table() -> list[dict[str, str]]:
    """The labelled messages (label, kind, text), without what is an unseen case by chance."""
    with TEXT.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    unseen = {c["message"].casefold() for c in read_cases(CASES) if c["part"] == "unseen"}
    return [row for row in rows if row["text"].casefold() not in unseen]


def as_rows(table: Sequence[dict[str, str]]) -> Rows:
    """Rows of the table as (at risk, text)."""
    return [(row["label"] == "risk", row["text"]) for row in table]


def read_text() -> Rows:
    """The labelled messages, (at risk, text) each."""
    return as_rows(read_table())


def lengthen(table: Sequence[dict[str, str]]) -> Rows:
    """Long messages: one at risk, or one harmless one, among ordinary ones."""
    rng, kept = random.Random(1), [row for row in table if row["kind"] != FOREIGN]
    ordinary = [row["text"] for row in kept if row["kind"] in ORDINARY and row["label"] == "safe"]
    made: Rows = []
    for label in ("risk", "safe"):
        core = [row["text"] for row in kept if row["label"] == label]
        for _ in range(LONG):
            first, last = rng.sample(ordinary, 2)
            text = rng.choice(core)
            parts = rng.choice([[first, text], [text, last], [first, text, last]])
            ended = (part if part[-1] in ".!?" else part + rng.choice(".,") for part in parts)
            made.append((label == "risk", " ".join(ended)))
    return made


def read_questions() -> Rows:
    """Ordinary questions about well-being: the sample's, and some of the tiny model's text."""
    lines = SAMPLE.read_text().splitlines()[:CRISIS_ROWS]
    asked = [json.loads(line)["text"].split("<ASSISTANT>:")[0][8:].strip() for line in lines]
    with lzma.open(PRETRAINING / "questions_a.jsonl.xz", "rt") as file:
        asked += [json.loads(line)["question"] for line in file]
    return [(False, text) for text in asked if not re.search("suicid|die|kill|harm", text)]


def read_examples() -> Rows:
    """What each rule of the table is meant to find and to leave."""
    rules = safety.INPUT_RULES
    return [(True, r.example) for r in rules] + [(False, r.counter_example) for r in rules]


def read_seen() -> dict[str, Rows]:
    """The seen cases by set, the letter of their ids; a conversation as its last three turns.

    A set with an unseen case is left out whole: what it holds of the training text is there.
    """
    sets: dict[str, Rows] = {}
    cases = read_cases(CASES)
    unseen = {case["id"][0] for case in cases if case["part"] == "unseen"}
    for case in (case for case in cases if case["id"][0] not in unseen):
        text = " ".join(case["message"].split(" ||| ")[-3:])
        sets.setdefault(case["id"][0], []).append((case["risk"] == "1", text))
    return sets


def misspell(text: str, rng: random.Random) -> str:
    """A text as typed in a hurry: small letters, no points, chat spelling, one slip."""
    text = re.sub(r"[.,!?']", "", text.lower())
    for word, short in TYPOS.items():
        text = re.sub(rf"\b{word}\b", short, text)
    at = rng.randrange(max(1, len(text) - 1))
    return text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]


def stack(found: Sequence[tuple[str, dict[safety.Rule, bool]]]) -> sparse.csr_matrix:
    """(n, buckets) the features of each plain text with its rules, as the screen computes them."""
    rows, columns, values = [], [], []
    for row, (plain, rules) in enumerate(found):
        for bucket, value in safety.features(plain, rules).items():
            rows.append(row), columns.append(bucket), values.append(value)
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(found), safety.BUCKETS))


def matrix(plains: Sequence[str]) -> sparse.csr_matrix:
    """(n, buckets) the features of each plain text, its rules found first."""
    return stack([(plain, safety.find(plain)) for plain in plains])


def fit(inputs: sparse.csr_matrix, labels: np.ndarray) -> LogisticRegression:
    """One logistic regression, both labels weighing the same."""
    model = LogisticRegression(
        C=10, max_iter=500, class_weight="balanced", solver="liblinear", tol=1e-3
    )
    return model.fit(inputs, labels)


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
    np.maximum.at(scores, owners, model.decision_function(stack(every)) + leans)
    return scores


def rates(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, dict[str, float]]:
    """Recall and false alarms at a threshold, all rules and the classifier together."""
    flags = scores > threshold
    return {
        "recall": wilson(int(flags[labels].sum()), int(labels.sum())),
        "false_alarms": wilson(int(flags[~labels].sum()), int((~labels).sum())),
    }


class Part:
    """Labelled rows: plain texts, labels, and features as a matrix."""

    def __init__(self, rows: Rows) -> None:
        self.plains = [safety.normalise(text) for _, text in rows]
        self.labels = np.array([label for label, _ in rows])
        self.inputs = matrix(self.plains)

    def only(self, mask: np.ndarray) -> "Part":
        """The rows that a mask keeps."""
        part = copy.copy(self)
        part.plains = [self.plains[row] for row in np.flatnonzero(mask)]
        part.labels, part.inputs = self.labels[mask], self.inputs[mask]
        return part


def fit_parts(parts: Sequence[Part]) -> LogisticRegression:
    """One logistic regression on several parts."""
    inputs = sparse.vstack([part.inputs for part in parts])
    return fit(inputs, np.concatenate([part.labels for part in parts]))


def hold_out_sets(rest: list[Part], sets: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of the seen cases, each set scored by a model that did not see it."""
    scores = []
    for out in sets:
        model = fit_parts(rest + [part for part in sets if part is not out])
        scores.append(weigh(model, out.plains))
    return np.concatenate(scores), np.concatenate([part.labels for part in sets])


def hold_out_folds(
    table: list[dict[str, str]], text: Part, typed: Part, rest: list[Part]
) -> np.ndarray:
    """Scores of the training text; a row and what is made of it are never on both sides."""
    scores = np.zeros(len(table))
    for train, out in folds(as_rows(table)):
        made = Part(lengthen([table[row] for row in np.flatnonzero(train)]))
        model = fit_parts([text.only(train), typed.only(train), made, *rest])
        scores[out] = weigh(model, [text.plains[row] for row in np.flatnonzero(out)])
    return scores


def main() -> None:
    """Choose the threshold, train on everything, write the weights as signed bytes."""
    table, rng = read_table(), random.Random(0)
    rows = as_rows(table)
    text, more = Part(rows), Part(read_questions() + read_examples())
    typed = Part([(label, misspell(message, rng)) for label, message in rows])
    made = Part(lengthen(table))
    sets = [Part(found) for found in read_seen().values()]
    scores, labels = hold_out_sets([text, typed, made, more], sets)
    by_fold = hold_out_folds(table, text, typed, [more, *sets])
    harmless = np.sort(by_fold[~text.labels])
    threshold = float(harmless[-int(ALARMS * len(harmless)) - 1])
    model = fit_parts(every := [text, typed, made, more, *sets])
    weights = model.coef_[0]
    scale = float(np.abs(weights).max() / 127)
    head: dict[str, Any] = {
        "bias": float(model.intercept_[0]),
        "scale": scale,
        "threshold": threshold,
        "trained_on": sum(len(part.plains) for part in every),
        "sets_held_out": rates(scores, labels, threshold),
        "cross_validation": rates(by_fold, text.labels, threshold),
    }
    packed = zlib.compress(np.round(weights / scale).astype(np.int8).tobytes(), 9)
    safety.WEIGHTS_FILE.write_bytes(json.dumps(head).encode() + b"\n" + packed)
    print(head, f"{safety.WEIGHTS_FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
