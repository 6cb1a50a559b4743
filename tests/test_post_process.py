"""What the chat makes of a raw answer: pairs of input and output, each also idempotent."""

import pytest

from helpers.prompts import FALLBACK, post_process_chat

PAIRS = [
    # a cut-off answer ends at its last whole sentence
    ("Rest helps. You could also try to", False, "Rest helps."),
    ("Is it new? Then ask a doctor. It may", False, "Is it new? Then ask a doctor."),
    ("no full stop in sight", False, "no full stop in sight"),
    # a finished answer keeps its own end
    ("Sleep well", True, "Sleep well"),
    ("Rest helps. Take care", True, "Rest helps. Take care"),
    # a list cut inside an item ends with the item before
    ("Try this:\n1. Walk.\n2. Sleep.\n3. Talk to a", False, "Try this:\n1. Walk.\n2. Sleep."),
    ("Try this:\n1. Walk.\n2. Sleep.\n3.", False, "Try this:\n1. Walk.\n2. Sleep."),
    ("Try:\n- Walk.\n- Sleep.\n-", True, "Try:\n- Walk.\n- Sleep."),
    # invented turns and half a marker
    ("Rest well.\n<HUMAN>: And then?\n<ASSISTANT>: Sleep.", True, "Rest well."),
    ("Rest well.\n<ASSISTANT>: Sleep.", True, "Rest well."),
    ("Rest well.\n<HUM", False, "Rest well."),
    ("Rest well.\n<", False, "Rest well."),
    ("Rest well.\n< human >: hi", True, "Rest well."),
    ("Rest well.<|endoftext|>", True, "Rest well."),
    # repeats
    ("Rest well. Rest well. Rest well.", True, "Rest well."),
    ("Rest well. Eat well. Rest well.", True, "Rest well. Eat well. Rest well."),
    # full stops that end nothing
    ("See a doctor. Dr. Rao can", False, "See a doctor."),
    ("Eat fruit, e.g. apples. Also, e.g. some", False, "Eat fruit, e.g. apples."),
    ("Sleep 7.5 hours. Some need 8.5 hours and", False, "Sleep 7.5 hours."),
    ("Look at https://findahelpline.com now. It lists www.a.org and", False,
     "Look at https://findahelpline.com now."),
    # other scripts, emoji, spaces
    ("好好休息。明天再", False, "好好休息。"),
    ("You are not alone. \U0001f499 Take", False, "You are not alone."),
    ("Well done! \U0001f499", True, "Well done! \U0001f499"),
    ("  One.\n\n\n\nTwo.  ", True, "One.\n\nTwo."),
    ('She said "rest." Then she', False, 'She said "rest."'),
    # nothing left
    ("", True, FALLBACK),
    ("  \n ", False, FALLBACK),
    ("<HUMAN>: hello", True, FALLBACK),
]  # fmt: skip


@pytest.mark.parametrize("raw, finished, shown", PAIRS)
def test_raw_answer_and_what_is_shown(raw: str, finished: bool, shown: str) -> None:
    assert post_process_chat(raw, finished) == shown


@pytest.mark.parametrize("raw, finished, shown", PAIRS)
def test_a_second_time_changes_nothing(raw: str, finished: bool, shown: str) -> None:
    once = post_process_chat(raw, finished)
    assert post_process_chat(once, finished) == once
