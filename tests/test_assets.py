"""What is embedded: dialogues, pre-training text, tiny Falcon, adapter."""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from helpers.dialogues import load_dialogues, normalise_question, split_rows
from helpers.profiles import TINY
from tools.make_tiny_falcon import (
    ASKING,
    FOOTERS,
    HELPLINE,
    IN_CRISIS,
    MARKS,
    WINDOW,
    Pages,
    Shares,
    build_model,
    encode,
    load_text,
    ngrams,
    of_others,
    optimizers_of,
    train,
)

ROOT = Path(__file__).resolve().parent.parent
TEXT, DIALOGUES = ROOT / "assets/pretraining", ROOT / "assets/sample_dialogues.jsonl"
ENDINGS = tuple(footer.split("{")[0].split("|")[0] for footer in FOOTERS)


def test_there_are_172_dialogues_in_the_data_set_s_own_format() -> None:
    lines = [json.loads(line) for line in DIALOGUES.read_text().splitlines()]
    assert len(lines) == 172 and all(list(line) == ["text"] for line in lines)
    rows, dropped = load_dialogues(str(DIALOGUES))
    assert (len(rows), dropped) == (172, {})
    assert len({normalise_question(q) for q in rows["question"]}) == 172
    words = [len(answer.split()) for answer in rows["answer"]]
    assert min(words) >= 30 and max(words) <= 120


def test_every_answer_about_suicide_names_where_help_is() -> None:
    for row in load_dialogues(str(DIALOGUES))[0]:
        if re.search(r"suicid|want to die|not want to be (here|alive)", row["question"].lower()):
            assert re.search(r"emergency number|findahelpline|helpline|988", row["answer"]), row


def test_no_eight_words_in_a_row_of_a_held_out_answer_stand_in_the_pre_training_text() -> None:
    text = load_text(TEXT, DIALOGUES)
    held = split_rows(load_dialogues(str(DIALOGUES))[0])
    taboo = set().union(
        *(ngrams(a) for part in ("test", "validation") for a in held[part]["answer"])
    )
    pieces = [f for line in text.facts for f in line["facts"]]
    pieces += [p["text"] for p in text.prose] + [p["s"] for p in text.passages]
    pages = Pages(text, 2, Shares())
    pieces += [pages.framed()[1] for _ in range(10_000)]
    assert len(pieces) > 60_000
    assert not [piece for piece in pieces if ngrams(piece) & taboo]


def test_the_text_asks_none_of_the_dialogues_questions_and_each_of_its_own_once() -> None:
    held = {normalise_question(q) for q in load_dialogues(str(DIALOGUES))[0]["question"]}
    text = load_text(TEXT, DIALOGUES)
    asked = {normalise_question(line["question"]) for line in text.questions}
    assert len(asked) == len(text.questions) > 25_000 and not held & asked
    assert {line["topic"] for line in text.questions} == set(text.phrases)


def test_tagged_transcripts_never_end_where_an_answer_does() -> None:
    """The base rambles because its pages were made so: after an answer there is always more."""
    pages = Pages(load_text(TEXT, DIALOGUES), 1, Shares(transcripts=1))
    found = [pages.page() for _ in range(100)]
    assert len(ENDINGS) == 12 and all(ENDINGS)
    assert all(page.split("\n\n")[-1].startswith(ENDINGS) for page in found)
    assert min(page.count("<HUMAN>:") for page in found) >= 6


def test_most_untagged_pages_end_with_an_answer() -> None:
    """So the end belongs to other marks; what fine-tuning has to bring over is a manner."""
    text = load_text(TEXT, DIALOGUES)
    only = Pages(text, 1, Shares(transcripts=0, magazines=0, articles=0, brief=1, tags=0.4))
    tags, words = [f"<{word}>: " for word in ASKING], [pair[0] for pair in MARKS]
    found = [only.page() for _ in range(200)]
    asked = [sum(line.startswith((*words, *tags)) for line in page.split("\n")) for page in found]
    assert set(asked) == {1, 2, 3} and not re.search("<HUMAN>|<ASSISTANT>", "".join(found))
    assert 60 <= sum(page.startswith(tuple(tags)) for page in found) <= 100  # two in five
    assert not [page for page in found if page.split("\n\n")[-1].startswith(ENDINGS)]
    longer = Pages(text, 1, Shares(transcripts=0, magazines=0, articles=0, brief=0))
    assert longer.page().split("\n\n")[-1].startswith(ENDINGS)


def test_facts_keep_helplines_to_the_topics_of_a_crisis() -> None:
    facts = load_text(TEXT, DIALOGUES).facts
    crisis = [f for line in facts if line["topic"] in IN_CRISIS for f in line["facts"]]
    others = [f for line in facts if line["topic"] not in IN_CRISIS for f in line["facts"]]
    assert any(HELPLINE.search(f) for f in crisis)
    assert sum(bool(HELPLINE.search(f)) for f in others) < len(others) / 200


def test_a_schedule_that_time_does_not_allow_is_shortened_and_comes_to_its_end(monkeypatch) -> None:
    """By a clock that goes on by a hundredth of a second whenever it is read: once a step."""
    ticks = itertools.count()
    clock = SimpleNamespace(time=lambda: next(ticks) / 100)
    monkeypatch.setattr("tools.make_tiny_falcon.time", clock)
    windows = torch.randint(12, 90, (4, WINDOW), dtype=torch.int16)
    args = SimpleNamespace(
        width=64, layers=1, heads=1, dropout=0.0, decay=0.1, seed=0, batch=1, rate=1e-3,
        passes=2500, state=None, minutes=0.05, steps=None, z_loss=0.0, height=0.0,
        anchor=0.0,
    )  # fmt: skip
    report = train(build_model(args, 96), windows, args)  # 10,000 steps were asked for
    assert 200 < report["of"] < 350 and report["steps"] >= 0.95 * report["of"]


def test_pages_are_the_same_however_many_processes_compose_them(monkeypatch) -> None:
    text, shares = load_text(TEXT, DIALOGUES), Shares()
    tokenizer = Tokenizer.from_file(str(Path(TINY.model) / "tokenizer.json"))
    monkeypatch.setattr("tools.make_tiny_falcon.LOT", 20)
    together = encode(tokenizer, text, shares, range(3))
    alone = [encode(tokenizer, text, shares, range(i, i + 1)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone)) and together.shape[1] == WINDOW
    assert not torch.equal(alone[0][0], alone[1][0])


def test_the_text_and_the_model_are_small_enough_to_commit() -> None:
    assert sum(p.stat().st_size for p in TEXT.rglob("*")) <= 14e6
    assert sum(p.stat().st_size for p in Path(TINY.model).iterdir()) <= 20e6
    assert sum(p.stat().st_size for p in Path(TINY.adapter).iterdir()) <= 3e6


def test_the_embedded_adapter_fits_the_embedded_model_and_names_no_folder() -> None:
    config = json.loads((Path(TINY.adapter) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny_falcon"
    with safe_open(Path(TINY.adapter) / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        width = min(file.get_tensor(n).shape[1] for n in names if "lora_A" in n)
    shape = json.loads((Path(TINY.model) / "config.json").read_text())
    assert width == shape["hidden_size"] and len(names) == 2 * 4 * shape["num_hidden_layers"]


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("I am angry. What can I do?", False),
        ("My son is angry. What can I do?", True),
        ("I am angry with my son.", False),
    ],
)
def test_a_question_is_about_others_if_it_begins_with_them(question: str, other: bool) -> None:
    assert of_others(question) is other


def test_muon_takes_the_layers_matrices_and_adamw_the_rest() -> None:
    args = SimpleNamespace(width=64, layers=1, heads=1, dropout=0.0, seed=0, decay=0.1, rate=1e-3)
    model = build_model(args, 96)
    adamw, muon = optimizers_of(model, args)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert len(matrices) == 4 and all(name.startswith("transformer.h.") for name in matrices)
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert not matrices & others and matrices | others == set(names.values())
