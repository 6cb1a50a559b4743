"""Take the picture of the chat page that notebook 05 and the README show.

    python tools/photograph_chat.py

Serves notebook 05 on this machine, asks two questions in headless Chromium (Debian's package
`chromium`), and writes docs/chat.png.
"""

import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PORT = 7871
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
QUESTIONS = ("I cannot sleep before exams. What can I do?", "I do not want to be alive any more.")


def serve(port: int = PORT) -> subprocess.Popen:
    """Start the chat page; returns once it answers.

    Raises:
        TimeoutError: if it does not within two minutes.
    """
    command = [
        sys.executable,
        "notebooks/py/05_gradio_chat.py",
        "SERVE=True",
        f"PORT={port}",
        "PROFILE=cpu",
    ]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    for _ in range(240):
        try:
            urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
            return server
        except (URLError, OSError):
            time.sleep(0.5)
    server.kill()
    raise TimeoutError("the chat page did not start within two minutes")


def ask(page: Page, question: str) -> None:
    """Type a question, send it, and wait until its answer is whole."""
    before = page.locator(".bot.message").count()
    page.get_by_label("Your message").fill(question)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".bot.message")).to_have_count(before + 1, timeout=60_000)
    text = ""
    while text != (now := page.locator(".bot.message").last.inner_text()) or not now.strip():
        text = now
        page.wait_for_timeout(1500)


def main() -> None:
    """Serve, ask, photograph."""
    server = serve()
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
            page = browser.new_page(viewport={"width": 900, "height": 780})
            page.goto(f"http://127.0.0.1:{PORT}/")
            for question in QUESTIONS:
                ask(page, question)
            page.wait_for_timeout(500)
            page.screenshot(path=str(ROOT / "docs/chat.png"))
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=20)


if __name__ == "__main__":
    main()
