"""A headless Chromium over its debugging pipe (messages of JSON, each ended by a zero byte): nothing to install."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe"
KEYS = {"ArrowRight": 39, "ArrowDown": 40, "ArrowLeft": 37, "ArrowUp": 38, "Home": 36, "Escape": 27, "Tab": 9}


class Browser:
    """`with Browser(tmp_path) as browser: browser.open(page)`."""

    def __init__(self, profile: Path, width: int = 1400, height: int = 1100) -> None:
        read, self.to = os.pipe()
        self.back, write = os.pipe()
        size = f"--window-size={width},{height} --user-data-dir={shlex.quote(str(profile))}"
        line = f"exec {CHROMIUM} {FLAGS} {size} about:blank"
        # The pipe is at 3 and 4; the ends may have these numbers themselves, so they go by way of others.
        line = f"exec 58<&{read} 59>&{write}; exec 3<&58 4>&59 58<&- 59>&-; {line}"
        self.process = subprocess.Popen(["bash", "-c", line], pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.rest, self.number, self.session = b"", 0, None
        self.errors: list[str] = []
        page = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        found = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)

    def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol; what the page complains of meanwhile goes to `errors`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        os.write(self.to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.back, 1 << 20)
            text, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(answer["params"])[:500])

    def open(self, page: Path, ready: str = "document.readyState == 'complete'", seconds: float = 60) -> None:
        """Goes to a page and waits until the JavaScript expression `ready` is true there."""
        self.call("Page.navigate", url=page.as_uri())
        end = time.monotonic() + seconds
        while self.run("location.protocol == 'file:'") is not True or not self.run(ready):
            assert time.monotonic() < end, f"{page.name}: not {ready} after {seconds} s; {self.errors}"
            time.sleep(0.05)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """One key, down and up."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def picture(self, path: Path) -> None:
        """What is seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
