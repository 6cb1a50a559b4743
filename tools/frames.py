"""Answers in controlled English: sentences from fixed frames and short phrases on a topic.

A model of nine million parameters cannot learn free English from a few megabytes: what it has read
it knows by heart, and fine-tuning on other sentences breaks it. Frames and phrases make millions of
sentences that follow few rules, so that it learns the rules. `tools/make_tiny_falcon.py` composes
the answers of its untagged pages so.
"""

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

FRAMES = {  # a word in braces is a phrase of that kind; modal verbs, since phrases may be plural
    "is": ("By {of} people mean {is}.", "People who speak of {of} mean {is}."),
    "signs": (
        "{signs} and {signs} can be signs of {of}.",
        "Signs of {of} can be {signs}, {signs} and {signs}.",
        "Many people notice {signs} or {signs}.",
        "{signs} may point to {of}.",
        "Some people first notice {signs}.",
    ),
    "causes": (
        "{causes} can lead to {of}.",
        "{causes} and {causes} can lead to {of}.",
        "{causes} or {causes} may play a part in {of}.",
        "Behind {of} there may be {causes} or {causes}.",
    ),
    "helps": (
        "{things} and {things} can help you to {to}.",
        "{things} can help you to {to}.",
        "{things} can help many people to {to}.",
        "If you want to {to}, {do}.",
        "To {to}, {do} and {do}.",
        "{do}, and {do}.",
        "It helps to {do}.",
        "It can help to {do} and to {do}.",
        "You can {do} and {do}.",
        "A good first step is to {do}.",
    ),
    "others": (
        "{others}, and {others}.",
        "You can {others} and {others}.",
        "It helps to {others}.",
        "A good way to help is to {others}.",
        "It can help to {others} and to {others}.",
    ),
    "true": (
        "{true}.",
        "It is good to know that {true}.",
        "Remember that {true}.",
        "Many people do not know that {true}.",
    ),
    "worse": (
        "Talk to {helpers} if {worse}.",
        "If {worse}, please talk to {helpers}.",
        "If {worse}, {helpers} can help you.",
        "{helpers} can help you to {to}.",
    ),
    "company": ("{helpers} can help both of you.", "Ask {helpers} for advice when you need it."),
    "kind": ("{kind}",),
}
KNOWLEDGE = re.compile(r"(What|Which|Who|Why|Is|Are|Does|Do|Can|Could|Will) (?!.*\bI\b)")
ASKED = (  # what a question asks for, and the kinds of sentences that answer it
    (re.compile(r"what (is|are|does)|explain|mean|what exactly", re.I), ("is", "signs", "true")),
    (re.compile(r"sign|symptom|notice|know (if|whether|that)|tell (if|whether)", re.I),
     ("signs", "signs", "true")),
    (re.compile(r"cause|why|come from|reason", re.I), ("causes", "causes", "true")),
    (re.compile(""), ("true", "true", "helps")),
)  # fmt: skip


@cache
def words_of(text: str) -> frozenset[str]:
    """Words of four letters and more, so that phrases can be chosen by what was asked."""
    return frozenset(re.findall(r"[a-z]{4,}", text.lower()))


def sentence(
    kind: str, phrases: dict, said: set[str], asked: frozenset[str], rng: random.Random
) -> str:
    """One sentence of this kind; no frame and no phrase twice.

    Returns:
        The sentence, or "" if the topic has no more phrases of this kind.

    Example:
        >>> topic = {"of": "stress", "do": ["rest"], "to": ["calm down"]}
        >>> said = set()
        >>> sentence("helps", topic, said, frozenset(), random.Random(1)), sorted(said)
        ('If you want to calm down, rest.', ['If you want to {to}, {do}.', 'calm down', 'rest'])
    """
    for frame in rng.sample(FRAMES[kind], len(FRAMES[kind])):
        used = said | {frame}
        if frame not in said and (text := fill(frame, phrases, used, asked, rng)):
            said |= used
            return text
    return ""


def fill(
    frame: str, phrases: dict, said: set[str], asked: frozenset[str], rng: random.Random
) -> str:
    """The frame with phrases for its braces, put into `said`; "" if they do not suffice.

    Of three phrases the one that answers most of the question's words not yet answered, and has
    the fewest words that were said before: no walk in the morning after a walk with a friend.
    """
    out = frame
    for name in re.findall(r"{(\w+)}", frame):
        if name == "of":
            phrase = phrases["of"]
        else:
            left = [p for p in phrases.get(name, ()) if p not in said]
            if not left:
                return ""
            some = rng.sample(left, min(3, len(left)))
            spoken = frozenset().union(*(words_of(p) for p in said if "{" not in p))
            phrase = max(
                some, key=lambda p: len(words_of(p) & asked - spoken) - len(words_of(p) & spoken)
            )
            said.add(phrase)
        out = out.replace("{" + name + "}", phrase, 1)
    return out[0].upper() + out[1:]


def kinds_for(question: str, of_others: bool, rng: random.Random) -> tuple[list, list, list]:
    """Kinds of sentences for the answer, for its end, and more should a topic lack phrases.

    Example:
        >>> kinds_for("What is stress?", False, random.Random(1))[0]
        ['is', 'signs', 'true']
    """
    if of_others:
        body = ["true"] * (rng.random() < 0.4) + ["others"] * rng.randint(3, 4)
        return body, ["company"] * (rng.random() < 0.7), ["others", "true", "true"]
    end = ["worse"] * (rng.random() < 0.7)
    if KNOWLEDGE.match(question):
        body = next(kinds for asked, kinds in ASKED if asked.search(question))
        return [*body, *["helps"] * rng.randint(0, 1)], end, ["true", "true", "helps", "helps"]
    first = rng.choices((["kind"], ["true"], []), (0.5, 0.2, 0.3))[0]
    return [*first, *["helps"] * rng.randint(3, 4)], end, ["true", "helps", "true"]


def answer(question: str, phrases: dict, of_others: bool, rng: random.Random) -> str:
    """Three to six sentences that answer the question on this topic.

    Args:
        question: as it is asked.
        phrases: of its topic, by kind.
        of_others: whether it is about somebody else.
        rng: chooses frames and phrases.
    """
    body, end, spare = kinds_for(question, of_others, rng)
    said: set[str] = set()
    asked = words_of(question)

    def some(kinds: list[str], most: int) -> list[str]:
        made = (sentence(kind, phrases, said, asked, rng) for kind in kinds)
        return list(itertools.islice(filter(None, made), most))

    return " ".join(some([*body, *spare], max(3, len(body))) + some(end, len(end)))


def patterns(topics: Iterable[dict]) -> list[re.Pattern[str]]:
    """What matches the sentences that the frames make of these topics' phrases.

    Each phrase is a group, but the topic and the helpers are none: they may come again.

    Example:
        >>> stress = {"of": "stress", "is": ["pressure"]}
        >>> found = [p.fullmatch("By stress people mean pressure.") for p in patterns([stress])]
        >>> [match.groups() for match in found if match]
        [('pressure',)]
    """
    heard: dict[str, set[str]] = {}
    for topic in topics:
        for name, some in topic.items():
            heard.setdefault(name, set()).update([some] if isinstance(some, str) else some)
    either = {
        name: ("(?:" if name in ("of", "helpers") else "(") + "|".join(map(re.escape, some)) + ")"
        for name, some in heard.items()
        if some
    }
    return [
        re.compile("".join(either.get(part[1:-1], re.escape(part)) for part in parts), re.I)
        for frame in itertools.chain(*FRAMES.values())
        for parts in [re.split(r"({\w+})", frame)]
    ]


@dataclass
class Grade:
    """An answer's sentences, how many of them the frames make, and whether a phrase comes twice."""

    sentences: int
    on_topic: int  # of its topic's own phrases
    known: int  # of any topic's
    repeats: bool

    @property
    def good(self) -> bool:
        """All sentences but one are known, all but two, and at least two, are on the topic."""
        enough = max(2, self.sentences - 2)
        return self.known >= self.sentences - 1 and self.on_topic >= enough


def grade(answer: str, own: Sequence[re.Pattern[str]], known: Sequence[re.Pattern[str]]) -> Grade:
    """Read an answer by the patterns of its topic and of all topics: stricter than a reader.

    Example:
        >>> own = patterns([{"of": "stress", "is": ["pressure"], "true": ["stress passes"]}])
        >>> said = "By stress people mean pressure. Stress passes. Stress passes. It is blue."
        >>> grade(said, own, own), grade(said, own, own).good
        (Grade(sentences=4, on_topic=3, known=3, repeats=True), True)
    """

    def match(sentence: str, some: Sequence[re.Pattern[str]]) -> re.Match[str] | None:
        return next(filter(None, (pattern.fullmatch(sentence) for pattern in some)), None)

    sentences = [s for s in re.split(r"(?<=[.!?])\s+", answer.strip()) if s]
    on_topic = [match(sentence, own) for sentence in sentences]
    found = [m or match(s, known) for m, s in zip(on_topic, sentences, strict=True)]
    phrases = [group.lower() for m in found if m for group in m.groups()]
    counts = (len(sentences), sum(map(bool, on_topic)), sum(map(bool, found)))
    return Grade(*counts, repeats=len(set(phrases)) < len(phrases))
