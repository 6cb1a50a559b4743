"""Answers in controlled English: frames, phrases, and what is never said."""

import json
import random
import re
from pathlib import Path

from tools import frames
from tools.make_tiny_falcon import Pages, Shares, Text

ROOT = Path(__file__).resolve().parent.parent
TOPIC = {
    "topic": "stress", "of": "stress", "is": ["pressure"], "signs": ["poor sleep", "tight muscles"],
    "causes": ["too much work"], "to": ["calm down"], "things": ["a walk", "music"],
    "do": ["rest", "breathe out slowly", "talk to a friend", "go outside"],
    "others": ["listen", "cook a meal", "offer a walk"], "helpers": ["your doctor"],
    "worse": ["stress lasts for weeks"], "true": ["stress is common"], "kind": ["You do well."],
}  # fmt: skip


def shape(frame: str) -> re.Pattern[str]:
    """What a sentence of this frame looks like."""
    parts = re.split(r"{\w+}", frame)
    return re.compile("(?i)" + ".+".join(re.escape(part) for part in parts))


def test_every_sentence_follows_a_frame_and_says_no_phrase_twice() -> None:
    shapes = [shape(frame) for kind in frames.FRAMES.values() for frame in kind]
    rng = random.Random(0)
    for question in ("What is stress?", "I am stressed. What can I do?", "Why do I feel stress?"):
        said = frames.answer(question, TOPIC, False, rng)
        for sentence in re.split(r"(?<=\.) ", said):
            assert any(s.fullmatch(sentence) for s in shapes), sentence
        for phrase in TOPIC["do"] + TOPIC["things"] + TOPIC["signs"]:
            assert said.lower().count(phrase) <= 1


def test_the_question_decides_what_kind_of_answer_comes() -> None:
    rng = random.Random(1)
    meant = [frames.answer("What is stress?", TOPIC, False, rng) for _ in range(9)]
    assert all("mean pressure." in said for said in meant)
    other = [frames.answer("My son is stressed.", TOPIC, True, rng) for _ in range(9)]
    assert all(re.search("listen|cook a meal|offer a walk", said.lower()) for said in other)
    assert not [said for said in other if "lasts for weeks" in said]
    causes = [frames.answer("What causes stress?", TOPIC, False, rng) for _ in range(9)]
    assert any("Too much work can lead to stress." in said for said in causes)


def test_of_three_phrases_the_one_that_the_question_names_is_likeliest() -> None:
    topic = TOPIC | {"do": ["rest", "go outside", "call a friend"]}
    said = frames.fill("{do}.", topic, set(), {"outside"}, random.Random(2))
    assert said == "Go outside."


def test_no_sentence_of_a_dialogue_is_composed() -> None:
    taboo = {("it", "helps", "to", "rest")}
    piece = {"topic": "stress", "question": "I am stressed. Help?", "answer": "As it was."}
    text = Text([], [], [piece], [], {"stress": TOPIC | {"do": ["rest"], "things": []}})
    pages = Pages(text, 0, Shares(framed=1.0))
    assert "It helps to rest." in " ".join(pages.voice()[1] for _ in range(60))
    pages.is_taboo = lambda sentence: tuple(re.findall(r"\w+", sentence.lower())) in taboo
    assert "It helps to rest." not in " ".join(pages.voice()[1] for _ in range(60))
    assert pages.voice(tagged=True)[1] == "As it was.", "tags keep a manner of their own"


def test_the_committed_phrases_are_whole() -> None:
    """Short, without a full stop, each topic with what every kind of answer needs."""
    text = (ROOT / "assets/pretraining/phrases.jsonl").read_text()
    topics = [json.loads(line) for line in text.splitlines()]
    assert len({topic["topic"] for topic in topics}) == len(topics) > 90
    for topic in topics:
        assert topic["of"] and set(TOPIC) == set(topic)
        for kind in ("is", "to", "things", "do", "others", "helpers", "worse", "true"):
            assert len(topic[kind]) >= 3, (topic["topic"], kind)
            assert all(p.isascii() and p[-1] not in ".,;" for p in topic[kind])
        assert all(p.endswith(".") for p in topic["kind"])
