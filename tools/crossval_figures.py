"""From the parts of a cross-validation to figures with intervals, and from those to words.

`merge` is used by tools/crossval.py, the tables and sentences by page 04.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from helpers.dialogues import normalise_question
from helpers.evaluation import (
    distinct_n,
    longest_shared_run,
    mean_interval,
    paired_difference,
    score_answers,
)
from helpers.prompts import HUMAN, ROLE_TAG
from tools.folds import membership_auc, rank_figures, truth_ranks

Figures = dict[str, Any]
MISSING = "not measured yet: run `python tools/crossval.py`"
NAMES = {
    "base": "base",
    "base_stop": "base, stop string",
    "base_examples": "base, 3 examples",
    "nearest": "nearest answer",
    "shuffled": "shuffled adapter",
    "adapter": "adapter",
    "truth": "true answers",
}
HABITS = {
    "eos_rate": "stops by itself",
    "turn_leak_rate": "invents a turn",
    "limit_rate": "runs into the limit",
    "distinct_2": "different word pairs",
    "mean_length": "words",
}
FIGURES = {
    "answer_loss": "loss of the true answer",
    "rank_accuracy": "truth likeliest of 18",
    "rank_mrr": "mean reciprocal rank",
    "likeness": "likeness to the truth",
    **HABITS,
    "copied": "longest copied run, words",
    "passages_loss": "loss of unseen passages",
}
MEMORY = {
    "in_loss": "loss, rows trained on",
    "out_loss": "loss, rows held out",
    "membership_auc": "membership",
    "continued_in": "words recited, trained on",
    "continued_out": "words recited, held out",
    "copied": "longest copied run, words",
    "forgotten": "rise on unseen passages",
}
CLAIMS = {
    "as_it_is": "as it is: rank 32, cosine",
    "rank_16": "rank 16",
    "rank_64": "rank 64",
    "bias_lora_only": 'bias="lora_only"',
    "constant_rate": "constant rate",
    "steps_500": "500 steps, last kept",
}
BETTER = {  # what differences are made of: +1 if more is better, and its name in a sentence
    "answer_loss": (-1, "the loss of true answers"),
    "reciprocal_rank": (1, "ranking the true answer"),
    "likeness": (1, "likeness to the true answer"),
    "turn_leak": (-1, "inventing no turn"),
    "limit": (-1, "ending before the limit"),
}


def shown(answer: dict[str, Any], stop: bool) -> SimpleNamespace:
    """An answer as a reader sees it: cut at the stop string, where there is one.

    Example:
        >>> shown({"text": "Rest.<HUMAN>: And?", "finished": False, "n_tokens": 256}, stop=True)
        namespace(text='Rest.', finished=False, n_tokens=0)
    """
    text, tag, _ = answer["text"].partition(HUMAN)
    if not (stop and tag):
        return SimpleNamespace(**answer)
    return SimpleNamespace(text=text, finished=False, n_tokens=0)


def pooled(parts: Sequence[dict], questions: Sequence[str], limit: int, stop: bool = False) -> dict:
    """One value for each row (`by_row`) or draw (`asked`) of all parts, with its question."""
    rows = [row for part in parts for row in part["rows"]]
    draws = [part["rows"][k % len(part["rows"])] for part in parts
             for k in range(len(part["answers"]))]  # fmt: skip
    answers = [shown(answer, stop) for part in parts for answer in part["answers"]]
    pool = {name: [x for part in parts for x in part[name]] for name in ("likeness", "copied")}
    if "losses" in parts[0]:
        tables = [np.array(part["losses"]) for part in parts]
        pool["answer_loss"] = np.concatenate([table[:, 0] for table in tables])
        pool["ranks"] = np.concatenate([truth_ranks(table) for table in tables])
        pool["reciprocal_rank"] = 1 / pool["ranks"]
    return pool | {
        "answers": answers,
        "asked": [questions[row] for row in draws],
        "by_row": [questions[row] for row in rows],
        "turn_leak": [bool(ROLE_TAG.search(a.text)) for a in answers],
        "limit": [not a.finished and a.n_tokens >= limit for a in answers],
    }


def system_figures(pool: dict, limit: int, has_loss: bool = True) -> Figures:
    """Every figure of one system over its rows: {"value", "low", "high", "n"} each."""
    found = score_answers(pool["answers"], pool["asked"], limit)
    found["likeness"] = mean_interval(pool["likeness"], pool["asked"])
    found["copied"] = mean_interval(pool["copied"], pool["by_row"])
    if "ranks" in pool:
        found |= rank_figures(pool["ranks"], pool["by_row"])
    if "ranks" in pool and has_loss:
        found["answer_loss"] = mean_interval(pool["answer_loss"], pool["by_row"])
    return {name: found[name] for name in FIGURES if name in found}


def truth_figures(rows: Dataset, folds: Sequence[dict], groups: Sequence[str]) -> Figures:
    """The true answers by the same rulers: the least that an answer here copies, for instance."""
    copied = {}
    for fold in folds:
        known = [rows["answer"][i] for i in fold["adapter"]["learned"]]
        for i in fold["adapter"]["rows"]:
            copied[i] = longest_shared_run(rows["answer"][i], known)[0]
    texts = rows["answer"]
    return {
        "distinct_2": mean_interval([distinct_n(text) for text in texts], groups),
        "mean_length": mean_interval([len(text.split()) for text in texts], groups),
        "copied": mean_interval([copied[i] for i in range(len(texts))], groups),
    }


def between(one: dict, other: dict, has_loss: bool = True) -> Figures:
    """Paired differences, one minus other, of each figure that can be better or worse."""
    found = {}
    for name in BETTER if has_loss else [name for name in BETTER if name != "answer_loss"]:
        by = "by_row" if name in ("answer_loss", "reciprocal_rank") else "asked"
        sides = [
            pd.Series(pool[name], dtype=float).groupby(list(pool[by])).mean()
            for pool in (one, other)
        ]
        found[name] = paired_difference(sides[0].tolist(), sides[1][sides[0].index].tolist())
    return found


def memory(parts: Sequence[dict], base_passages: Sequence[float]) -> Figures:
    """What adapters remember of rows they were trained on, and what they forgot of other text.

    Over several folds a row's loss inside is taken from the first later fold whose adapter was
    trained on it, so that each row counts once.
    """
    inside: dict[int, float] = {}
    sides = [dict(zip(part["learned"], part["in_losses"], strict=True)) for part in parts]
    for fold, part in enumerate(parts):
        later = [sides[(fold + k) % len(sides)] for k in range(1, len(sides))]
        for row in part["rows"]:
            inside |= next(({row: side[row]} for side in later if row in side), {})
    trained = list((inside if len(parts) > 1 else sides[0]).values())
    held_out = [losses[0] for part in parts for losses in part["losses"]]
    passages = np.mean([part["passages"] for part in parts], axis=0)
    pool = {
        name: mean_interval([x for part in parts for x in part[name]])
        for name in ("continued_in", "continued_out", "copied")
    }
    return pool | {
        "in_loss": mean_interval(trained),
        "out_loss": mean_interval(held_out),
        "membership_auc": membership_auc(trained, held_out),
        "forgotten": paired_difference(passages.tolist(), list(base_passages)),
        "steps": [part["steps"] for part in parts],
    }


def long_figures(part: dict, base_passages: Sequence[float]) -> Figures:
    """The 320 steps: memory at the end, and the two losses on the way."""
    curve = [
        {"step": look["step"], "passes": look["passes"]}
        | {key[:-2]: mean_interval(look[key]) for key in ("in_losses", "out_losses")}
        for look in part["curve"]
    ]
    return memory([part], base_passages) | {"rows": len(part["learned"]), "curve": curve}


def claim_figures(part: dict, reference: dict) -> Figures:
    """One row of the article's claims, on fold 0, against the recipe as it is."""
    ours, theirs = ([row[0] for row in x["losses"]] for x in (part, reference))
    return {
        "answer_loss": mean_interval(ours),
        "difference": paired_difference(ours, theirs),
        "in_loss": mean_interval(part["in_losses"]),
        **{key: part[key] for key in ("trainable", "steps", "seconds")},
    }


def merge(rows: Dataset, parts: dict[str, dict], n_folds: int, limit: int) -> Figures:
    """Figures of all systems from the parts of a cross-validation; no text is kept.

    Args:
        rows: with question and answer.
        parts: by name, as tools/crossval.py leaves them.
        n_folds: how many folds there are.
        limit: tokens at which an answer was cut.

    Returns:
        systems, differences (adapter minus each rival), memory, and claims and decoding where
        they were measured.
    """
    questions = [normalise_question(question) for question in rows["question"]]
    folds = [parts[f"fold{k}"] for k in range(n_folds)]
    by_system = {s: [fold[s.replace("_stop", "")] for fold in folds] for s in NAMES if s != "truth"}
    pools = {
        s: pooled(found, questions, limit, s in ("base_stop", "base_examples"))
        for s, found in by_system.items()
    }
    passages = folds[0]["base"]["passages"]
    remembered = memory(by_system["adapter"], passages)
    systems = {s: system_figures(pool, limit, s != "nearest") for s, pool in pools.items()}
    for s in ("base", "base_stop", "shuffled", "adapter"):
        known = [passages] if "base" in s else [part["passages"] for part in by_system[s]]
        systems[s]["passages_loss"] = mean_interval(np.mean(known, axis=0))
    systems["truth"] = truth_figures(rows, folds, questions)
    rivals = [s for s in pools if s != "adapter"]
    found = {
        "rows": len(rows),
        "folds": n_folds,
        "systems": systems,
        "differences": {s: between(pools["adapter"], pools[s], s != "nearest") for s in rivals},
        "memory": {"adapter": remembered, "long": long_figures(parts["long"], passages)},
    }
    first = folds[0]["adapter"]
    claims = {"as_it_is": first} | {name: parts[name] for name in CLAIMS if name in parts}
    if len(claims) > 1:
        found["claims"] = {name: claim_figures(part, first) for name, part in claims.items()}
    if "decoding" in parts:
        found["decoding"] = {
            name: system_figures(pooled([part], questions, limit), limit)
            for name, part in parts["decoding"]["settings"].items()
        }
    return found


# --- words and tables for page 04 ---------------------------------------------------------------


def read(path: str | Path, name: str) -> Figures | None:
    """The figures of one data set, or None if nobody has measured them yet.

    Args:
        path: of a crossval.json.
        name: "sample", or the name that the rows were given.

    Example:
        >>> read("no/such/file.json", "sample") is None
        True
    """
    path = Path(path)
    return json.loads(path.read_text()).get(name) if path.exists() else None


def cell(estimate: Figures | None) -> str:
    """An estimate in few letters.

    Example:
        >>> cell({"value": 0.9444, "low": 0.7274, "high": 0.9990, "n": 18}), cell(None)
        ('0.94 [0.73, 1.00]', '-')
    """
    if estimate is None:
        return "-"
    digits = 0 if estimate["high"] >= 20 else 2
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def table(systems: dict[str, Figures], labels: dict[str, str]) -> str:
    """A table of estimates: a line for each figure, a column for each system, and n.

    Args:
        systems: estimates by system and figure.
        labels: of the figures, in the order wanted; one that no system has is left out.

    Example:
        >>> one = {"value": 1.0, "low": 0.5, "high": 1.5, "n": 9}
        >>> table({"base": {"loss": one}}, {"loss": "loss"}).split()
        ['base', 'n', 'loss', '1.00', '[0.50,', '1.50]', '9']
    """
    labels = {f: label for f, label in labels.items() if any(f in x for x in systems.values())}
    columns = {
        NAMES.get(s, s): {label: cell(found.get(f)) for f, label in labels.items()}
        for s, found in systems.items()
    }
    counts = []
    for figure in labels:
        ns = sorted({found[figure]["n"] for found in systems.values() if figure in found})
        counts.append(", ".join(map(str, ns)))
    return pd.DataFrame(columns).assign(n=counts).to_string()


def systems_tables(figures: Figures | None) -> str:
    """Every system by every figure, few systems side by side; one line if not measured."""
    if figures is None:
        return MISSING
    names = [name for name in NAMES if name in figures["systems"]]
    parts = [{s: figures["systems"][s] for s in some} for some in (names[:3], names[3:])]
    return "\n\n".join(table(part, FIGURES) for part in parts)


def verdict(figures: Figures | None) -> str:
    """At what the adapter beats each rival, at what it loses, and where nothing is shown.

    A difference counts if its paired 95 % interval leaves out zero and the sign-flip test's p is
    under 0.05; nothing is corrected for how many are looked at.

    Args:
        figures: of one data set, as `merge` gives them.

    Returns:
        One line for each rival, whatever came out, and one on the two cheap rivals together.

    Example:
        >>> d = {"value": -1.0, "low": -1.2, "high": -0.8, "n": 9, "p": 0.01}
        >>> verdict({"differences": {"base": {"answer_loss": d}}})
        'The adapter against base: better at the loss of true answers.'
    """
    if figures is None:
        return MISSING
    lines, wins = [], {}
    for rival, differences in figures["differences"].items():
        said: dict[str, list[str]] = {"better at": [], "worse at": [], "no difference shown in": []}
        for name, found in differences.items():
            sign, words = BETTER[name]
            clear = found["p"] < 0.05 and (found["low"] > 0 or found["high"] < 0)
            key = (
                ("better at" if found["value"] * sign > 0 else "worse at") if clear else [*said][2]
            )
            said[key].append(words)
        parts = [f"{key} {', '.join(names)}" for key, names in said.items() if names]
        lines.append(f"The adapter against {NAMES[rival]}: {'; '.join(parts)}.")
        wins[rival] = set(said["better at"])
    if {"base_stop", "nearest"} <= wins.keys():
        both = [
            words for _, words in BETTER.values() if words in wins["base_stop"] & wins["nearest"]
        ]
        lines.append(f"It beats both cheap rivals, stop string and nearest answer, at: "
                     f"{', '.join(both) or 'nothing'}.")  # fmt: skip
    return "\n".join(lines)


def comparisons(figures: Figures) -> dict[tuple[str, str], str]:
    """The direction of each difference that counts, as `verdict` counts, by figure and rival.

    Example:
        >>> d = {"value": -1.0, "low": -1.2, "high": -0.8, "n": 9, "p": 0.01}
        >>> comparisons({"differences": {"base": {"answer_loss": d, "likeness": d | {"p": 0.2}}}})
        {('the loss of true answers', 'base'): 'better'}
    """
    found = {}
    for rival, differences in figures["differences"].items():
        for name, d in differences.items():
            sign, words = BETTER[name]
            if d["p"] < 0.05 and (d["low"] > 0 or d["high"] < 0):
                found[words, NAMES[rival]] = "better" if d["value"] * sign > 0 else "worse"
    return found


def agreement(one: Figures | None, other: Figures | None) -> str:
    """Where the verdicts of two data sets agree, where they contradict, and what one alone shows.

    Args:
        one, other: figures of either, as `merge` gives them; None if not measured.

    Returns:
        Four lines, whatever came out; one if a set was not measured.

    Example:
        >>> d = {"value": -1.0, "low": -1.2, "high": -0.8, "n": 9, "p": 0.01}
        >>> first = {"differences": {"base": {"answer_loss": d, "likeness": d}}}
        >>> second = {"differences": {"base": {"answer_loss": d, "likeness": d | {"p": 0.2}}}}
        >>> print(agreement(first, second))
        The adapter is better on both sets at: the loss of true answers (base).
        Worse on both sets at: nothing.
        Better on one set and worse on the other at: nothing.
        Clear on one set alone: likeness to the true answer (base).
    """
    if one is None or other is None:
        return MISSING
    ours, theirs = comparisons(one), comparisons(other)
    sides = {name: (ours.get(name), theirs.get(name)) for name in ours | theirs}
    groups = {
        "The adapter is better on both sets at": lambda a, b: a == b == "better",
        "Worse on both sets at": lambda a, b: a == b == "worse",
        "Better on one set and worse on the other at": lambda a, b: a and b and a != b,
        "Clear on one set alone": lambda a, b: not (a and b),
    }
    lines = []
    for title, belongs in groups.items():
        rivals: dict[str, list[str]] = {}
        for (words, rival), pair in sides.items():
            if belongs(*pair):
                rivals.setdefault(words, []).append(rival)
        names = [f"{words} ({'; '.join(some)})" for words, some in rivals.items()]
        lines.append(f"{title}: {', '.join(names) or 'nothing'}.")
    return "\n".join(lines)


def each(rows: dict[str, Figures | None], say: Callable[[Figures | None], str]) -> str:
    """What a function says of each data set, under its name.

    Example:
        >>> print(each({"Ours": None}, verdict))
        Ours
        not measured yet: run `python tools/crossval.py`
    """
    return "\n\n".join(f"{name}\n{say(figures)}" for name, figures in rows.items())


def memory_table(figures: Figures | None) -> str:
    """All folds with an early stop, beside 320 steps on few rows."""
    if figures is None:
        return MISSING
    found, long = figures["memory"], figures["memory"]["long"]
    passes = long["curve"][-1]["passes"]
    columns = {
        f"early stop, {figures['folds']} folds": found["adapter"],
        f"{long['steps'][0]} steps, {passes:.0f} passes over {long['rows']} rows": long,
    }
    return table(columns, MEMORY)


def memory_sentence(figures: Figures | None) -> str:
    """How much better the two kinds of run know the rows that they were trained on.

    Example:
        >>> loss = lambda x: {"value": x}
        >>> one = {"in_loss": loss(2.0), "out_loss": loss(3.0), "membership_auc": loss(0.75)}
        >>> print(memory_sentence({"memory": {"adapter": one, "long": one}}))
        early stop: 1.00 nats between rows held out and rows trained on, membership 0.75
        116 passes: 1.00 nats between rows held out and rows trained on, membership 0.75
    """
    if figures is None:
        return MISSING
    lines = []
    for name, key in (("early stop", "adapter"), ("116 passes", "long")):
        inside, outside, auc = (
            figures["memory"][key][k]["value"] for k in ("in_loss", "out_loss", "membership_auc")
        )
        lines.append(f"{name}: {outside - inside:.2f} nats between rows held out and rows trained "
                     f"on, membership {auc:.2f}")  # fmt: skip
    return "\n".join(lines)


def draw_memory(axis: Any, figures: Figures | None) -> None:
    """Loss by passes, of rows trained on and of rows held out; a line where early stopping ends.

    Args:
        axis: matplotlib's, empty.
        figures: of one data set; None leaves a note on the axis.
    """
    axis.set(xlabel="passes over the rows", ylabel="nats per answer token")
    if figures is None:
        axis.text(0.5, 0.5, MISSING, ha="center", transform=axis.transAxes)
        return
    curve = figures["memory"]["long"]["curve"]
    at = [look["passes"] for look in curve]
    for key, label in (("in_loss", "rows trained on"), ("out_loss", "rows held out")):
        value, low, high = ([look[key][k] for look in curve] for k in ("value", "low", "high"))
        (line,) = axis.plot(at, value, "o-", label=label)
        axis.fill_between(at, low, high, alpha=0.2, color=line.get_color())
    early = figures["memory"]["adapter"]["out_loss"]["value"]
    axis.axhline(early, linestyle=":", color="#000000", label="early stop, held out")
    axis.set_ylim(0, None)
    axis.legend()


def claims_table(figures: Figures | None) -> str:
    """The article's claims, one line each: size, steps, loss and its difference."""
    if figures is None:
        return MISSING
    lines = {
        CLAIMS[name]: {
            "trained": f"{found['trainable']:,}",
            "steps": found["steps"],
            "held out": cell(found["answer_loss"]),
            "minus as it is": "-" if name == "as_it_is" else cell(found["difference"]),
            "trained on": f"{found['in_loss']['value']:.2f}",
            "n": found["answer_loss"]["n"],
        }
        for name, found in figures["claims"].items()
    }
    return pd.DataFrame(lines).T.to_string()


def decoding_table(figures: Figures | None) -> str:
    """Temperature, top-p and penalty, one line each."""
    if figures is None:
        return MISSING
    labels = {"eos_rate": "stops", "distinct_2": "different pairs", "likeness": "likeness",
              "mean_length": "words"}  # fmt: skip
    lines = {
        name.replace("_", " "): {label: cell(found[f]) for f, label in labels.items()}
        | {"n": found["likeness"]["n"]}
        for name, found in figures["decoding"].items()
    }
    return pd.DataFrame(lines).T.to_string()
