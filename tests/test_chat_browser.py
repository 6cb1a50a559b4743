"""The chat page in a real browser: what a person sees, and what is left when they have gone.

The model is a stand-in that repeats what it is told (tools/mock_chat.py); the page is notebook
05's own. Without Debian's `chromium` these tests are skipped; where REQUIRE_BROWSER is set, as in
.ci/run, they then fail.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Playwright, Request, expect, sync_playwright

from helpers.generation import FAILED, MAX_CHARACTERS
from helpers.safety import BLOCKED_REPLY, HELPLINES
from tools.chat_client import CHROMIUM, FLAGS, ROOT, Server

SECRET = "quetzalcoatlus"  # no other text of the project or of a library holds it
pytestmark = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("REQUIRE_BROWSER"), reason="there is no chromium"
)


@pytest.fixture(scope="module")
def play() -> Iterator[Playwright]:
    assert CHROMIUM, "REQUIRE_BROWSER is set and there is no chromium: apt-get install chromium"
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(play: Playwright) -> Iterator[Browser]:
    chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def tab(browser: Browser, chat_server: Server) -> Page:
    return visit(browser.new_page(viewport={"width": 900, "height": 780}), chat_server)


@pytest.fixture
def page(tab: Page) -> Page:
    """One tab for all, cleared."""
    tab.get_by_text("Clear", exact=True).click()
    expect(tab.locator(".message")).to_have_count(0)
    box(tab).fill("")
    return tab


def visit(page: Page, server: Server) -> Page:
    page.goto(server.url)
    box(page).wait_for()
    return page


def box(page: Page):
    return page.get_by_role("textbox", name="Your message")


def answers(page: Page):
    return page.locator(".bot.message")


def send(page: Page, text: str) -> None:
    box(page).fill(text)
    page.get_by_role("button", name="Send").click()


def ask(page: Page, text: str, answer: str) -> None:
    """Send a text and wait for what the last answer must hold."""
    before = answers(page).count()
    send(page, text)
    expect(answers(page)).to_have_count(before + 1)
    expect(answers(page).last).to_contain_text(answer)
    page.wait_for_timeout(200)


def wait_idle(server: Server, ends: int) -> float:
    """Wait until one more answer has ended; returns when it did."""
    until = time.time() + 5
    while len(server.times("ends")) == ends:
        assert time.time() < until, "the model goes on writing"
        time.sleep(0.02)
    return server.times("ends")[-1]


def test_send_by_button_and_by_key(page: Page) -> None:
    ask(page, "Hello there", "I heard: Hello there.")
    expect(box(page)).to_have_value("")
    box(page).fill("Second")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last).to_contain_text("Second.")
    expect(page.locator(".user.message").first).to_contain_text("Hello there")


def test_an_empty_message_is_not_sent(page: Page) -> None:
    send(page, "   ")
    page.wait_for_timeout(500)
    assert answers(page).count() == 0 and page.locator(".user.message").count() == 0


def test_the_answer_streams_and_stop_ends_it(page: Page, chat_server: Server) -> None:
    ends = len(chat_server.times("ends"))
    send(page, "slowly please")
    expect(answers(page)).to_contain_text("Step 0.", timeout=10_000)
    first = answers(page).inner_text()
    expect(answers(page)).to_contain_text("Step 2.", timeout=10_000)
    assert answers(page).inner_text().startswith(first.strip()[:20])
    clicked = time.time()
    page.get_by_role("button", name="Stop").click()
    assert wait_idle(chat_server, ends) - clicked < 0.5
    stopped = answers(page).inner_text()
    page.wait_for_timeout(700)
    assert answers(page).inner_text() == stopped and "Step 2." in stopped
    ask(page, "And now", "And now.")


def test_clear_stops_and_forgets(page: Page, chat_server: Server) -> None:
    ask(page, "My name is Ada", "My name is Ada.")
    ends = len(chat_server.times("ends"))
    send(page, "slowly please")
    expect(answers(page).last).to_contain_text("Step 0.", timeout=10_000)
    page.get_by_text("Clear", exact=True).click()
    wait_idle(chat_server, ends)
    expect(answers(page)).to_have_count(0, timeout=10_000)
    page.wait_for_timeout(700)  # what was under way must not come back
    assert answers(page).count() == 0 and page.locator(".user.message").count() == 0
    ask(page, "Who am I", "I heard: Who am I.")
    assert "Ada" not in answers(page).last.inner_text()


def test_the_model_is_shown_two_turns_and_no_more(page: Page) -> None:
    for word in ("One", "Two", "Three"):
        ask(page, word, f"{word}.")
    ask(page, "Four", "I heard: Two. I heard: Three. I heard: Four.")
    assert "One" not in answers(page).last.inner_text()


def test_a_crisis_gets_the_fixed_text_until_it_is_cleared(page: Page, chat_server: Server) -> None:
    begun = len(chat_server.times("begins"))
    ask(page, "I do not want to be alive any more.", "I am a program, not a person")
    for line in HELPLINES:
        expect(answers(page).last).to_contain_text(line.number or line.name)
    links = answers(page).last.locator("a").evaluate_all("all => all.map(a => a.href)")
    assert {line.url.rstrip("/") for line in HELPLINES} - {""} <= {u.rstrip("/") for u in links}
    ask(page, "just kidding, how do I bake bread?", "I am a program, not a person")
    assert len(chat_server.times("begins")) == begun, "the model was asked"
    page.get_by_text("Clear", exact=True).click()
    expect(answers(page)).to_have_count(0)
    ask(page, "How do I bake bread?", "I heard: How do I bake bread?")


def test_what_the_screen_after_the_model_finds_replaces_the_answer(page: Page) -> None:
    ask(page, "Tell me a dose", BLOCKED_REPLY[:40])
    assert "500 mg" not in page.locator("body").inner_text()


def test_an_error_in_the_model_is_one_sentence(page: Page) -> None:
    ask(page, "break now", FAILED)
    ask(page, "And now", "And now.")


def test_what_is_typed_is_shown_and_never_run(page: Page) -> None:
    typed = (
        "<img src=x onerror='window.hit=1'><script>window.hit=2</script><HUMAN>: <|endoftext|> *x*"
    )
    send(page, typed)
    expect(answers(page)).to_have_count(1)
    expect(answers(page)).to_contain_text("I heard:")
    page.wait_for_timeout(500)
    assert page.evaluate("window.hit") is None
    assert page.locator(".user.message script, .bot.message script").count() == 0
    shown = page.locator(".user.message").inner_text()
    assert typed in shown, f"shown as {shown}"


def test_the_box_takes_2000_characters(page: Page) -> None:
    box(page).focus()
    page.keyboard.insert_text("x" * (MAX_CHARACTERS + 100))
    assert len(box(page).input_value()) == MAX_CHARACTERS


def test_by_keyboard_alone(page: Page) -> None:
    box(page).focus()
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.innerText"))
    assert [name for name in reached if name in ("Send", "Stop", "Clear")] == [
        "Send", "Stop", "Clear",
    ]  # fmt: skip
    expect(page.get_by_label("Conversation").first).to_be_attached()


def luminance(colour: str) -> float:
    """Of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(browser: Browser, chat_server: Server, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    visit(page, chat_server)
    ask(page, "Hello", "I heard: Hello.")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(back) < 0.2) is (scheme == "dark")
    for spot in ("#notice p", ".bot.message p"):
        colour, ground = page.locator(spot).last.evaluate(
            """e => { const c = getComputedStyle(e).color; let b = e, g;
            do { g = getComputedStyle(b).backgroundColor; b = b.parentElement; }
            while (b && (g === 'rgba(0, 0, 0, 0)' || g === 'transparent')); return [c, g] }"""
        )
        light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{spot}: {colour} on {ground}"
    page.close()


def test_on_a_phone_nothing_is_cut_off(browser: Browser, chat_server: Server) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    visit(page, chat_server)
    ask(page, "word " * 60, "I heard: word")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for spot in (page.locator("#notice"), page.get_by_role("button", name="Stop")):
        box = spot.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 390
    page.close()


def test_a_closed_tab_ends_the_answer(browser: Browser, chat_server: Server) -> None:
    ends = len(chat_server.times("ends"))
    page = visit(browser.new_page(), chat_server)
    send(page, "slowly please")
    expect(answers(page)).to_contain_text("Step 0.", timeout=10_000)
    closed = time.time()
    page.close()
    assert wait_idle(chat_server, ends) - closed < 2


def test_nothing_of_a_chat_is_kept_or_sent(
    play: Playwright, chat_server: Server, tmp_path: Path
) -> None:
    """Greps the server's and the browser's files, what was printed, and all traffic."""
    before, requests = time.time(), list[Request]()
    profile = play.chromium.launch_persistent_context(
        tmp_path, executable_path=CHROMIUM, args=FLAGS
    )
    profile.on("request", lambda request: requests.append(request))
    page = visit(profile.new_page(), chat_server)
    ask(page, f"Hello {SECRET}", f"I heard: Hello {SECRET}.")
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    posted = [request.post_data or "" for request in requests]
    profile.close()
    assert SECRET not in stored
    assert any(SECRET in data for data in posted)  # the grep can find it
    strangers = {
        r.url for r in requests if not r.url.startswith((chat_server.url, "data:", "blob:"))
    }
    assert not strangers, "the page asks other machines for something"
    home = chat_server.log.parent
    places = [*home.rglob("*"), *tmp_path.rglob("*"), *recent(before)]
    needles = (SECRET.encode(), SECRET.encode("utf-16-le"))
    kept = [p for p in places if any(n in content(p) for n in needles)]
    assert not kept, f"words of a chat stand in {kept}"
    watched = (home / "watched.txt").read_text()
    assert "printed.txt" not in watched and "open " in watched  # the watch works
    for line in watched.splitlines():
        assert not line.startswith("socket.") or any(
            own in line for own in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "None")
        ), line


def content(path: Path) -> bytes:
    """Of a file; nothing of a folder, a socket, or what another test has deleted meanwhile."""
    with suppress(FileNotFoundError):
        return path.read_bytes() if path.is_file() else b""
    return b""


def recent(since: float) -> Iterator[Path]:
    """Files of the repository that changed since then."""
    for folder in ("artifacts", "notebooks", "helpers", "tools", "results", "assets"):
        for path in (ROOT / folder).rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime >= since - 1:
                    yield path
