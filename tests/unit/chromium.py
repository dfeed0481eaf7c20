"""One headless Chromium for several checks, driven by its DevTools protocol over a pipe; no other package needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
).split()


def installed() -> str | None:
    """A Chromium that starts; some distributions have a name that only says how to get one."""
    for path in filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


class Chromium:
    """A browser with one page, as a context manager."""

    def __init__(self, path: str, profile: Path) -> None:
        self.command = [path, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self.number, self.session, self.read = 0, None, b""

    def __enter__(self) -> "Chromium":
        ours_in, ours_out, theirs = self._pipes()
        # The browser reads commands from descriptor 3 and answers on 4.
        redirected = 'exec "$@" 3<&{} 4>&{}'.format(*theirs)
        self.process = subprocess.Popen(
            ["bash", "-c", redirected, "-", *self.command], pass_fds=theirs, stderr=subprocess.DEVNULL
        )
        for end in theirs:
            os.close(end)
        self.commands, self.answers = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb", 0)
        target = next(each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        self.call("Page.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.commands.close()
        self.answers.close()

    @staticmethod
    def _pipes() -> tuple[int, int, tuple[int, int]]:
        """Our reading and writing ends, and the browser's, whose numbers stay clear of 3 and 4."""
        (their_in, ours_out), (ours_in, their_out) = os.pipe(), os.pipe()
        theirs = tuple(fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_in, their_out))
        os.close(their_in)
        os.close(their_out)
        return ours_in, ours_out, theirs

    def call(self, method: str, **parameters: object) -> dict:
        """A command's result; events in between are dropped."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self.read:
            more = self.answers.read(2**16)
            assert more, "Chromium has ended"
            self.read += more
        message, self.read = self.read.split(b"\0", 1)
        return json.loads(message)

    def open(self, file: Path, width: int, height: int, scheme: str) -> None:
        """Load a file in a window of that size, in the `light` or `dark` scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=file.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> object:
        """The value of a JavaScript expression in the page; the page's own policy does not bind it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"]["value"]

    def screenshot(self) -> bytes:
        """PNG of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def pdf(self) -> bytes:
        """The page as printed."""
        return base64.b64decode(self.call("Page.printToPDF")["data"])
