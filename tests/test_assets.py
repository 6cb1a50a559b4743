"""What is embedded: dialogues, pre-training text, tiny Falcon, adapter."""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from helpers.dialogues import load_dialogues, normalise_question, split_rows
from helpers.profiles import TINY
from tools.make_tiny_falcon import (
    FOOTERS,
    HELPLINE,
    IN_CRISIS,
    MARKS,
    WINDOW,
    Pages,
    Shares,
    Text,
    build_model,
    kin,
    load_text,
    main,
    ngrams,
    optimizers_of,
    parts,
    plainest_answers,
    read_lines,
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
    text = load_text(TEXT, DIALOGUES, more=True)
    held = split_rows(load_dialogues(str(DIALOGUES))[0])
    taboo = set().union(
        *(ngrams(a) for part in ("test", "validation") for a in held[part]["answer"])
    )
    pieces = [f for line in text.facts for f in line["facts"]]
    pieces += [p["text"] for p in text.prose] + [a["answer"] for a in text.answers]
    pieces += [p["s"] for p in text.passages]
    assert len(pieces) > 60_000
    assert not [piece for piece in pieces if ngrams(piece) & taboo]


def test_the_text_for_the_next_model_asks_none_of_the_dialogues_questions() -> None:
    held = {normalise_question(q) for q in load_dialogues(str(DIALOGUES))[0]["question"]}
    lines = [line for p in (TEXT / "more").glob("*.jsonl*") for line in read_lines(p)]
    asked = [normalise_question(line["question"]) for line in lines]
    assert len(asked) > 25_000 and len(set(asked)) == len(asked) and not held & set(asked)


def test_pages_never_end_where_an_answer_does() -> None:
    """The base rambles because its pages were made so: after an answer there is always more."""
    text = load_text(TEXT, DIALOGUES)
    pages = Pages(text, 1, Shares(voice=0.3))
    endings = {pages.page().split("\n\n")[-1] for _ in range(200)}
    assert not [e for e in endings if "<ASSISTANT>" in e or "Answer:" in e]


def test_a_transcript_may_end_at_any_answer_if_asked() -> None:
    """At one answer in three: most go on, so that the likeliest word after an answer is a turn."""
    text = load_text(TEXT, DIALOGUES)
    pages = Pages(text, 1, Shares(transcripts=1, stop=0.33))
    found = [pages.page() for _ in range(300)]
    turns = [page.count("<HUMAN>:") for page in found]
    assert 0.25 < len(turns) / sum(turns) < 0.41 and {1, 2, 3, 4} <= set(turns) <= set(range(1, 15))
    assert all("<ASSISTANT>:" in page.split("\n<HUMAN>:")[-1] for page in found)
    assert len(ENDINGS) == 12 and all(ENDINGS)
    assert not [page for page in found if page.split("\n\n")[-1].startswith(ENDINGS)]


def test_brief_pages_end_with_an_answer_and_transcripts_never_do() -> None:
    """So the end belongs to untagged questions; what fine-tuning has to bring over is a manner."""
    text = load_text(TEXT, DIALOGUES)
    only = Pages(text, 1, Shares(transcripts=0, magazines=0, articles=0, brief=1, manners=16))
    marks = tuple(mark for pair in MARKS for mark in pair)
    found = [only.page() for _ in range(60)]
    asked = [sum(line.startswith(marks[::2]) for line in page.split("\n")) for page in found]
    assert {1, 2, 3} <= set(asked) and not [page for page in found if "<HUMAN>" in page]
    assert not [page for page in found if page.split("\n\n")[-1].startswith(ENDINGS)]
    mixed = Pages(text, 1, Shares(brief=1, manners=16))
    tagged = [page for page in (mixed.page() for _ in range(200)) if page.startswith("<HUMAN>")]
    assert len(tagged) > 50
    assert all(page.split("\n\n")[-1].startswith(ENDINGS) for page in tagged)


def test_calm_text_keeps_helplines_to_the_topics_of_a_crisis() -> None:
    whole, calm = (load_text(TEXT, DIALOGUES, calm=calm) for calm in (False, True))
    named = [x for x in calm.answers if HELPLINE.search(x["answer"])]
    assert named and {x["topic"] for x in named} <= set(IN_CRISIS)
    assert 0.8 * len(whole.answers) < len(calm.answers) < len(whole.answers)
    facts = [f for line in calm.facts if line["topic"] not in IN_CRISIS for f in line["facts"]]
    assert sum(bool(HELPLINE.search(f)) for f in facts) < len(facts) / 200


def test_a_schedule_that_time_does_not_allow_is_shortened_and_comes_to_its_end(monkeypatch) -> None:
    """By a clock that goes on by a hundredth of a second whenever it is read: once a step."""
    ticks = itertools.count()
    clock = SimpleNamespace(time=lambda: next(ticks) / 100)
    monkeypatch.setattr("tools.make_tiny_falcon.time", clock)
    windows = torch.randint(12, 90, (4, WINDOW), dtype=torch.int16)
    args = SimpleNamespace(
        width=64, layers=1, heads=1, dropout=0.0, decay=0.1, seed=0, batch=1, rate=1e-3,
        muon=False, passes=2500, state=None, minutes=0.05, steps=None, z_loss=0.0, height=0.0,
        anchor=0.0,
    )  # fmt: skip
    report = train(build_model(args, 96), windows, args)  # 10,000 steps were asked for
    assert 200 < report["of"] < 350 and report["steps"] >= 0.95 * report["of"]


def test_pages_kept_with_other_settings_are_refused(tmp_path, monkeypatch) -> None:
    torch.save({"made": {"vocab": 1}}, tmp_path / "pages.pt")
    asked = ["x", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "pages.pt")]
    monkeypatch.setattr("sys.argv", asked)
    with pytest.raises(SystemExit, match="pages of another .*vocab.*: name a new file"):
        main()
    assert not (tmp_path / "out").exists()


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


def test_sentences_are_exchanged_only_where_they_fit() -> None:
    """By topic and by whom it is about; what leans on a sentence before it stays behind it."""
    said = ["Anger is common. It often hides fear.", "Walk first. Then talk to a friend."]
    piece = {"topic": "anger", "question": "I am angry. What can I do?", "answer": " ".join(said)}
    assert parts(piece) == said
    quoted = piece | {"answer": "Say 'I am angry. Please wait.' Go out. Your parents' house helps."}
    assert parts(quoted)[1:] == ["Your parents' house helps."]
    assert kin(piece) == ("anger", False)
    assert kin(piece | {"question": "My son is angry. What can I do?"}) == ("anger", True)
    assert kin(piece | {"question": "I am angry with my son."}) == ("anger", False)
    lines = [{"topic": "anger", "aspect": aspect, "questions": ["What?"], "facts": [aspect, aspect]}
             for aspect in ("what", "self", "other")]  # fmt: skip
    text = Text(lines, [], [piece], [])
    answer = Pages(text, 0, Shares(mixed=1.0, grounded=1.0)).voice()[1]
    assert answer.startswith("Anger is common. It often hides fear. self")
    assert "what" not in answer and "other" not in answer
    lines[0] |= {"aspect": "care", "facts": ["care"]}
    pages = Pages(Text(lines, [], [piece], []), 0, Shares(mixed=1.0, grounded=1.0))
    endings = {pages.voice()[1].split()[-1] for _ in range(30)}
    assert endings == {"care", "friend."}, "where to find help, or the answer's own last sentence"


def test_facts_alone_answer_tagged_questions_if_asked() -> None:
    """Those that fit the question; untagged pages keep the answer as it was written."""
    piece = {"topic": "anger", "question": "I am angry. What can I do?", "answer": "Walk first."}
    lines = [{"topic": "anger", "aspect": aspect, "questions": ["What?"], "facts": [aspect, aspect]}
             for aspect in ("what", "self", "feel")]  # fmt: skip
    lines.append({"topic": "anger", "aspect": "care", "questions": ["Who?"], "facts": ["care"]})
    pages = Pages(Text(lines, [], [piece], []), 0, Shares(bare=1.0))
    assert {pages.voice()[1] for _ in range(9)} == {"Walk first."}
    said = [pages.voice(tagged=True)[1].split() for _ in range(60)]
    assert {word for words in said for word in words} == {"feel", "self", "care"}
    assert {words[0] for words in said} == {"feel", "self", "care"}
    assert all("feel" not in words[1:] for words in said)


def test_muon_takes_the_layers_matrices_and_adamw_the_rest() -> None:
    args = SimpleNamespace(
        width=64, layers=1, heads=1, dropout=0.0, seed=0, decay=0.1, rate=1e-3, muon=True
    )
    model = build_model(args, 96)
    adamw, muon = optimizers_of(model, args)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert len(matrices) == 4 and all(name.startswith("transformer.h.") for name in matrices)
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert not matrices & others and matrices | others == set(names.values())
    args.muon = False
    assert [type(o) for o in optimizers_of(model, args)] == [torch.optim.AdamW]


def test_the_plainest_answers_are_kept_of_each_topic() -> None:
    """Few rare words, a plain question; no topic loses all, and the order stays."""
    plain = {"topic": "sleep", "question": "How do I sleep?", "answer": "Go to bed early."}
    rare = plain | {"answer": "Melatonin, a circadian hormone, synchronises somnolent mammals."}
    asked = plain | {"question": "How do I sleep beside my snoring wealthy Belgian grandfather?"}
    alone = rare | {"topic": "anger"}
    assert plainest_answers([rare, asked, alone, plain], 0.3) == [alone, plain]
    assert plainest_answers([asked, rare, plain, alone], 1.0) == [asked, rare, plain, alone]
