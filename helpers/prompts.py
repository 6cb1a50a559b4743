"""Text in, text out: the dialogue format, shared by training, generation and the chat."""

import re

HUMAN = "<HUMAN>:"
ASSISTANT = "<ASSISTANT>:"

SYSTEM_PROMPT = (
    "Answer the following question truthfully. If you do not know the answer, say so. "
    "If the question is too hard, say that a psychiatrist should be asked."
)
"""The article's chat put such an instruction before the question; the training text has none.
Page 04 passes it as `system`, to see what it changes."""

FALLBACK = "I could not find words for an answer. Could you ask in another way?"

ROLE_TAG = re.compile(r"<\s*/?\s*(HUMAN|ASSISTANT)\s*>", re.IGNORECASE)
SPECIAL_TOKEN = re.compile(r"<\|(\w+)\|>|>>([A-Z]+)<<")
HALF_TAG = re.compile(
    r"<\s*(?:H(?:U(?:M(?:AN?)?)?)?|A(?:S(?:S(?:I(?:S(?:T(?:A(?:NT?)?)?)?)?)?)?)?)?$"
)
SENTENCE = re.compile(r"(?:[.!?…]+[\"')\]”’]*|[。！？]+[」』”’]*)(?=\s|$|[^\x00-\x7f])")
ABBREVIATION = re.compile(
    r"(?:\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|etc|approx|no)|\b[A-Za-z]\.[A-Za-z])\.$", re.IGNORECASE
)
LIST_NUMBER = re.compile(r"(?:^|\n|\s)\d{1,2}[.)]$")


def format_prompt(
    question: str, history: list[tuple[str, str]] | tuple = (), system: str = ""
) -> str:
    """Write a question, and the turns before it, as the text the model was trained on.

    The prompt ends in the bare tag, without a space: with Falcon's tokenizer
    `<ASSISTANT>: ` and a space is not a token prefix of the training text, the bare tag is.

    Args:
        question: what the person asks, one turn.
        history: earlier turns as (question, answer) pairs, oldest first.
        system: an instruction before the dialogue; none in the training text.

    Returns:
        The prompt, without the end-of-text token.

    Raises:
        ValueError: if the question is empty.

    Example:
        >>> format_prompt("How are you?", [("Hi", "Hello.")])
        '<HUMAN>: Hi\\n<ASSISTANT>: Hello.\\n<HUMAN>: How are you?\\n<ASSISTANT>:'
    """
    if not question.strip():
        raise ValueError("the question is empty: write at least one word")
    turns = [f"{HUMAN} {q.strip()}\n{ASSISTANT} {a.strip()}" for q, a in history]
    turns.append(f"{HUMAN} {question.strip()}\n{ASSISTANT}")
    return "\n".join(([system] if system else []) + turns)


def split_dialogue(text: str) -> tuple[str, str]:
    """Take one `<HUMAN>: … <ASSISTANT>: …` text apart into question and answer.

    Args:
        text: one dialogue of one turn, as in the data set's `text` column.

    Returns:
        (question, answer), both stripped of surrounding white space.

    Raises:
        ValueError: if a tag is missing, comes twice, or a part is empty.

    Example:
        >>> split_dialogue("<HUMAN>: What helps?\\n<ASSISTANT>: Sleep.")
        ('What helps?', 'Sleep.')
    """
    if text.count(HUMAN) != 1 or text.count(ASSISTANT) != 1:
        raise ValueError(f"without tags: expected one {HUMAN!r} and one {ASSISTANT!r}")
    question, answer = text.split(HUMAN)[1].split(ASSISTANT)[:2]
    if HUMAN in answer or not question.strip():
        raise ValueError("without a question: nothing stands between the two tags")
    if not answer.strip():
        raise ValueError(f"without an answer: nothing stands after {ASSISTANT!r}")
    return question.strip(), answer.strip()


def neutralise(text: str) -> str:
    """Make role tags and special tokens that a person typed harmless to the prompt.

    It is no cleaning for the screen: the page shows what was typed, the model gets this.

    Args:
        text: what a person typed.

    Returns:
        The same text with `<HUMAN>`, `<ASSISTANT>`, `<|endoftext|>` and Falcon's `>>TITLE<<`
        family in round brackets, which the tokenizer reads as ordinary text.

    Example:
        >>> neutralise("<HUMAN>: hi <|endoftext|> >>TITLE<<")
        '(HUMAN): hi (endoftext) (TITLE)'
    """
    previous = None
    while previous != text:  # replacing one tag may close another around it
        previous = text
        text = ROLE_TAG.sub(lambda m: f"({m[1].upper()})", text)
        text = SPECIAL_TOKEN.sub(lambda m: f"({m[1] or m[2]})", text)
    return text


def _whole_sentences(text: str) -> str:
    """The text up to its last full sentence; all of it when it has none."""
    ends = [m.end() for m in SENTENCE.finditer(text)]
    for end in reversed(ends):
        head = text[:end]
        if not (ABBREVIATION.search(head) and end < len(text)) and not LIST_NUMBER.search(head):
            return head
    return text


def _without_repeats(text: str) -> str:
    """Drop sentences that follow their own copy, the commonest way a small model gets stuck."""
    parts = re.split(r"(?<=[.!?。！？])(\s+)", text)
    kept: list[str] = []
    for sentence, space in zip(parts[::2], [*parts[1::2], ""], strict=True):
        if kept and len(sentence) > 3 and sentence == kept[-2]:
            kept[-1] = space
            continue
        kept += [sentence, space]
    return "".join(kept)


def post_process_chat(text: str, finished: bool) -> str:
    """Turn what the model wrote into one answer fit to show.

    Cuts at the first invented turn (half a tag at the end counts), drops special tokens and
    repeated sentences, and, if the model ran into the token limit, cuts back to the last
    whole sentence, so that no list ends in the middle of an item. Idempotent.

    Args:
        text: the generated text after the prompt.
        finished: True if the model stopped by itself; then a missing full stop is its own
            choice and stays.

    Returns:
        The answer, or `FALLBACK` if nothing is left.

    Example:
        >>> post_process_chat(" Rest well. Talk to\\n<HUMAN>: And", finished=False)
        'Rest well.'
        >>> post_process_chat("Rest well", finished=True)
        'Rest well'
    """
    tag = ROLE_TAG.search(text)
    if tag:
        text, finished = text[: tag.start()], False
    text = HALF_TAG.sub("", SPECIAL_TOKEN.sub("", text).rstrip())
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()
    text = _without_repeats(text)
    if not finished:
        text = _whole_sentences(text)
    text = re.sub(r"\n\s*(?:\d{1,2}[.)]|[-*•])\s*$", "", text).strip()
    return text or FALLBACK
