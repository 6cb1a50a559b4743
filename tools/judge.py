"""Page 04's blind form: two answers to each question, A or B, and a sign test at the end."""

import random
import sys
from collections.abc import Sequence
from html import escape
from typing import Any

from helpers.evaluation import sign_test
from helpers.prompts import post_process_chat

CHOICES = ("A", "B", "neither")


def blind_pairs(
    questions: Sequence[str], first: Sequence[Any], second: Sequence[Any], seed: int = 0
) -> list[dict[str, Any]]:
    """Shuffle pairs of answers, and inside each pair which of the two is called A.

    Args:
        questions: (n,) str.
        first: (n,) raw answers of one side, such as the adapter, with `.text` and `.finished`;
            each is cleaned as in the chat, so that no invented turn gives its writer away.
        second: (n,) raw answers of the other.
        seed: of both shuffles.

    Returns:
        (n,) dictionaries: question, A, B, and `first`, the letter under which the first side
        stands; nothing shows it before the end.

    Raises:
        ValueError: if there is no pair, lengths differ, or an answer is empty.

    Example:
        >>> from types import SimpleNamespace as Said
        >>> one, two = Said(text="So.", finished=True), Said(text="Hm.", finished=True)
        >>> pair = blind_pairs(["Why?"], [one], [two])[0]
        >>> pair[pair["first"]]
        'So.'
    """
    if not questions or not len(questions) == len(first) == len(second):
        sizes = f"{len(questions)} questions with {len(first)} and {len(second)} answers"
        raise ValueError(f"{sizes} make no pairs: give two answers to each question")
    for question, *answers in zip(questions, first, second, strict=True):
        if not all(answer.text.strip() for answer in answers):
            raise ValueError(f"an answer to {question!r} is empty: leave that question out")
    rng, pairs = random.Random(seed), []
    for question, one, two in zip(questions, first, second, strict=True):
        letter = rng.choice("AB")
        other = "B" if letter == "A" else "A"
        one, two = (post_process_chat(answer.text, answer.finished) for answer in (one, two))
        pairs.append({"question": question, letter: one, other: two, "first": letter})
    rng.shuffle(pairs)
    return pairs


def sentence(pairs: Sequence[dict], choices: Sequence[str], names: tuple[str, str]) -> str:
    """Say which side was preferred, and whether a fair coin could have said the same.

    Args:
        pairs: as from `blind_pairs`.
        choices: "A", "B" or "neither" for the first of them, in order.
        names: of the first and the second side.

    Returns:
        One sentence or two.

    Example:
        >>> pairs = [{"first": "A"}, {"first": "B"}, {"first": "A"}]
        >>> sentence(pairs, ["A", "B", "neither"], ("adapter", "base"))
        'adapter 2, base 0, neither 1: a fair coin does as much with p = 0.5, so nothing is shown.'
    """
    judged = list(zip(pairs, choices, strict=False))
    wins = sum(choice == pair["first"] for pair, choice in judged)
    ties = sum(choice == "neither" for _, choice in judged)
    lost = len(judged) - wins - ties
    counts = f"{names[0]} {wins}, {names[1]} {lost}, neither {ties}"
    if not wins + lost:
        return f"{counts}: no pair was decided, so there is nothing to test."
    p = sign_test(wins, lost)["p"]
    if p >= 0.05:
        return f"{counts}: a fair coin does as much with p = {p:.2g}, so nothing is shown."
    better = names[0] if wins > lost else names[1]
    return f"{counts}: you preferred the {better}, and a fair coin would hardly (p = {p:.2g})."


def step(
    pairs: Sequence[dict], choices: Sequence[str], choice: str, names: tuple[str, str]
) -> tuple[list[str], str]:
    """One press of a button: the choices so far, and what the form shows next.

    Args:
        pairs, names: as for `sentence`.
        choices: made before.
        choice: made now; anything but A, B or neither, and any after the last pair, is ignored.

    Returns:
        choices, and Markdown: the next pair, or the result.

    Example:
        >>> step([{"question": "Why?", "A": "So.", "B": "Hm.", "first": "A"}], [], "A", ("x", "y"))
        (['A'], 'x 1, y 0, neither 0: a fair coin does as much with p = 1, so nothing is shown.')
    """
    made = [*choices]
    if choice in CHOICES and len(made) < len(pairs):
        made.append(choice)
    if len(made) == len(pairs):
        return made, sentence(pairs, made, names)
    return made, pair_text(pairs[len(made)], len(made) + 1, len(pairs))


def pair_text(pair: dict, number: int, total: int, markdown: bool = True) -> str:
    """One pair as Markdown, typed tags and all shown as text; or as plain text, for a print.

    Example:
        >>> pair_text({"question": "Why?", "A": "So.", "B": "<b>"}, 1, 18).splitlines()[-1]
        '**B.** &lt;b&gt;'
        >>> pair_text({"question": "Why?", "A": "So.", "B": "<b>"}, 1, 18, False).splitlines()[-1]
        'B. <b>'
    """
    said = {key: pair[key].strip() for key in ("question", "A", "B")}
    said = {key: escape(text) for key, text in said.items()} if markdown else said
    bold = "**" * markdown
    head = f"{number} of {total}: {bold}{said['question']}{bold}"
    return "\n\n".join([head, *(f"{bold}{key}.{bold} {said[key]}" for key in "AB")])


def judge_page(pairs: Sequence[dict], names: tuple[str, str]) -> Any:
    """The form. Choices lie in the page's own session and go nowhere else.

    Args:
        pairs: as from `blind_pairs`.
        names: of the first and the second side, shown with the result alone.

    Returns:
        A `gradio.Blocks`, not launched.
    """
    import os

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    with gr.Blocks(title="You are the judge") as page:
        gr.Markdown("Answers of a computer program, none of them advice. Which is better?")
        choices, text = gr.State([]), gr.Markdown(step(pairs, [], "", names)[1])
        with gr.Row():
            for choice in CHOICES:
                button = gr.Button(choice)
                button.click(
                    lambda made, choice=choice: step(pairs, made, choice, names),
                    choices, [choices, text], api_visibility="private",
                )  # fmt: skip
    return page


def open_form(pairs: Sequence[dict], names: tuple[str, str], serve: bool) -> str:
    """Open the form beside a running page, if asked to; a page that is only read gets a sample.

    Args:
        pairs, names: as for `judge_page`.
        serve: True starts the form on this machine alone, and does not wait for it.

    Returns:
        The first pair as text with its solution under it; or where the form is.
    """
    if serve:
        page, colab = judge_page(pairs, names), "google.colab" in sys.modules
        _, address, _ = page.launch(
            share=False, quiet=True, prevent_thread_lock=True, server_name="127.0.0.1",
            inline=colab, enable_monitoring=False, ssr_mode=False, footer_links=[],
        )  # fmt: skip
        return f"the form is open at {address}"
    text = pair_text(pairs[0], 1, len(pairs), markdown=False)
    return f"{text}\n\nWhich would you rather read? ... {pairs[0]['first']} is the {names[0]}'s."
