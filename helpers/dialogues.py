"""Rows in one shape: dialogues from a Hub data set, a file or a table."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, load_dataset

from helpers.prompts import ROLE_TAG, format_prompt, split_dialogue

KNOWN_COLUMNS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("Context", "Response"),
    ("questionText", "answerText"),
    ("instruction", "input", "output"),
    ("messages",),
    ("conversations",),
    ("text",),  # last: some sets repeat their other columns there, in a format of their own
)
END_MARKS = re.compile(r"(?:\s*(?:<\|\w+\|>|</s>))+$")  # ours is added in training
FILES = {".csv", ".json", ".jsonl", ".parquet"}
USER_ROLES, MODEL_ROLES = {"user", "human"}, {"assistant", "gpt", "model"}


def _read_table(source: object) -> pd.DataFrame:
    """A file, a folder of saved rows or a Hub id as a table; one sentence if it cannot be had."""
    if isinstance(source, pd.DataFrame):
        return source
    if isinstance(source, Dataset):
        return source.to_pandas()
    path = Path(source)
    if path.suffix in FILES:
        if not path.exists():
            raise FileNotFoundError(f"no file {source}: check DATASET, or put the file there")
        try:
            return _read_file(path)
        except ValueError as error:  # each format's own faults are of this kind
            fault = str(error).splitlines()[0]
            raise ValueError(f"{source} is no whole {path.suffix} ({fault}): mend it") from error
    raise ValueError(f"{source!r} is no file of a known kind: use .csv, .jsonl or .parquet")


def _read_file(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix == ".csv":
        try:
            return pd.read_csv(path, encoding="utf-8-sig")
        except UnicodeDecodeError:
            return pd.read_csv(path, encoding="cp1252", encoding_errors="replace")
    return pd.read_json(path, lines=path.suffix == ".jsonl")


def _from_hub(source: str, revision: str | None) -> pd.DataFrame:
    try:
        return load_dataset(source, split="train", revision=revision).to_pandas()
    except Exception as error:  # the Hub's own errors have many types and long texts
        raise OSError(
            f"could not fetch the data set {source!r} ({type(error).__name__}): connect to the "
            "network, or set DATASET to a .csv, .jsonl or .parquet file"
        ) from error


def _turns(turns: Iterable[dict]) -> tuple[str, str]:
    """The first question and its answer out of a list of chat messages."""
    said = [
        (str(t.get("role", t.get("from"))).lower(), str(t.get("content", t.get("value")) or ""))
        for t in turns
    ]
    said = [pair for pair in said if pair[0] in USER_ROLES | MODEL_ROLES]
    if len(said) < 2 or said[0][0] not in USER_ROLES or said[1][0] not in MODEL_ROLES:
        raise ValueError("without tags: no user message followed by an assistant's")
    return said[0][1].strip(), said[1][1].strip()


def _cells(row: dict, columns: tuple[str, ...]) -> tuple[str, str]:
    """What a row has for question and answer; a text with tags is all question as yet."""
    values = [row[c] for c in columns]
    if columns[0] in ("messages", "conversations"):
        if values[0] is None or isinstance(values[0], (str, float)) or len(values[0]) == 0:
            raise ValueError("empty: the row holds no messages")
        return _turns(values[0])
    values = ["" if pd.isna(v) else str(v).strip() for v in values]
    if not any(values):
        raise ValueError("empty: the row holds no text")
    if columns == ("text",):
        return values[0], ""
    return "\n".join(v for v in values[:-1] if v), values[-1]


def _to_pair(row: dict, columns: tuple[str, ...]) -> tuple[str, str]:
    """One row as (question, answer); ValueError with the reason why it has to be dropped."""
    question, answer = _cells(row, columns)
    if columns == ("text",) or ROLE_TAG.search(question + answer):
        question, answer = split_dialogue(f"{question} {answer}")
    answer = END_MARKS.sub("", answer)
    if not question:
        raise ValueError("without a question: that column is empty")
    if not answer:
        raise ValueError("without an answer: that column is empty")
    return question, answer


def load_dialogues(source: object, revision: str | None = None) -> tuple[Dataset, dict[str, int]]:
    """Load question-and-answer rows of any common shape into two columns.

    Args:
        source: a path (.csv, .json, .jsonl, .parquet), a Hub data set id, a pandas DataFrame
            or a `datasets.Dataset`. One of the column sets in `KNOWN_COLUMNS` must be there, in
            capitals or not.
        revision: commit or branch of a Hub data set; ignored for anything local.

    Returns:
        rows: `Dataset` with the str columns `question` and `answer`, in the order of the source.
        dropped: how many rows were left out, by reason (`"without an answer"` …).

    Raises:
        FileNotFoundError: if the file is not there.
        OSError: if the Hub cannot be reached.
        ValueError: if no known column is there (the known ones are listed) or no row is left.

    Example:
        >>> table = pd.DataFrame({"question": ["Why?", "How?"], "answer": ["So.", ""]})
        >>> rows, dropped = load_dialogues(table)
        >>> rows[0], dropped
        ({'question': 'Why?', 'answer': 'So.'}, {'without an answer': 1})
    """
    is_id = isinstance(source, str) and re.fullmatch(r"[\w-]+/[\w.-]+", source)
    on_hub = is_id and not Path(source).exists() and Path(source).suffix not in FILES
    table = _from_hub(source, revision) if on_hub else _read_table(source)
    names = {str(column).strip().lower(): column for column in table.columns}
    columns = next((c for c in KNOWN_COLUMNS if {n.lower() for n in c} <= set(names)), None)
    if columns is None:
        known = "; ".join(", ".join(c) for c in KNOWN_COLUMNS)
        raise ValueError(
            f"no known column among {list(table.columns)}: rename them to one of: {known}"
        )
    pairs, dropped = [], Counter()
    table = table[[names[c.lower()] for c in columns]].set_axis(list(columns), axis=1)
    for row in table.to_dict("records"):
        try:
            pairs.append(_to_pair(row, columns))
        except ValueError as reason:
            dropped[str(reason).split(":")[0]] += 1
    if not pairs:
        raise ValueError(
            f"no row is left of {len(table)} (dropped: {dict(dropped)}): check DATASET"
        )
    questions, answers = zip(*pairs, strict=True)
    return Dataset.from_dict({"question": questions, "answer": answers}), dict(dropped)


def normalise_question(question: str) -> str:
    """Lower case, letters and digits only, single spaces: equal for the same question.

    Example:
        >>> normalise_question("What  is Stress?") == normalise_question("what is stress")
        True
    """
    return " ".join(re.findall(r"\w+", question.lower()))


def split_rows(rows: Dataset, seed: int = 0, share: float = 0.105) -> dict[str, Dataset]:
    """Split rows into training, validation and test; no question stands in two parts.

    Args:
        rows: with a `question` column, as from `load_dialogues`.
        seed: which split; the same seed gives the same split on every machine.
        share: share of the rows in validation and again in test; 0.105 of 172 is 18.

    Returns:
        {"train", "validation", "test"}: three `Dataset`s that together hold every row once.

    Raises:
        ValueError: if there are too few different questions for three parts.

    Example:
        >>> rows = Dataset.from_dict({"question": [f"q{i}" for i in range(172)]})
        >>> {name: len(part) for name, part in split_rows(rows).items()}
        {'train': 136, 'validation': 18, 'test': 18}
    """
    groups: dict[str, list[int]] = {}
    for i, question in enumerate(rows["question"]):
        groups.setdefault(normalise_question(question), []).append(i)
    if len(groups) < 3:
        raise ValueError(f"{len(groups)} different questions make no three parts: add rows")
    order = np.random.default_rng(seed).permutation(len(groups))
    parts = {"test": [], "validation": [], "train": []}
    wanted, queue = max(1, round(share * len(rows))), list(groups.values())
    for position, g in enumerate(order):
        left = len(groups) - position
        empty = sum(not parts[name] for name in parts)
        name = next((n for n in ("test", "validation") if len(parts[n]) < wanted), "train")
        if left <= empty:
            name = next(n for n in parts if not parts[n])
        parts[name] += queue[g]
    return {name: rows.select(sorted(parts[name])) for name in ("train", "validation", "test")}


def to_prompt_completion(rows: Dataset) -> Dataset:
    """The two columns that SFTTrainer puts the loss mask on: `prompt` and `completion`.

    The completion begins with the space that follows the bare tag; SFTTrainer adds the
    end-of-text token.

    Example:
        >>> rows = Dataset.from_dict({"question": ["Why?"], "answer": ["So."]})
        >>> to_prompt_completion(rows)[0]
        {'prompt': '<HUMAN>: Why?\\n<ASSISTANT>:', 'completion': ' So.'}
    """
    return Dataset.from_dict(
        {
            "prompt": [format_prompt(q) for q in rows["question"]],
            "completion": [f" {a.strip()}" for a in rows["answer"]],
        }
    )


def length_report(
    lengths: Sequence[int], cuts: tuple[int, ...] = (256, 512, 1024)
) -> dict[str, float]:
    """Summarise row lengths in tokens and count what each cut would shorten.

    Args:
        lengths: (n_rows,) int, tokens per row with the end-of-text token.
        cuts: values of `max_length` to look at.

    Returns:
        rows, tokens, min, median, mean, p95, max and `over_<cut>` (rows) for each cut.

    Example:
        >>> length_report([10, 20, 600])["over_512"], length_report([10, 20, 600])["median"]
        (1, 20.0)
    """
    x = np.asarray(lengths)
    report = {"rows": len(x), "tokens": int(x.sum()), "min": int(x.min())}
    report |= {"median": float(np.median(x)), "mean": float(x.mean())}
    report |= {"p95": float(np.percentile(x, 95)), "max": int(x.max())}
    return report | {f"over_{cut}": int((x > cut).sum()) for cut in cuts}
