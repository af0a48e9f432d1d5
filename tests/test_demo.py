"The page to chat with, in a real browser: type, send, read the answer."

import base64
import json
import shutil
import subprocess
import time
from urllib.request import urlopen

import pytest
from conftest import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)


def wait_for(condition, label, seconds=180):
    "What `condition` returns once it is true."
    end = time.time() + seconds
    while time.time() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.3)
    raise AssertionError(f"{label} did not come within {seconds} s")


class Page:
    "A headless Chromium with one page, driven through its DevTools protocol."

    def __init__(self, url, folder, width, height):
        import websocket

        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if not browser:
            pytest.skip("no Chromium on this machine")
        place = [f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        self.process = subprocess.Popen(
            [browser, *OPTIONS, *place, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = folder / "DevToolsActivePort"
        wait_for(lambda: port_file.exists() and port_file.read_text(), "the browser")
        port = port_file.read_text().splitlines()[0]
        targets = json.load(urlopen(f"http://127.0.0.1:{port}/json"))
        [target] = [target for target in targets if target["type"] == "page"]
        address = target["webSocketDebuggerUrl"]
        self.socket = websocket.create_connection(address, timeout=120)
        self.calls = 0
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        self.calls += 1
        self.socket.send(json.dumps(dict(id=self.calls, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]

    def evaluate(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return result["result"].get("value")

    def text(self):
        return self.evaluate("document.body.innerText")

    def type(self, text):
        "Type a text and press Enter."
        self.call("Input.insertText", text=text)
        key = dict(key="Enter", code="Enter", windowsVirtualKeyCode=13)
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", text="", **key)

    def picture(self, file):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(data))


@pytest.mark.slow
def test_chat_page(tmp_path):
    "Two models side by side answer what is typed, each as the model answers by itself."
    pytest.importorskip("gradio", reason="the extra `demo` is not installed")
    from finetune_kit.demo import demo
    from finetune_kit.infer import generate
    from finetune_kit.model import load_model

    base = ROOT / "data/tiny-base"
    question = "Where does the puffin live?"
    model, tokenizer = load_model(base, backend="transformers")
    [answer] = generate(model, tokenizer, [[dict(role="user", content=question)]], 128)
    interface = demo(dict(base=base, again=base), runs=False)
    _, url, _ = interface.launch(prevent_thread_lock=True, quiet=True)
    page = Page(url, tmp_path / "profile", 1200, 900)
    try:
        wait_for(lambda: page.evaluate("document.querySelectorAll('textarea').length"), "the page")
        page.evaluate("document.querySelector('textarea[placeholder*=otter]').focus()")
        page.type(question)
        try:
            wait_for(lambda: page.text().count(answer.strip()) >= 2, f"{answer!r}, twice,")
        except AssertionError as error:
            raise AssertionError(f"{error}; the page says {page.text()!r}") from None
        finally:
            page.picture(tmp_path / "chat.png")
        fits = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert fits, "something runs out of the page at the side"
        assert (tmp_path / "chat.png").stat().st_size > 20_000
    finally:
        page.process.kill()
