"""Measure the chat page: ten users at once, the first sentence, Stop.

    python tools/measure_chat.py

Load is measured with the stand-in of tools/mock_chat.py, which repeats what it hears, so that a
mixed-up answer can be told; speed and Stop with the tiny Falcon and its embedded adapter. Writes
results/<machine>/chat.json; no word of a chat is kept.
"""

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.chat_client import MOCK, Server, call, find_respond, said, serve
from tools.results import write_result

QUESTIONS = (
    "How can I sleep better?",
    "What is stress?",
    "I feel lonely since I moved. What can I do?",
    "How do I stop worrying about exams?",
    "What helps against a low mood?",
)


def load(server: Server, users: int = 10, each: int = 10) -> dict[str, float]:
    """Let users talk at once, each with words of their own.

    Args:
        server: that runs the stand-in.
        users: how many at once.
        each: messages of each.

    Returns:
        sent, lost (no answer, or "busy"), mixed (another's words), seconds in all, and the median
        and the longest time to an answer in seconds.
    """
    respond, times = find_respond(server.url), []

    def talk(user: int) -> list[tuple[str, str]]:
        heard, history = [], []
        for n in range(each):
            text, began = f"user {user} question {n}", time.monotonic()
            answer = call(server.url, said(*history[-4:], text), respond)
            times.append(time.monotonic() - began)
            heard.append((f"I heard: {text}." if not n else f"{text}.", answer))
            history += [text, answer]
        return heard

    began = time.monotonic()
    with ThreadPoolExecutor(users) as pool:
        heard = list(pool.map(talk, range(users)))
    mixed = sum(
        f"user {other} " in answer
        for user, pairs in enumerate(heard)
        for _, answer in pairs
        for other in range(users)
        if other != user
    )
    return {
        "users": users,
        "sent": users * each,
        "lost": sum(not answer.endswith(end) for pairs in heard for end, answer in pairs),
        "mixed": mixed,
        "seconds": time.monotonic() - began,
        "answer_seconds_median": statistics.median(times),
        "answer_seconds_longest": max(times),
    }


def speak() -> dict[str, Any]:
    """Seconds to the first sentence and to the end, and how long Stop takes, on the tiny Falcon."""
    import torch
    from peft import PeftModel

    from helpers.falcon import load_falcon, load_tokenizer, use_fused_attention
    from helpers.generation import Chat, sampling, stream_reply
    from helpers.profiles import detect_profile

    profile = detect_profile("cpu")
    base = load_falcon(profile.model, profile)
    use_fused_attention(base)
    model = PeftModel.from_pretrained(base, profile.adapter).eval()
    tokenizer = load_tokenizer(profile.model)
    chat = Chat(model, tokenizer, sampling(tokenizer))
    torch.manual_seed(0)
    first, whole, stop = [], [], []
    for question in QUESTIONS:
        began, seen = time.monotonic(), None
        for text in stream_reply(chat, question):
            if text and seen is None:
                seen = time.monotonic() - began
        first.append(seen or 0.0)
        whole.append(time.monotonic() - began)
        stream = stream_reply(chat, question)
        for _ in range(3):
            next(stream)
        began = time.monotonic()
        stream.close()
        stop.append(time.monotonic() - began)
    names = ("first_sentence_seconds", "whole_answer_seconds", "stop_seconds")
    return {
        name: {"value": statistics.median(t), "low": min(t), "high": max(t), "n": len(t)}
        for name, t in zip(names, (first, whole, stop), strict=True)
    }


def main() -> None:
    """Measure both, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        with serve(MOCK, Path(folder) / "printed.txt") as server:
            figures: dict[str, Any] = {"load": load(server)}
            figures["load"]["answers_at_once"] = server.at_once()
    figures["tiny_falcon"] = speak()
    print(figures)
    figure = "the chat page under load; low and high of the seconds are the least and the most"
    write_result("chat", figures, figure, "python tools/measure_chat.py")


if __name__ == "__main__":
    main()
