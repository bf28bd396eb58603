"""A browser for tests: Chromium, driven by chromedriver over its HTTP protocol (W3C WebDriver)."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = """--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-sync --disable-component-update --disable-default-apps --hide-scrollbars
--disable-dev-shm-usage""".split()
needed = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
KEYS = dict(left="\ue012", up="\ue013", right="\ue014", down="\ue015", tab="\ue004", shift="\ue008")
JSON = {"Content-Type": "application/json"}


class Browser:
    """One window. `run` evaluates JavaScript, whose result comes back as Python values."""

    def __init__(self, port, capabilities):
        self.base = f"http://127.0.0.1:{port}/session"
        self.base += "/" + self.ask("POST", "", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, JSON, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, path):
        self.ask("POST", "/url", {"url": f"file://{path}"})

    def run(self, script, *args):
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def keys(self, *names, held=None):
        """Press and release keys, by their names above; held: one that is down meanwhile."""
        presses = [{"type": kind, "value": KEYS[name]} for name in names for kind in ("keyDown", "keyUp")]
        if held:
            down, up = [{"type": kind, "value": KEYS[held]} for kind in ("keyDown", "keyUp")]
            presses = [down, *presses, up]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": presses}]})

    def log(self, kind):
        """Lines of the console ("browser"), or what the page did ("performance")."""
        return self.ask("POST", "/se/log", {"type": kind})

    def devtools(self, command, **params):
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def look(self, width, height=900, dark=False):
        """Width of the window in CSS pixels, and the colours that the reader's system asks for."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                      mobile=False)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.ask("GET", "/screenshot")))


@contextlib.contextmanager
def browser(profile):
    """Start chromedriver and Chromium with a new profile in the folder `profile` → Browser."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    silent = subprocess.DEVNULL
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=silent, stderr=silent)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            time.sleep(0.05)
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        window = Browser(port, {"goog:chromeOptions": options, "goog:loggingPrefs": logs})
        try:
            yield window
        finally:
            window.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()
