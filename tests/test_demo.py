"The page to chat with, in a real browser: type, send, read the answer."

import base64, json, shutil, subprocess, time
from urllib.request import urlopen

import pytest
from conftest import ROOT


class Page:
    "A headless Chromium with one page, driven through its DevTools protocol."

    def __init__(self, url, folder, width, height):
        chromium = (
            shutil.which("chromium")
            or shutil.which("chromium-browser")
            or shutil.which("google-chrome")
        )
        if not chromium:
            pytest.skip("no Chromium on this machine")
        self.process = subprocess.Popen(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--remote-debugging-port=0",
                "--remote-allow-origins=*",
                f"--user-data-dir={folder}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = until(
            lambda: (
                (folder / "DevToolsActivePort").exists()
                and (folder / "DevToolsActivePort").read_text().splitlines()[0]
            ),
            "the browser",
        )
        import websocket

        target = next(
            t for t in json.load(urlopen(f"http://127.0.0.1:{port}/json")) if t["type"] == "page"
        )
        self.socket, self.n = (
            websocket.create_connection(target["webSocketDebuggerUrl"], timeout=120),
            0,
        )
        self("Page.navigate", url=url)

    def __call__(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (said := json.loads(self.socket.recv())).get("id") != self.n:
            pass
        assert "error" not in said, said
        return said["result"]

    def js(self, code):
        return self("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def type(self, text):
        self("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                windowsVirtualKeyCode=13,
                text="\r" if kind == "keyDown" else "",
            )

    def picture(self, to):
        to.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))


def until(f, what, seconds=180):
    end = time.time() + seconds
    while time.time() < end:
        if found := f():
            return found
        time.sleep(0.3)
    raise AssertionError(f"{what} did not come within {seconds} s")


@pytest.mark.slow
def test_chat_page(tmp_path):
    "Two models side by side answer what is typed; both answers are what the model says by itself."
    pytest.importorskip("gradio", reason="the extra `demo` is not installed")
    from finetune_kit.infer import generate
    from finetune_kit.model import load_model
    from finetune_kit.demo import demo

    question = "Where does the puffin live?"
    model, tokenizer = load_model(ROOT / "data/tiny-base", backend="transformers")
    answer = generate(
        model, tokenizer, [[dict(role="user", content=question)]], max_new_tokens=128
    )[0].strip()
    _, url, _ = demo(
        dict(base=ROOT / "data/tiny-base", again=ROOT / "data/tiny-base"), runs=False
    ).launch(prevent_thread_lock=True, quiet=True)
    page = Page(url, tmp_path / "profile", 1200, 900)
    try:
        until(lambda: page.js("document.querySelectorAll('textarea').length"), "the page")
        page.js(
            "[...document.querySelectorAll('textarea')].find(t => t.placeholder.includes('otter')).focus()"
        )
        page.type(question)
        try:
            until(
                lambda: page.js("document.body.innerText").count(answer) >= 2, f"{answer!r}, twice,"
            )
        except AssertionError as e:
            raise AssertionError(
                f"{e}; the page says {page.js('document.body.innerText')!r}"
            ) from None
        finally:
            page.picture(tmp_path / "chat.png")
        assert page.js("document.documentElement.scrollWidth <= innerWidth"), (
            "nothing runs out of the page at the side"
        )
        assert (tmp_path / "chat.png").stat().st_size > 20_000
    finally:
        page.process.kill()
