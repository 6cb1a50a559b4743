"""Is this a cry for help, and may this answer be shown: a screen before and after the model.

Rules are data (`safety_rules.tsv`); a small linear classifier weighs what they find together with
the words (`screen_weights.bin`, trained by `tools/train_screen.py` on text of our own). They miss
things. The answer is yes or no: nothing here tells anybody how great a danger is.
"""

import csv
import json
import re
import unicodedata
import zlib
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

RULES_FILE = Path(__file__).with_name("safety_rules.tsv")
WORDS_FILE = Path(__file__).with_name("safety_words.tsv")
WEIGHTS_FILE = Path(__file__).with_name("screen_weights.bin")
REPLIES_FILE = Path(__file__).with_name("safety_replies.tsv")
HELPLINES_FILE = Path(__file__).with_name("helplines.tsv")
ALWAYS = ("direct", "spanish", "hindi", "chinese", "slang")
SUPPRESSORS = ("idiom", "information", "recovered", "fiction", "work", "denial")


@dataclass(frozen=True)
class Screen:
    """Flagged or not, as which kinds, and the ids of the rules that found something.

    `rule_ids` may hold weak finds of a message that is not flagged; then `kinds` is empty.
    """

    flag: bool
    kinds: tuple[str, ...] = ()
    rule_ids: tuple[str, ...] = ()


# One row of `safety_rules.tsv`, its pattern compiled; the replacement is for spellings alone.
Rule = namedtuple("Rule", "id kind pattern example counter_example replacement")

# Where a person can be reached, where that was found, and when it was last looked up.
Helpline = namedtuple("Helpline", "region name number url source checked_on")


def _read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a table with a head line, columns parted by tabs, no quoting."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


HELPLINES = tuple(Helpline(**row) for row in _read_table(HELPLINES_FILE))

# What stands in for the model, never written by one: for a person, for who worries, for an answer.
REPLIES = {row["name"]: row["text"] for row in _read_table(REPLIES_FILE)}
BLOCKED_REPLY = REPLIES["blocked"]

LOOK_ALIKES = str.maketrans("аеорсухіѕјԁһкмтвногαεοικνρτυχ", "aeopcyxisjdhkmtbhoraeoiknptux")
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)
LEET = str.maketrans("013457@$!|", "oieastasil")
LEET_WORD = re.compile(r"(?<!\w)(?!\d+[a-z]{1,3}\b)[\w@$!|]*[a-z][\w@$!|]*\w")
SPACED = re.compile(r"(?<!\w)(?:\w[ .\-_*]{1,2}){3,}\w(?!\w)")
RUN_WORDS = re.compile(
    r"(?:(?:wanna|want|gonna|going|need|wish|to|die|dead|kill|myself|my|self|life|end|it|all|"
    r"suicidal|suicide|kys|kms|i|am|im|was|were|not|dont|be|alive|live|hurt|cut|harm|commit|take|own))"
)


def _read_rules() -> tuple[Rule, ...]:
    """Read the table; a row of kind `word` names a part, which `{name}` in later patterns means."""
    rules, words = [], {}
    for row in _read_table(RULES_FILE):
        pattern, _, put = row["pattern"].partition(" => ")
        pattern = re.sub(r"\{([a-z_]+)\}", lambda m: f"(?:{words[m[1]]})", pattern)
        if row["kind"] == "word":
            words[row["id"]] = pattern
            continue
        if row["kind"] not in ("chinese", "spelling") and not row["id"].startswith("zh"):
            pattern = rf"\b(?:{pattern})(?!\w)"
        shown = row["example"], row["counter_example"]
        rules.append(Rule(row["id"], row["kind"], re.compile(pattern), *shown, put))
    return tuple(rules)


RULES = _read_rules()
INPUT_RULES = tuple(r for r in RULES if r.kind not in (*SUPPRESSORS, "output", "spelling"))
SPELLINGS = tuple(r for r in RULES if r.kind == "spelling")
INPUT_SUPPRESSORS = tuple(r for r in RULES if r.kind in SUPPRESSORS)
OUTPUT_RULES = tuple(r for r in RULES if r.kind == "output")
SENTENCE_END = re.compile(r"[.!?。…]+(?=\s|$|[^\x00-\x7f])")
CLAUSE_END = re.compile(
    SENTENCE_END.pattern + r"|[,;:()—–]| - | (?:but|and|because|so|although|though|however|yet) "
)
FIRST_PERSON = re.compile(r"\b(?:i|me|my|myself)\b")
NEGATION = re.compile(r"\b(?:not|never|no|nothing|nobody)\b")
PAST = re.compile(
    r"\b(?:was|were|had|did|\w+ed|thought|felt|cut|hurt|lost|wrote|self-harm|attempt)\b"
)


def normalise(text: str) -> str:
    """Bring a message into the plain form that the rules are written for.

    Small letters without accents, no invisible marks, look-alikes as Latin letters, digits inside
    words as letters, spaced letters joined, long repeats cut, contractions and common typos
    written out. It is for the rules alone: the page shows what was typed.

    Args:
        text: what a person typed.

    Returns:
        The plain form, on one line.

    Example:
        >>> normalise("I don\u2019t w4nt to l i v e anymoreeee")
        'i do not want to live anymore'
    """
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold()
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = text.translate(LOOK_ALIKES)
    text = re.sub(r"\bki11\b", "kill", re.sub(r"\b2 ?(?=die|kill|end|live|be\b|hurt)", "to ", text))
    text = LEET_WORD.sub(lambda m: m[0].translate(LEET), text)
    text = SPACED.sub(lambda m: _split_run(re.sub(r"[ .\-_*]", "", m[0])), text)
    text = re.sub(r"(?<!\w)\w{9,}(?!\w)", lambda m: _split_run(m[0]), text)
    for rule in SPELLINGS:
        text = rule.pattern.sub(rule.replacement, text)
    return " ".join(text.split())


def _split_run(run: str) -> str:
    """Set spaces between words written as one, if all of them are words of a disclosure."""
    parts = RUN_WORDS.findall(run)
    return " ".join(parts) if "".join(parts) == run else run


def _around(text: str, start: int, end: int, stop: re.Pattern[str]) -> tuple[int, int]:
    """The stretch around a span up to the stops on both sides."""
    low = max((m.end() for m in stop.finditer(text, 0, start)), default=0)
    after = stop.search(text, end)
    return low, after.start() if after else len(text)


def _is_past(risk: re.Match[str]) -> bool:
    """Whether the match, or the words just before it, stand in the past tense."""
    return bool(PAST.search(risk.string, max(0, risk.start() - 30), risk.end()))


def _takes_back(other: Rule, found: re.Match[str], risk: re.Match[str], kind: str) -> bool:
    """Whether a suppressor found in the same sentence speaks of this very match."""
    touches = found.start() <= risk.end() + 1 and found.end() >= risk.start() - 1
    if touches or other.kind in ("idiom", "denial"):
        late = found.start() >= risk.end()
        negated = other.kind == "denial" and (late or NEGATION.search(risk[0]))
        return touches and not negated and (other.kind != "recovered" or _is_past(risk))
    if other.kind == "recovered":
        return _is_past(risk)
    if not FIRST_PERSON.search(risk[0]):
        return kind != "means_seeking"
    low, high = _around(risk.string, *risk.span(), CLAUSE_END)
    return found.start() >= low and found.end() <= high


def _spared(risk: re.Match[str], kind: str) -> bool:
    """Whether a suppressor takes this one match back; other matches of the message stand."""
    sentence, whole = _around(risk.string, *risk.span(), SENTENCE_END), {"denial": (0,)}
    return any(
        _takes_back(other, found, risk, kind)
        for other in INPUT_SUPPRESSORS
        for found in other.pattern.finditer(risk.string, *whole.get(other.kind, sentence))
    )


def find(plain: str) -> dict[Rule, bool]:
    """The rules that match a plain text; False where every match is taken back."""
    found = ((rule, list(rule.pattern.finditer(plain))) for rule in INPUT_RULES)
    return {r: any(not _spared(m, r.kind) for m in matches) for r, matches in found if matches}


# The classifier: bias, scale and threshold, then one signed byte for each bucket.
_head, _packed = WEIGHTS_FILE.read_bytes().split(b"\n", 1)
HEAD, WEIGHTS = json.loads(_head), memoryview(zlib.decompress(_packed)).cast("b")
TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W_]+|[!?.,]")
CONCEPTS = {w: row["concept"] for row in _read_table(WORDS_FILE) for w in row["words"].split()}
PIECE = re.compile(r"(?:[^\s.!?。！？]+\s*){1,24}[.!?。！？]*")
BUCKETS = 2**18
CERTAIN = "plain_"  # a rule so named flags by itself: the first person, the present, not negated
AT_ONCE = 2.0  # what other direct phrases add; the rest of the words may speak against them
SURER = 1.0  # how much surer the classifier must be where a denial or an idiom took a match back
PIECEMEAL = 3.0  # and where it sees one sentence of a long message alone


def features(plain: str, found: dict[Rule, bool]) -> dict[int, float]:
    """What the classifier sees of a plain text: runs of words and characters, concepts, rules.

    A concept stands for words of one meaning (`safety_words.tsv`): "mum" and "brother" are `kin`.

    Args:
        plain: as `normalise` gives it.
        found: the rules that match, False where they were taken back.

    Returns:
        Bucket (0 to `BUCKETS` - 1) to value; each set of runs together has length 1.
    """
    words = ["<", *TOKEN.findall(plain), ">"]
    line, values = f"<{' '.join(words[1:-1])}>", dict[int, float]()
    means = [c for word in words if (c := CONCEPTS.get(word) or word * (word in ".!?"))]
    plain_means = [c for c in means if c not in ".!?"]
    pairs = {f"p{a} {b}" for i, a in enumerate(plain_means) for b in plain_means[i + 1 : i + 7]}
    parts = {"c" + line[i : i + n] for n in (3, 4, 5) for i in range(len(line) - n + 1)}
    rules = {f"r {stands} {name}" for r, stands in found.items() for name in (r.id, r.kind)}
    every = _runs(words, ""), parts, _runs(means, "k") | pairs
    sets = [(names, len(names) ** -0.5) for names in every if names] + [(rules, 0.4)]
    for name, value in ((name, value) for names, value in sets for name in names):
        bucket = zlib.crc32(name.encode()) % BUCKETS
        values[bucket] = values.get(bucket, 0.0) + value
    return values


def _runs(words: list[str], mark: str) -> set[str]:
    """All runs of one to three words."""
    return {mark + " ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}


def pieces(plain: str) -> list[str]:
    """The whole text, then its sentences if there are several; at most 24 words each.

    Example:
        >>> pieces("i am fine")    # one sentence: the whole text alone
        ['i am fine']
    """
    several = [piece.strip() for piece in PIECE.findall(plain) if len(piece) > 12]
    return [plain, *several] if len(several) > 1 else [plain]


def finds(plain: str) -> dict[str, dict[Rule, bool]]:
    """What the rules find in each of the `pieces`; what the whole takes back, its pieces do, too.

    Example:
        >>> finds("i am fine")
        {'i am fine': {}}
    """
    whole, *parts = pieces(plain)
    first = find(whole)
    back = {rule for rule, stands in first.items() if not stands}
    return {whole: first} | {p: {r: s and r not in back for r, s in find(p).items()} for p in parts}


def lean(found: dict[Rule, bool], piece: bool) -> float:
    """What is added to the classifier's score: for direct phrases, what was taken back, a piece.

    Example:
        >>> lean({}, piece=False)    # no rule spoke, and it is the whole text
        0.0
    """
    if not piece and any(stands and rule.id.startswith(CERTAIN) for rule, stands in found.items()):
        return float("inf")
    kinds = {rule.kind for rule, stands in found.items() if stands}
    return AT_ONCE * bool(kinds & {*ALWAYS}) - SURER * bool(found and not kinds) - PIECEMEAL * piece


def _screen(text: str) -> Screen:
    """Screen one text by itself, as a whole and by its sentences."""
    found = finds(normalise(text))
    whole = next(iter(found))
    scores = (
        HEAD["scale"] * sum(WEIGHTS[bucket] * value for bucket, value in features(p, f).items())
        + lean(f, p is not whole)
        for p, f in found.items()
    )
    chosen = any(score + HEAD["bias"] > HEAD["threshold"] for score in scores)
    standing = [rule for rule, stands in found[whole].items() if stands]
    ids = tuple(rule.id for rule in standing)
    kinds = tuple(dict.fromkeys(rule.kind for rule in standing)) or ("classifier",)
    return Screen(True, kinds, (*ids, "classifier")) if chosen else Screen(False, (), ids)


def screen_input(text: str, history: Sequence[str] = ()) -> Screen:
    """Look for a sign of danger in each message and in any three that follow one another.

    An earlier flagged message keeps the conversation flagged, whatever is said later.

    Args:
        text: what the person typed now.
        history: the same person's earlier messages, oldest first.

    Returns:
        A `Screen`; not a risk score, and no proof of safety when nothing is found.

    Example:
        >>> screen_input("This traffic makes me want to die lol").flag
        False
        >>> screen_input("I'm fine, just joking", ["I want to die"]).kinds
        ('direct',)
    """
    turns = [*history, text]
    joined = [" ".join(turns[max(0, n - 2) : n + 1]) for n in range(1, len(turns))]
    found = [_screen(turn) for turn in turns + joined]
    kinds = dict.fromkeys(kind for screen in found for kind in screen.kinds)
    ids = dict.fromkeys(name for screen in found for name in screen.rule_ids)
    return Screen(any(screen.flag for screen in found), tuple(kinds), tuple(ids))


NUMBER = re.compile(r"(?<![\w.,])\+?\(?\d(?:[ ()./-]{0,2}\d){2,}(?!\w)")
YEAR = re.compile(r"(?:1[89]|20)\d\d(?:-(?:1[89]|20)?\d\d)?")
CALL = re.compile(r"(?i:call|dial|text|phone|ring|number|line|contact|tel\w*|sms)\b.{0,40}$")
LINK = re.compile(
    r"(?:https?://|www\.)\S+|\b[\w.-]+\.(?:com|org|net|uk|gov|edu|info|io|in|ca|au)\b"
)


def _foreign_contacts(text: str) -> Iterator[str]:
    """The ids of checks that a link or a telephone number outside `HELPLINES` trips."""
    hosts = {re.sub(r"https?://|www\.", "", line.url) for line in HELPLINES} - {""}
    for found in LINK.finditer(text.casefold()):
        host = re.sub(r"https?://|www\.", "", found[0]).split("/")[0].rstrip(".,;:!?)\"'")
        if host not in hosts:
            yield "out_link"
    known = {line.number.replace(" ", "") for line in HELPLINES}
    for found in NUMBER.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        dialled = len(digits) >= 7 or CALL.search(text[: found.start()])
        if dialled and digits not in known and not YEAR.fullmatch(found[0]):
            yield "out_number"


def screen_output(text: str) -> Screen:
    """Look for what a model must not say here: means, doses, diagnoses, false claims, numbers.

    Args:
        text: a sentence or a whole answer of the model.

    Returns:
        A `Screen` of kind `output`; the caller shows `BLOCKED_REPLY` when it is flagged.

    Example:
        >>> screen_output("Do not stop your medicine without talking to your doctor.").flag
        False
        >>> screen_output("You can stop taking your medicine now.").flag
        True
    """
    plain = normalise(text)
    ids = [rule.id for rule in OUTPUT_RULES if rule.pattern.search(plain)]
    ids += dict.fromkeys(_foreign_contacts(unicodedata.normalize("NFKC", text)))
    return Screen(bool(ids), ("output",) if ids else (), tuple(ids))


def crisis_reply(kinds: Sequence[str]) -> str:
    """The fixed text that stands in for the model when a message is flagged.

    Args:
        kinds: the kinds of the `Screen`; only `third_person` gets the text for a worried other.

    Returns:
        What the chat shows, with the helplines of `HELPLINES`.

    Example:
        >>> crisis_reply(["third_person"]).startswith("Thank you for looking out")
        True
    """
    rows = "\n".join(
        f"- {' '.join(filter(None, (line.name, line.number)))} ({line.region})"
        + (f": {line.url}" if line.url else "")
        for line in HELPLINES
    )
    name = "for_another" if set(kinds) == {"third_person"} else "for_you"
    return f"{REPLIES[name]}\n\n{rows}"
