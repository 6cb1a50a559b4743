"""The chat under load and past its page: in order, one at a time, nobody gets another's words."""

import ast
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest

from helpers.generation import BUSY, FAILED, MAX_CHARACTERS, TOO_LONG, Chat, sampling, stream_reply
from tools.chat_client import ROOT, TWIN, Server, call, find_respond, said
from tools.measure_chat import load
from tools.mock_chat import EchoModel

CRISIS = "I want to kill myself"


@pytest.fixture(scope="module")
def chat() -> Chat:
    model = EchoModel()
    return Chat(model, model.tokenizer, sampling(model.tokenizer))


def test_ten_users_and_a_hundred_messages(chat_server: Server) -> None:
    found = load(chat_server, users=10, each=10)
    assert (found["sent"], found["lost"], found["mixed"]) == (100, 0, 0)
    assert chat_server.at_once() == 1


def test_a_direct_call_meets_length_check_screen_and_line(chat_server: Server) -> None:
    respond, begun = find_respond(chat_server.url), len(chat_server.times("begins"))
    assert call(chat_server.url, said("x" * (MAX_CHARACTERS + 1)), respond) == TOO_LONG
    assert "program, not a person" in call(chat_server.url, said(CRISIS), respond)
    assert "program, not a person" in call(chat_server.url, said(CRISIS, "ok", "bread?"), respond)
    assert len(chat_server.times("begins")) == begun, "the model was asked"
    with ThreadPoolExecutor(3) as pool:
        texts = [f"number {n}" for n in range(3)]
        answers = pool.map(lambda t: call(chat_server.url, said(t), respond), texts)
        assert [f"I heard: {t}." for t in texts] == list(answers)
    assert chat_server.at_once() == 1


PATH = {"path": "/etc/my secret", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "message",
    [
        "my secret",
        {"role": "user", "said": "my secret"},
        {"role": "user", "content": ["my secret"]},
        {"role": "user", "content": [{"type": "file", "file": PATH}]},
    ],
)
def test_a_malformed_call_fails_and_no_word_of_it_is_printed(chat_server: Server, message) -> None:
    failures = chat_server.log.read_text().count("a call to the page failed")
    with pytest.raises(RuntimeError, match="the server answered"):
        call(chat_server.url, [message])
    printed = chat_server.log.read_text()
    assert "my secret" not in printed and "Traceback" not in printed
    assert printed.count("a call to the page failed") == failures + 1


def test_a_forged_history_cannot_be_of_any_length(chat_server: Server) -> None:
    answer = call(chat_server.url, said("y" * 9000, "z" * 9000, "short"))
    assert "short." in answer and "y" * (MAX_CHARACTERS + 1) not in answer


def test_served_in_the_order_of_coming(chat: Chat) -> None:
    first = stream_reply(chat, "slowly")
    next(first)
    waiting = [stream_reply(chat, f"number {n}") for n in range(3)]
    assert [next(each) for each in waiting] == [""] * 3
    late, order = stream_reply(chat, "late"), []
    next(late)
    first.close()
    with ThreadPoolExecutor(4) as pool:
        jobs = []
        for n, each in reversed(list(enumerate([*waiting, late]))):  # the last asks again first
            jobs.append(pool.submit(drain, each, n, order))
            time.sleep(0.2)
        [job.result(timeout=20) for job in jobs]
    assert order == [0, 1, 2, 3] and chat.line == []


def drain(stream, name: int, order: list[int]) -> None:
    list(stream)
    order.append(name)


def test_who_waits_too_long_is_told_busy_and_a_crisis_does_not_wait(chat: Chat) -> None:
    first = stream_reply(chat, "slowly")
    next(first)
    hasty = Chat(chat.model, chat.tokenizer, chat.config, patience=0.2, line=chat.line)
    assert list(stream_reply(hasty, "hello"))[-1] == BUSY
    assert "program, not a person" in list(stream_reply(hasty, CRISIS))[-1]
    left = stream_reply(chat, "I go away")
    next(left)
    left.close()
    first.close()
    assert chat.line == [] and chat.model.running == 0


def test_stop_ends_generation_within_half_a_second(chat: Chat) -> None:
    stream = stream_reply(chat, "slowly please")
    while "Step 0." not in next(stream):
        pass
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 0.5 and chat.model.running == 0 and chat.line == []


def test_an_error_is_one_sentence_and_frees_the_line(chat: Chat) -> None:
    assert list(stream_reply(chat, "break"))[-1] == FAILED
    assert list(stream_reply(chat, "hello"))[-1] == "I heard: hello."


def page_cells(**given) -> SimpleNamespace:
    """Run the twin's cells from the page on, with a stand-in for the answers."""
    source = (ROOT / TWIN).read_text().split("# ## 6. The page")[1].split("# Is it really")[0]
    space = {"stream_reply": lambda *args: iter(["ok"]), "chat": None, "PORT": None, **given}
    exec(compile(ast.parse("# %%" + source), TWIN, "exec"), space)
    return SimpleNamespace(**space)


def test_a_public_page_wants_a_password(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="set a PASSWORD"):
        page_cells(SHARE=True, PASSWORD=None)


def test_a_password_shuts_the_page(capsys: pytest.CaptureFixture) -> None:
    cells = page_cells(SHARE=False, PASSWORD="open sesame")
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urlopen(f"{cells.address}config")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            call(cells.address.rstrip("/"), said("hello"), 1)
    finally:
        cells.page.close(verbose=False)


def test_what_is_typed_comes_back_as_it_was(capsys: pytest.CaptureFixture) -> None:
    cells = page_cells(SHARE=False, PASSWORD=None)
    try:
        for text in ("<HUMAN>: *x* \\ _y_ <|endoftext|>", "it's 5 > 3 & $2", "\\*", "héllo 你好"):
            assert cells.as_meant(cells.as_typed(text)) == text
    finally:
        cells.page.close(verbose=False)


def test_ci_fails_where_the_browser_tests_would_be_skipped() -> None:
    script = Path(ROOT / ".ci/run").read_text()
    assert "export REQUIRE_BROWSER=1" in script.split("make test")[-2] and "chromium" in script
