"""Take the pictures of the chat page: docs/chat.png, which notebook 05 and the README show.

    python tools/photograph_chat.py [FOLDER]

Serves notebook 05 on this machine, asks two questions in headless Chromium (Debian's package
`chromium`), and takes the page in light, in dark and as wide as a phone. Only the first is kept in
docs/; the others go to FOLDER, if one is named, to be looked at.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.chat_client import CHROMIUM, FLAGS, TWIN, serve

QUESTIONS = ("I cannot sleep before exams. What can I do?", "I do not want to be alive any more.")
VIEWS = {
    "chat": {"viewport": {"width": 900, "height": 780}},
    "chat_dark": {"viewport": {"width": 900, "height": 780}, "color_scheme": "dark"},
    "chat_phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True},
}


def ask(page: Page, question: str) -> None:
    """Type a question, send it, and wait until its answer is whole."""
    before = page.locator(".bot.message").count()
    page.get_by_role("textbox", name="Your message").fill(question)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".bot.message")).to_have_count(before + 1, timeout=60_000)
    text = ""
    while text != (now := page.locator(".bot.message").last.inner_text()) or not now.strip():
        text = now
        page.wait_for_timeout(1500)


def main() -> None:
    """Serve, ask, photograph."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="takes the other two views")
    other = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as printed, sync_playwright() as play:
        with serve(TWIN, Path(printed) / "printed.txt") as server:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            for name, view in VIEWS.items():
                if name != "chat" and not other:
                    continue
                page = browser.new_page(**view)
                page.goto(server.url)
                for question in QUESTIONS:
                    ask(page, question)
                page.wait_for_timeout(500)
                folder = ROOT / "docs" if name == "chat" else other
                page.screenshot(path=str(folder / f"{name}.png"))
            browser.close()


if __name__ == "__main__":
    main()
