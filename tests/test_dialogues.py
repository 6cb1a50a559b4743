"""Rows of every shape that people have, and rows that nobody can use."""

from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset

from helpers.dialogues import (
    length_report,
    load_dialogues,
    normalise_question,
    split_rows,
    to_prompt_completion,
)
from helpers.profiles import TINY
from helpers.prompts import format_prompt, neutralise, split_dialogue

PAIR = {"question": "What helps?", "answer": "Sleep."}
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What helps?"},
    {"role": "assistant", "content": "Sleep."},
]
SHARE_GPT = [{"from": "human", "value": "What helps?"}, {"from": "gpt", "value": "Sleep."}]
SHAPES = {
    "text": {"text": "<HUMAN>: What helps?\n<ASSISTANT>: Sleep."},
    "question, answer": PAIR,
    "prompt, completion": {"prompt": "What helps?", "completion": "Sleep."},
    "prompt, response": {"prompt": "What helps?", "response": "Sleep."},
    "Context, Response": {"Context": "What helps?", "Response": "Sleep."},
    "questionText, answerText": {"questionText": "What helps?", "answerText": "Sleep."},
    "instruction, input, output": {"instruction": "What helps?", "input": "", "output": "Sleep."},
    "messages": {"messages": TURNS},
    "conversations": {"conversations": SHARE_GPT},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "frame", "dataset"])
def test_every_known_shape_gives_the_same_row(shape: str, kind: str, tmp_path: Path) -> None:
    table = pd.DataFrame([SHAPES[shape]])
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif kind == "parquet":
        table.to_parquet(path)
    source = {"frame": table, "dataset": Dataset.from_list([SHAPES[shape]])}.get(kind, str(path))
    rows, dropped = load_dialogues(source)
    assert (rows[0], dropped) == (PAIR, {})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_csv_in_the_encodings_that_people_have(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("question,answer\nWhat’s a café?,A place – warm.\n".encode(encoding))
    assert load_dialogues(str(path))[0][0] == {
        "question": "What’s a café?",
        "answer": "A place – warm.",
    }


def test_rows_that_nobody_can_use_are_dropped_and_counted_by_reason() -> None:
    good = "<HUMAN>: Why?\n<ASSISTANT>: So."
    bad = [None, "", "no tags", "<HUMAN>: Why?\n<ASSISTANT>:  ", "<HUMAN>: \n<ASSISTANT>: So."]
    rows, dropped = load_dialogues(pd.DataFrame({"text": [good, *bad]}))
    assert len(rows) == 1
    assert dropped == {
        "empty": 2,
        "without tags": 1,
        "without an answer": 1,
        "without a question": 1,
    }
    chats = [[], TURNS[:2], "no list", TURNS]
    rows, dropped = load_dialogues(pd.DataFrame({"messages": chats}))
    assert (len(rows), dropped) == (1, {"empty": 2, "without tags": 1})


def test_columns_in_other_capitals_and_a_text_beside_them_are_read(tmp_path: Path) -> None:
    table = pd.DataFrame(
        [{"Instruction": "What helps?", "Input": "", "OUTPUT": "Sleep.", "text": "no"}]
    )
    assert load_dialogues(table)[0][0] == PAIR


def test_tags_and_end_marks_that_rows_bring_along_are_not_doubled() -> None:
    prompt = "<HUMAN>: What helps?\n<ASSISTANT>:"
    for row in [
        {"prompt": prompt, "completion": " Sleep."},
        {"text": f"{prompt} Sleep. <|endoftext|>"},
        {"question": "What helps?", "answer": "Sleep.</s>"},
    ]:
        assert load_dialogues(pd.DataFrame([row]))[0][0] == PAIR
    stray = {"question": "Why?", "answer": "So.\n<HUMAN>: And then?"}
    assert load_dialogues(pd.DataFrame([PAIR, stray]))[1] == {"without tags": 1}


def test_messages_without_words_are_dropped() -> None:
    silent = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None}]
    capitals = [{"role": t["role"].title(), "content": t["content"]} for t in TURNS]
    rows, dropped = load_dialogues(pd.DataFrame({"messages": [silent, capitals]}))
    assert (rows[0], dropped) == (PAIR, {"without an answer": 1})


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.jsonl", "rows.parquet"])
def test_a_broken_file_is_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('question,answer\n"What helps?,Sleep.\n')
    with pytest.raises(ValueError, match=rf"{name} is no whole \.\w+ \(.*\): mend it"):
        load_dialogues(str(tmp_path / name))


def test_several_answers_to_one_question_stay_together_in_a_split(tmp_path: Path) -> None:
    table = pd.DataFrame(
        [{"Context": f"Question {i % 10}?", "Response": f"Answer {i}."} for i in range(60)]
    )
    table.to_csv(tmp_path / "rows.csv", index=False, encoding="cp1252")
    parts = split_rows(load_dialogues(str(tmp_path / "rows.csv"))[0], seed=1)
    asked = [set(part["question"]) for part in parts.values()]
    assert sum(map(len, asked)) == 10 and sum(map(len, parts.values())) == 60


def test_bad_sources_get_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no file nowhere.csv: check DATASET"):
        load_dialogues("nowhere.csv")
    with pytest.raises(
        ValueError, match="no known column among .*'foo'.*rename them to one of: question, answer;"
    ):
        load_dialogues(pd.DataFrame({"foo": ["x"]}))
    with pytest.raises(ValueError, match=r"no row is left of 1 .*'empty': 1.*check DATASET"):
        load_dialogues(pd.DataFrame({"text": [""]}))
    with pytest.raises(ValueError, match="no file of a known kind"):
        load_dialogues(str(tmp_path / "rows.xlsx"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        OSError, match="could not fetch the data set 'nobody/nothing' .* set DATASET"
    ):
        load_dialogues("nobody/nothing")


def test_no_question_stands_in_two_parts_whatever_its_commas() -> None:
    questions = [f"Question {i % 40}{'?' * (i // 40)}" for i in range(120)]
    parts = split_rows(Dataset.from_dict({"question": questions, "answer": questions}), seed=3)
    asked = [{normalise_question(q) for q in part["question"]} for part in parts.values()]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    assert sum(len(part) for part in parts.values()) == 120
    with pytest.raises(ValueError, match="2 different questions make no three parts: add rows"):
        split_rows(Dataset.from_dict({"question": ["a", "b", "A?"]}))


def test_the_split_is_the_same_everywhere_and_leaves_no_part_empty() -> None:
    rows = load_dialogues(TINY.dataset)[0]
    assert {n: len(p) for n, p in split_rows(rows).items()} == {
        "train": 136,
        "validation": 18,
        "test": 18,
    }
    assert list(split_rows(rows)["test"]) == list(split_rows(rows)["test"])
    assert list(split_rows(rows, seed=1)["test"]) != list(split_rows(rows)["test"])
    tiny = split_rows(Dataset.from_dict({"question": ["a", "b", "c"]}))
    assert [len(part) for part in tiny.values()] == [1, 1, 1]


def test_prompt_and_completion_are_the_training_text() -> None:
    pair = to_prompt_completion(Dataset.from_list([PAIR]))[0]
    assert split_dialogue(pair["prompt"] + pair["completion"]) == ("What helps?", "Sleep.")
    with pytest.raises(ValueError, match="the question is empty: write at least one word"):
        format_prompt("  ")


def test_length_report_counts_what_a_cut_would_shorten() -> None:
    report = length_report([256, 257, 512, 513, 1024, 1025])
    assert [report[f"over_{cut}"] for cut in (256, 512, 1024)] == [5, 3, 1]


@pytest.mark.parametrize(
    "typed",
    [
        "<HUMAN>:",
        "< human >",
        "</ASSISTANT>",
        "<|endoftext|>",
        ">>SUFFIX<<",
        "<<HUMAN>|endoftext|>",
        "<HU<HUMAN>MAN>",
    ],
)
def test_nothing_typed_remains_a_tag_or_a_special_token(typed: str) -> None:
    harmless = neutralise(typed)
    assert neutralise(harmless) == harmless
    for tag in ("<human>", "<assistant>", "<|endoftext|>", ">>suffix<<"):
        assert tag not in harmless.lower().replace(" ", "").replace("/", "")
