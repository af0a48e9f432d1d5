"A real browser for the tests that look at pages."

import base64
import json
import shutil
import subprocess
import time
from urllib.request import urlopen

import pytest

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

    def __init__(self, folder, width=1000, height=900, with_policy=True):
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
        # Without it a page's own policy is not heeded
        self.call("Page.setBypassCSP", enabled=not with_policy)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def open(self, url):
        "Go to a page, and wait until all of it is there."
        self.evaluate("document.left = true")
        self.call("Page.navigate", url=url)
        wait_for(lambda: self.evaluate("!document.left && document.readyState == 'complete'"), url)

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
