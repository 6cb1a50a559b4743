"""From the parts of a cross-validation to figures with intervals, and from those to words.

`merge` is used by tools/crossval.py, the tables and `verdict` by page 04.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from helpers.dialogues import normalise_question
from helpers.evaluation import distinct_n, mean_interval, paired_difference, score_answers, wilson
from helpers.prompts import HUMAN, ROLE_TAG
from tools.folds import membership_auc, rank_figures, truth_ranks

MISSING = "not measured yet"
CHANCE, WHOLE_RUN = 18, 10  # answers offered; words that count as recited
NAMES = {
    "base": "base",
    "base_stop": "base, stop string",
    "base_examples": "base, 3 examples",
    "nearest": "nearest answer",
    "shuffled": "adapter, shuffled",
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
BETTER = {  # figure: +1 if more is better; differences are made for these
    "answer_loss": -1,
    "reciprocal_rank": 1,
    "likeness": 1,
    "turn_leak": -1,
    "limit": -1,
}
WORDS = {
    "answer_loss": "the loss of true answers",
    "reciprocal_rank": "ranking the true answer",
    "likeness": "likeness to the true answer",
    "turn_leak": "inventing no turn",
    "limit": "ending before the limit",
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


def pooled(parts: Sequence[dict], questions: Sequence[str], stop: bool, limit: int) -> dict:
    """One value for each row or draw, from the parts of all folds, with the question of each."""
    table: dict[str, list] = {"answers": [], "asked": []}
    values = {"answer_loss": [], "ranks": [], "copied": [], "rows": [], "likeness": []}
    for part in parts:
        n = len(part["rows"])
        table["answers"] += [shown(answer, stop) for answer in part["answers"]]
        table["asked"] += [questions[part["rows"][k % n]] for k in range(len(part["answers"]))]
        values["answer_loss"] += [row[0] for row in part["losses"]]
        values["ranks"] += truth_ranks(np.array(part["losses"])).tolist()
        for name in ("copied", "rows", "likeness"):
            values[name] += part[name]
    by_row = [questions[row] for row in values["rows"]]
    turns = [float(bool(ROLE_TAG.search(a.text))) for a in table["answers"]]
    cut = [float(not a.finished and a.n_tokens >= limit) for a in table["answers"]]
    return {**table, **values, "by_row": by_row, "turn_leak": turns, "limit": cut}


def system_figures(pool: dict, limit: int, has_loss: bool = True) -> dict[str, Any]:
    """Every figure of one system over all out-of-fold rows: {"value", "low", "high", "n"} each."""
    found = score_answers(pool["answers"], pool["asked"], limit)
    found |= rank_figures(pool["ranks"], pool["by_row"])
    found["likeness"] = mean_interval(pool["likeness"], pool["asked"])
    found["copied"] = mean_interval(pool["copied"], pool["by_row"])
    if has_loss:
        found["answer_loss"] = mean_interval(pool["answer_loss"], pool["by_row"])
    return {name: found[name] for name in FIGURES if name in found}


def truth_figures(rows: Dataset, parts: Sequence[dict], copied: Sequence[int]) -> dict[str, Any]:
    """What the true answers themselves look like by the same rulers."""
    numbers = [row for part in parts for row in part["rows"]]
    texts = [rows["answer"][i] for i in numbers]
    groups = [normalise_question(rows["question"][i]) for i in numbers]
    words = [len(text.split()) for text in texts]
    return {
        "distinct_2": mean_interval([distinct_n(text) for text in texts], groups),
        "mean_length": mean_interval(words, groups),
        "copied": mean_interval(copied, groups),
    }


def between(one: dict, other: dict, has_loss: bool = True) -> dict[str, Any]:
    """Paired differences, one minus other, of each figure that can be better or worse."""
    found = {}
    for name in BETTER:
        if name == "answer_loss" and not has_loss:
            continue
        sides = []
        for pool in (one, other):
            by = pool["by_row"] if name in ("answer_loss", "reciprocal_rank") else pool["asked"]
            values = 1 / np.array(pool["ranks"]) if name == "reciprocal_rank" else pool[name]
            sides.append(pd.Series(values, dtype=float).groupby(list(by)).mean())
        aligned = sides[1].reindex(sides[0].index)
        found[name] = paired_difference(sides[0].tolist(), aligned.tolist())
    return found


def inside_and_outside(part: dict) -> tuple[dict[int, float], dict[int, float]]:
    """Loss by row number: of rows trained on, and of rows of the outer fold."""
    inside = dict(zip(part["learned"], part["in_losses"], strict=True))
    outside = dict(zip(part["rows"], (row[0] for row in part["losses"]), strict=True))
    return inside, outside


def memory(parts: Sequence[dict], base_loss: dict[int, float]) -> dict[str, Any]:
    """What adapters remember of rows they were trained on, over one fold or all of them.

    A row's loss inside is taken from the first later fold whose adapter was trained on it.
    """
    both = [inside_and_outside(part) for part in parts]
    outside = {row: loss for _, out in both for row, loss in out.items()}
    inside: dict[int, float] = {}
    if len(parts) == 1:
        inside = both[0][0]
    else:
        for fold, (_, out) in enumerate(both):
            later = [both[(fold + k) % len(both)][0] for k in range(1, len(both))]
            for row in out:
                found = next((losses for losses in later if row in losses), None)
                if found is not None:
                    inside[row] = found[row]
    a, b = [np.array(list(side.values())) for side in (inside, outside)]
    over_base = [
        [loss - base_loss[row] for row, loss in side.items() if row in base_loss]
        for side in (inside, outside)
    ]
    found = {
        "in_loss": mean_interval(a),
        "out_loss": mean_interval(b),
        "membership_auc": membership_auc(a, b),
        "membership_auc_against_base": membership_auc(*over_base),
    }
    for name in ("continued_in", "continued_out"):
        words = [w for part in parts for w in part[name]]
        found[f"{name}_words"] = mean_interval(words)
        found[f"{name}_recited"] = wilson(sum(w >= WHOLE_RUN for w in words), len(words))
    return found


def passages(parts: Sequence[dict], base: Sequence[float]) -> dict[str, Any]:
    """Loss on unseen passages, each averaged over folds, and what it gained over the base's."""
    losses = np.mean([part["passages"] for part in parts], axis=0)
    return {
        "passages_loss": mean_interval(losses),
        "forgotten": paired_difference(losses.tolist(), list(base)),
    }


def claim_figures(
    part: dict, reference: dict, base: Sequence[float], pool: Any, limit: int
) -> dict:
    """One row of the article's claims, on fold 0, against the recipe as it is."""
    losses, ours = ([row[0] for row in x["losses"]] for x in (part, reference))
    found = system_figures(pool(part), limit)
    keep = ("answer_loss", "rank_mrr", "eos_rate", "likeness")
    return {
        **{name: found[name] for name in keep},
        **passages([part], base),
        "difference": paired_difference(losses, ours),
        "in_loss": mean_interval(part["in_losses"]),
        "trainable": part["trainable"],
        "steps": part["steps"],
        "seconds": part["seconds"],
    }


def long_figures(part: dict, base_loss: dict[int, float], base: Sequence[float]) -> dict:
    """The 320 steps: memory at the end, and the two losses on the way."""
    curve = [
        {
            "step": look["step"],
            "passes": look["step"] * part["rows_per_step"] / len(part["learned"]),
            "in_loss": mean_interval(look["in_losses"]),
            "out_loss": mean_interval(look["out_losses"]),
            "membership_auc": membership_auc(look["in_losses"], look["out_losses"]),
        }
        for look in part["curve"]
    ]
    sizes = {name: part[name] for name in ("steps", "rows_per_step", "passes", "seconds")}
    copied = mean_interval(part["copied"])
    memories = memory([part], base_loss) | passages([part], base)
    return sizes | memories | {"copied": copied, "curve": curve}


def merge(rows: Dataset, parts: dict[str, dict], n_folds: int, limit: int) -> dict[str, Any]:
    """Figures of all systems from the parts of a cross-validation; no text is kept.

    Args:
        rows: with question and answer.
        parts: by name, as tools/crossval.py leaves them.
        n_folds: how many folds there are.
        limit: tokens at which an answer was cut.

    Returns:
        systems, differences (adapter minus each rival), memory, claims, decoding, steps_chosen.
    """
    questions = [normalise_question(question) for question in rows["question"]]
    of = {s: [parts[f"fold{k}.{s}"] for k in range(n_folds)] for s in NAMES if s not in
          ("base_stop", "truth")}  # fmt: skip
    of["base_stop"] = of["base"]
    pools = {
        s: pooled(found, questions, s in ("base_stop", "base_examples"), limit)
        for s, found in of.items()
    }
    base_passages, adapter = parts["fold0.base"]["passages"], of["adapter"]
    base_loss = {row: loss for part in of["base"] for row, loss in outside(part).items()}
    systems = {s: system_figures(pools[s], limit, s != "nearest") for s in NAMES if s in pools}
    for s in ("base", "base_stop"):
        systems[s]["passages_loss"] = mean_interval(base_passages)
    for s in ("adapter", "shuffled"):
        systems[s]["passages_loss"] = passages(of[s], base_passages)["passages_loss"]
    systems["truth"] = truth_figures(rows, of["base"], copied_truths(rows, parts, n_folds))

    def alone(part: dict) -> dict:
        return pooled([part], questions, False, limit)

    first, claims = parts["fold0.adapter"], ("rank_16", "rank_64", "bias_lora_only")
    claims += ("constant_rate", "steps_500")
    steps = [part["steps"] for part in adapter]
    return {
        "rows": len(rows),
        "folds": n_folds,
        "steps_chosen": mean_interval(steps) | {"all": steps},
        "systems": systems,
        "differences": {
            s: between(pools["adapter"], pools[s], s != "nearest") for s in pools if s != "adapter"
        },
        "memory": {
            "adapter": memory(adapter, base_loss) | passages(adapter, base_passages),
            "shuffled": memory(of["shuffled"], base_loss) | passages(of["shuffled"], base_passages),
            "base_continued_words": mean_interval(
                [w for part in of["base"] for w in part["continued_out"]]
            ),
            "early_stop": memory([first], base_loss)
            | passages([first], base_passages)
            | {"copied": mean_interval(first["copied"]), "steps": first["steps"]},
            "long": long_figures(parts["long"], base_loss, base_passages),
        },
        "claims": {
            name: claim_figures(part, first, base_passages, alone, limit)
            for name, part in [("as_it_is", first), *((c, parts[c]) for c in claims)]
        },
        "decoding": {
            name: decoding_figures(part, questions, limit)
            for name, part in parts["decoding"]["settings"].items()
        },
    }


def outside(part: dict) -> dict[int, float]:
    """Loss by row number of a fold's outer rows."""
    return dict(zip(part["rows"], (row[0] for row in part["losses"]), strict=True))


def copied_truths(rows: Dataset, parts: dict[str, dict], n_folds: int) -> list[int]:
    """Longest run that each true answer shares with the training answers of its fold."""
    from helpers.evaluation import longest_shared_run

    found = []
    for fold in range(n_folds):
        known = [rows["answer"][i] for i in parts[f"fold{fold}.adapter"]["learned"]]
        numbers = parts[f"fold{fold}.base"]["rows"]
        found += [longest_shared_run(rows["answer"][i], known)[0] for i in numbers]
    return found


def decoding_figures(part: dict, questions: Sequence[str], limit: int) -> dict[str, Any]:
    """How answers of one decoding setting look; nothing here depends on losses."""
    asked = [questions[part["rows"][k % len(part["rows"])]] for k in range(len(part["answers"]))]
    found = score_answers([shown(a, False) for a in part["answers"]], asked, limit)
    return found | {"likeness": mean_interval(part["likeness"], asked)}


# --- words and tables for page 04 ---------------------------------------------------------------


def read(path: str | Path, name: str) -> dict[str, Any] | None:
    """The figures of one data set, or None if nobody has measured them yet.

    Args:
        path: of a crossval.json.
        name: "sample", or the name the rows were given.

    Example:
        >>> read("no/such/file.json", "sample") is None
        True
    """
    path = Path(path)
    return json.loads(path.read_text()).get(name) if path.exists() else None


def cell(estimate: dict[str, Any] | None) -> str:
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


def table(
    rows: dict[str, dict[str, Any]], figures: dict[str, str], names: Iterable[str] = ()
) -> pd.DataFrame:
    """A table of estimates: a line for each figure, a column for each system, and n.

    Args:
        rows: estimates by system and figure.
        figures: label by figure, in the order wanted.
        names: which systems; none takes all.

    Example:
        >>> one = {"value": 1.0, "low": 0.5, "high": 1.5, "n": 9}
        >>> table({"base": {"loss": one}}, {"loss": "loss"}).loc["loss"].tolist()
        ['1.00 [0.50, 1.50]', 9]
    """
    chosen = list(names) or list(rows)
    shown_rows = {NAMES.get(s, s): {f: cell(rows[s].get(f)) for f in figures} for s in chosen}
    made = pd.DataFrame(shown_rows).rename(index=figures)
    counts = [max((rows[s][f]["n"] for s in chosen if f in rows[s]), default=0) for f in figures]
    return made.assign(n=counts)


def systems_tables(figures: dict[str, Any] | None) -> str:
    """Every system by every figure, three systems side by side; one line if not measured."""
    if figures is None:
        return MISSING
    names = [name for name in NAMES if name in figures["systems"]]
    parts = [names[:3], names[3:6]]
    return "\n\n".join(table(figures["systems"], FIGURES, part).to_string() for part in parts)


def verdict(figures: dict[str, Any] | None) -> str:
    """At what the adapter beats each rival, at what it loses, and where nothing is shown.

    A difference counts if its paired 95 % interval leaves out zero and the sign-flip test's p is
    under 0.05; nothing is corrected for how many are looked at.

    Args:
        figures: of one data set, as `merge` gives them.

    Returns:
        One line for each rival, whatever came out.

    Example:
        >>> d = {"value": -1.0, "low": -1.2, "high": -0.8, "n": 9, "p": 0.01}
        >>> verdict({"differences": {"base": {"answer_loss": d}}})
        'base: better at the loss of true answers'
    """
    if figures is None:
        return MISSING
    lines = []
    for rival, differences in figures["differences"].items():
        said: dict[str, list[str]] = {"better": [], "worse": [], "no difference shown": []}
        for name, found in differences.items():
            clear = found["p"] < 0.05 and (found["low"] > 0 or found["high"] < 0)
            good = found["value"] * BETTER[name] > 0
            key = ("better" if good else "worse") if clear else "no difference shown"
            said[key].append(WORDS[name])
        parts = [
            f"{key} {'in' if key.startswith('no') else 'at'} {', '.join(names)}"
            for key, names in said.items()
            if names
        ]
        lines.append(f"{NAMES[rival]}: {'; '.join(parts)}")
    return "\n".join(lines)


CLAIM_NAMES = {
    "as_it_is": "as it is: rank 32, cosine",
    "rank_16": "rank 16",
    "rank_64": "rank 64",
    "bias_lora_only": 'bias="lora_only"',
    "constant_rate": "constant rate",
    "steps_500": "500 steps, last kept",
}


def claims_table(figures: dict[str, Any] | None) -> str:
    """The article's claims, one line each: size, steps, loss and its difference, forgetting."""
    if figures is None:
        return MISSING
    lines = {}
    for name, found in figures["claims"].items():
        lines[CLAIM_NAMES[name]] = {
            "trained": f"{found['trainable']:,}",
            "steps": found["steps"],
            "minus as it is": "-" if name == "as_it_is" else cell(found["difference"]),
            "out of fold": cell(found["answer_loss"]),
            "in fold": f"{found['in_loss']['value']:.2f}",
            "n": found["answer_loss"]["n"],
        }
    return pd.DataFrame(lines).T.to_string()


def decoding_table(figures: dict[str, Any] | None) -> str:
    """Temperature, top-p and penalty, one line each."""
    if figures is None:
        return MISSING
    wanted = {"eos_rate": "stops", "distinct_2": "different pairs", "likeness": "likeness"}
    made = table(figures["decoding"], wanted | {"mean_length": "words"}).T
    return made.to_string()


def memory_lines(figures: dict[str, Any] | None) -> str:
    """Early stop against 320 steps on one fold, one line each."""
    if figures is None:
        return MISSING
    wanted = {
        "in_loss": "in fold",
        "out_loss": "out of fold",
        "membership_auc": "membership",
        "copied": "copied run",
        "continued_in_words": "goes on word for word, in fold",
        "continued_out_words": "out of fold ",
        "forgotten": "unseen passages",
    }
    found = figures["memory"]
    names = {
        "early_stop": f"early stop, {found['early_stop']['steps']} steps",
        "long": f"{found['long']['steps']} steps, {found['long']['passes']:.0f} passes",
    }
    made = table({label: found[key] for key, label in names.items()}, wanted)
    return made.to_string()


def draw_memory(axis: Any, figures: dict[str, Any] | None) -> None:
    """Loss by passes, of rows trained on and of rows held out; a mark where early stopping ends.

    Args:
        axis: matplotlib's, empty.
        figures: of one data set; None leaves a note on the axis.
    """
    axis.set(xlabel="passes over the rows", ylabel="nats per answer token")
    if figures is None:
        axis.text(0.5, 0.5, MISSING, ha="center", transform=axis.transAxes)
        return
    curve, early = figures["memory"]["long"]["curve"], figures["memory"]["early_stop"]
    at = [look["passes"] for look in curve]
    for key, label in (("in_loss", "rows trained on"), ("out_loss", "rows held out")):
        found = [look[key] for look in curve]
        (line,) = axis.plot(at, [x["value"] for x in found], "o-", label=label)
        low, high = ([x[side] for x in found] for side in ("low", "high"))
        axis.fill_between(at, low, high, alpha=0.2, color=line.get_color())
    axis.axhline(
        early["out_loss"]["value"], linestyle=":", color="#000000", label="early stop, held out"
    )
    axis.set_ylim(0, None)
    axis.legend()
