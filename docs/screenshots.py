"""Make the pictures of docs/page.md and docs/chat.md again, from a model with a reward model beside it.

    dpa export RUN --out MODEL --reward
    python docs/screenshots.py MODEL ["FIRST QUESTION" "SECOND QUESTION"] [--only taste]

It needs the extras `browser` and `serve`, a Chromium and tmux.
"""

import argparse
import contextlib
import html
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

DOCS: Final = Path(__file__).parent
FLAGS: Final = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
COLOURS: Final = {"31": "#ff8f8f", "33": "#e3b35c", "35": "#ea93cb", "36": "#7cc7ff"}
COLUMNS, LINES = 104, 50
KINDS: Final = ("page", "taste", "chat")
QUESTIONS: Final = ("What is a good way to start the day?", "What is the role of the kidneys?")


@contextlib.contextmanager
def server(model: Path) -> Iterator[str]:
    """`dpa serve` on a free port."""
    words = [sys.executable, "-m", "dpalign", "serve", str(model), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield running.stdout.readline().split()[-1]
        finally:
            running.terminate()


def shoot_page(browser: Any, url: str, questions: Sequence[str]) -> None:
    """The page on a desk in light and dark, and on a phone."""
    kinds = {
        "page": ((1280, 912), "light", "#a=0&b=-45"),
        "page-dark": ((1280, 800), "dark", "#a=-15&b=-60&best=4"),
        "page-phone": ((390, 844), "light", "#a=0&b=-45"),
    }
    for name, (size, light, address) in kinds.items():
        view = {"width": size[0], "height": size[1]}
        window = browser.new_context(viewport=view, color_scheme=light, device_scale_factor=1.5)
        page = window.new_page()
        page.goto(f"{url}/{address}")
        page.wait_for_selector("#send:enabled")
        for i, question in enumerate(questions if name == "page" else questions[-1:]):
            page.locator("#question").fill(question)
            page.keyboard.press("Enter")
            page.locator(".rating b").nth(2 * i + 1).wait_for()
            page.locator("#send:visible").wait_for()
        page.wait_for_timeout(600)
        if name == "page-phone":
            page.evaluate("scrollTo(0, 0)")
            page.evaluate("document.activeElement.blur()")
            page.wait_for_timeout(200)
        keep(page.screenshot(), name)
        window.close()


def shoot_taste(browser: Any, url: str, questions: Sequence[str]) -> None:
    """The page after two choices of the shorter answer: the reader's own direction, and how sure it is."""
    window = browser.new_context(viewport={"width": 1280, "height": 800}, device_scale_factor=1.5)
    page = window.new_page()
    page.goto(f"{url}/#a=0&b=-45")
    page.wait_for_selector("#send:enabled")
    for i, question in enumerate(questions):
        page.locator("#question").fill(question)
        page.keyboard.press("Enter")
        page.locator(".rating b").nth(2 * i + 1).wait_for()
        answers = page.locator(".turn:last-child .text").all_inner_texts()
        shorter = min((0, 1), key=lambda place: len(answers[place]))
        page.locator(".turn:last-child .prefer:enabled").nth(shorter).click()
        page.locator("#taste-words", has_text=f"after {i + 1} choice").wait_for()
    page.wait_for_timeout(600)
    keep(page.screenshot(), "taste")
    window.close()


def shoot_chat(browser: Any, model: Path, question: str) -> None:
    """A chat in a real terminal, and what it looked like."""
    typed = ["/dial -30", question, "/compare -45 0", "/best 4", "/retry"]
    screen = terminal(model, typed)
    page = browser.new_page(viewport={"width": 980, "height": 200}, device_scale_factor=1.5)
    page.set_content(
        "<style>body{margin:0;background:#16181d;color:#eceae6}"
        "pre{margin:0;padding:22px 26px;font:14px/1.32 'DejaVu Sans Mono',monospace;display:inline-block}</style>"
        f"<pre>{as_html(screen)}</pre>"
    )
    keep(page.locator("pre").screenshot(), "chat")
    page.close()


def terminal(model: Path, typed: list[str]) -> str:
    """The screen, with its escape codes, after these lines were typed into `dpa chat`."""
    name = f"dpa-{os.getpid()}"

    def tmux(*words: str) -> str:
        return subprocess.run(["tmux", "-L", name, *words], check=True, capture_output=True, text=True).stdout

    def marks() -> int:
        """Prompts of the chat so far, those that have scrolled off included."""
        return tmux("capture-pane", "-p", "-S", "-").count("\u276f")

    with tempfile.TemporaryDirectory() as folder:
        command = f"{sys.executable} -m dpalign chat '{model.resolve()}' --no-history"
        (Path(folder) / "start.sh").write_text(f"clear\nexec {command}\n")
        tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), "-c", folder, "sh start.sh")
        try:
            until(lambda: "says more" in tmux("capture-pane", "-p"))
            for line in typed:
                before = marks()
                tmux("send-keys", "-l", line)
                tmux("send-keys", "Enter")
                until(lambda before=before: marks() > before)
            return tmux("capture-pane", "-p", "-e").rstrip("\n")
        finally:
            tmux("kill-server")


def until(true: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError("the chat did not get there")
        time.sleep(0.2)


def as_html(screen: str) -> str:
    """Escape codes as spans; each stands until the next."""
    out, style = "", ""
    for part in re.split(r"(\x1b\[[\d;]*m)", screen):
        if found := re.fullmatch(r"\x1b\[([\d;]*)m", part):
            for code in (found[1] or "0").split(";"):
                if code in ("", "0", "39"):
                    style = "" if code != "39" else re.sub(r"color:[^;]*;", "", style)
                elif code in COLOURS:
                    style += f"color:{COLOURS[code]};"
                elif code in ("1", "2"):
                    style += "font-weight:700;" if code == "1" else "opacity:.62;"
        elif part:
            out += f'<span style="{style}">{html.escape(part)}</span>'
    return out


def keep(png: bytes, name: str) -> None:
    """As a small PNG of few colours."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    path = DOCS / f"{name}.png"
    image.save(path, optimize=True)
    sys.stdout.write(f"{path} {path.stat().st_size // 1024} kB\n")


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an export with its reward model; its folder's name heads the chat")
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="two, that the model can answer")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="which pictures (default: all)")
    given = parser.parse_args()
    model, questions = given.model, given.questions
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=FLAGS)
        with server(model) as url:
            if "page" in given.only:
                shoot_page(browser, url, questions)
            if "taste" in given.only:
                shoot_taste(browser, url, questions)
        if "chat" in given.only:
            shoot_chat(browser, model, questions[-1])
        browser.close()


if __name__ == "__main__":
    main()
