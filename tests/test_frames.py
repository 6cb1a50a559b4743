"""Answers in controlled English: frames, phrases, and what is never said."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

from helpers.generation import Generation
from tools import frames, try_base
from tools.make_tiny_falcon import Pages, Shares, Text, ngrams

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
        for phrase in TOPIC["do"] + TOPIC["things"] + TOPIC["signs"] + TOPIC["to"]:
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
    for seed in range(20):  # three phrases: all are looked at
        rng, asked = random.Random(seed), frozenset({"outside"})
        assert frames.fill("{do}.", topic, set(), asked, rng) == "Go outside."
        # answered already, and the other says a word again
        assert frames.fill("{do}.", topic, {"outside", "call"}, asked, rng) == "Rest."


def test_nothing_that_shares_words_with_a_dialogue_is_composed() -> None:
    piece = {"topic": "stress", "question": "I am stressed. Help?"}
    text = Text([], [], [piece], [], {"stress": TOPIC | {"do": ["rest", "go out"], "things": []}})
    pages = Pages(text, 0, Shares())
    said = pages.framed()[1]
    pages.taboo = ngrams(said)
    assert ngrams(said) and not [1 for _ in range(60) if ngrams(pages.framed()[1]) & ngrams(said)]


def test_an_answer_is_never_short_though_its_topic_lacks_phrases() -> None:
    bare = TOPIC | {"signs": [], "causes": [], "kind": []}
    bare["true"] = ["stress is common", "nobody is weak", "stress passes"]
    rng = random.Random(3)
    for question in ("What are the signs of stress?", "Why am I stressed?", "What can I do?"):
        for _ in range(40):
            said = frames.answer(question, bare, False, rng)
            assert 3 <= said.count(".") <= 6, said


def test_a_composed_answer_is_good_and_a_broken_or_strange_one_is_not() -> None:
    other = TOPIC | {"of": "grief", "true": ["grief takes time"], "signs": ["deep sadness"]}
    own, known = frames.patterns([TOPIC]), frames.patterns([TOPIC, other])
    rng = random.Random(4)
    for question in ("What is stress?", "I am stressed. What can I do?", "My son is stressed."):
        said = frames.answer(question, TOPIC, "son" in question, rng)
        found = frames.grade(said, own, known)
        assert found.good and found.on_topic == found.sentences and not found.repeats, said
    strange = frames.grade("Grief takes time. Deep sadness may point to grief.", own, known)
    assert (strange.known, strange.on_topic, strange.good) == (2, 0, False)
    broken = frames.grade("It helps to rest. Stress is common. The a of. So it is.", own, known)
    assert (broken.sentences, broken.known, broken.good) == (4, 2, False)
    twice = "It helps to rest. You can go outside and rest. Stress is common."
    assert frames.grade(twice, own, known).repeats


def test_the_topic_and_who_can_help_may_come_twice() -> None:
    own = frames.patterns([TOPIC | {"of": "long stress"}])
    said = "Too much work can lead to long stress. Poor sleep may point to long stress. "
    said += "Your doctor can help you to calm down. Ask your doctor for advice when you need it."
    assert frames.grade(said, own, own) == frames.Grade(4, 4, 4, repeats=False)


def test_a_base_is_graded_by_answers_to_questions_that_no_page_asks(monkeypatch) -> None:
    piece = {"topic": "stress", "question": "What is stress?"}
    text = Text([], [], [piece] * 150, [], {"stress": TOPIC})
    said = [
        ("By stress people mean pressure. Stress is common.", True),
        ("By stress people mean pressure. Stress is common.\n<HUMAN>: So?", False),
        ("It is all a delicate balance.", True),
    ]  # fmt: skip
    asked = []
    monkeypatch.setattr(try_base, "load_text", lambda *_: text)
    monkeypatch.setattr(try_base, "sampling", lambda tokenizer: None)
    monkeypatch.setattr(
        try_base,
        "generate_texts",
        lambda model, tokenizer, prompts, config: (
            asked.extend(prompts) or [Generation(words, end, 9) for words, end in said]
        ),
    )
    line = try_base.graded(SimpleNamespace(model=None, tokenizer=None), 99)
    assert asked == ["<HUMAN>: What is stress?\n<ASSISTANT>:"] * 3  # one question in fifty
    assert line == "of 3: 67% stop, 33% are good, 0% repeat a phrase"


def test_the_committed_phrases_are_whole() -> None:
    """Short, without a full stop, each topic with what every kind of answer needs."""
    text = (ROOT / "assets/pretraining/phrases.jsonl").read_text()
    topics = [json.loads(line) for line in text.splitlines()]
    assert len({topic["topic"] for topic in topics}) == len(topics) == 155
    for topic in topics:
        assert topic["of"] and set(TOPIC) == set(topic)
        for kind in ("is", "to", "things", "do", "others", "helpers", "worse", "true"):
            assert len(topic[kind]) >= 3, (topic["topic"], kind)
            assert all(p.isascii() and p[-1] not in ".,;" for p in topic[kind])
        for kind in ("to", "do", "others"):  # after "It helps to"
            assert not [p for p in topic[kind] if re.match("do not|don't|never|to |please", p)]
        assert all(p.endswith(".") for p in topic["kind"])
