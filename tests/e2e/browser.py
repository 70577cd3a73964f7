"""A real Chromium on a real server: what the tests of the page share."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "tests" / "artifacts"
PATIENCE = 60.0
"""Seconds; generous, since the machine may be busy with something else."""

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(
    *arguments: str, port: int | None = None, wait: bool = True, **settings: object
) -> Iterator[str]:
    """`retinaserve serve` in a process of its own; its URL, once it is ready if `wait`."""
    port = port or free_port()
    environment = os.environ | {f"RETINASERVE_{k.upper()}": str(v) for k, v in settings.items()}
    command = [sys.executable, "-c", "from service.cli import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--port", str(port), *arguments], env=environment, cwd=ROOT
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        until(lambda: answers(url + ("readyz" if wait else "healthz")) or process.poll())
        assert process.poll() is None, f"the server ended with {process.returncode}"
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


class Temper:
    """What a proxy does with images before it passes them on, and what it saw of them."""

    def __init__(self) -> None:
        self.refusals: deque[tuple[int, dict[str, str]]] = deque()
        """Answers to the next images, status and headers; 0 cuts the connection."""
        self.gate = threading.Semaphore(1_000_000)
        """An image passes when this lets it."""
        self.queries: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    @contextmanager
    def receive(self, query: str) -> Iterator[None]:
        with self._lock:
            self.queries.append(query)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            assert self.gate.acquire(timeout=PATIENCE)
            yield
        finally:
            with self._lock:
                self.at_once -= 1


@contextmanager
def proxy(prefix: str, target: str, temper: Temper | None = None) -> Iterator[str]:
    """A reverse proxy that shows `target` below `prefix` and nothing elsewhere; its URL."""
    temper = temper or Temper()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(prefix):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            headers = {
                name: self.headers[name] for name in ("Content-Type",) if name in self.headers
            }
            address = target + self.path.removeprefix(prefix)
            request = urllib.request.Request(address, body, headers, method=self.command)
            try:
                response = urllib.request.urlopen(request, timeout=PATIENCE)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                content_type = {"Content-Type": response.headers["Content-Type"]}
                self.answer(response.status, content_type, response.read())

        def do_POST(self) -> None:
            with temper.receive(self.path.partition("?")[2]):
                if not temper.refusals:
                    self.do_GET()
                    return
                status, headers = temper.refusals.popleft()
                self.rfile.read(int(self.headers["Content-Length"]) if status else 1)
                if status:
                    problem = {"title": "Refused", "status": status, "detail": "so it was told"}
                    self.answer(status, headers, json.dumps(problem).encode())

        def answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                pass  # The page did not wait.

        def log_request(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as outside:
        thread = threading.Thread(target=outside.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{outside.server_port}{prefix}"
        finally:
            outside.shutdown()
            thread.join()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False


def until(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """The first true value of `condition`, asked ten times a second."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def detect(url: str, image: Path, **query: object) -> dict[str, Any]:
    """What the API answers for the same bytes, asked without a browser."""
    address = f"{url}v1/detect?{urllib.parse.urlencode(query)}"
    headers = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(address, image.read_bytes(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def count(answer: Mapping[str, Any]) -> Counter[str]:
    return Counter(detection["label"] for detection in answer["detections"])


def copies(image: Path, folder: Path, names: Sequence[str]) -> list[Path]:
    """The same image under several names, which may have folders."""
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.read_bytes())
    return paths


def chromium(profile: Path) -> webdriver.Chrome:
    """Debian's Chromium without a window. Skips where there is none, fails there in CI."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        reason = "no chromium with chromedriver (Debian: chromium, chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        f"user-data-dir={profile}",
        "window-size=1360,1050",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Driver(driver))
    chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
    return chrome


class Page:
    """The page as a person sees it."""

    def __init__(self, browser: webdriver.Chrome, url: str, *, ready: bool = True) -> None:
        self.browser = browser
        self.url = url
        browser.get_log("browser")
        browser.get(url)
        if ready:
            self.wait(lambda: self["status"].get_attribute("data-state") == "ready")

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def wait(self, condition: Callable[[], T]) -> T:
        return WebDriverWait(self.browser, PATIENCE, 0.05).until(lambda _: condition())

    def drop(self, *files: Path) -> None:
        """Drag files from the desktop onto the page, through the browser's own input."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 300, "y": 300, "data": data}
            self.browser.execute_cdp_cmd("Input.dispatchDragEvent", event)
            assert self["veil"].is_displayed() == (kind != "drop")

    def choose(self, *files: Path) -> None:
        self["files"].send_keys("\n".join(str(file) for file in files))

    def paste(self, file: Path) -> None:
        """Paste a file; a page cannot be given a real clipboard without a window."""
        self.browser.execute_script(_PASTE, file.name, base64.b64encode(file.read_bytes()).decode())

    def until_announced(self) -> None:
        """Until screen readers have been told the counts."""
        self.wait(lambda: self["summary"].get_attribute("textContent"))

    def until_settled(self) -> str:
        """How the image that is shown came out: "done" or "failed"."""
        return self.wait(
            lambda: (
                (state := self.browser.execute_script("return document.body.dataset.state"))
                in ("done", "failed")
                and state
            )
        )

    def counts(self) -> Counter[str]:
        """Cells counted for the image that is shown, classes without any left out."""
        rows = self["classes"].find_elements(By.TAG_NAME, "li")
        pairs = {
            row.get_attribute("data-class"): row.find_element(By.CLASS_NAME, "count").text
            for row in rows
        }
        return Counter({name: int(text) for name, text in pairs.items() if text.strip("0")})

    def drawn(self, answer: Mapping[str, Any]) -> Counter[str]:
        """Of an answer's detections, those whose box is on the canvas in the colour of its class.

        Looked up pixel by pixel along the left and right edges; labels may hide a part of them.
        """
        found = self.browser.execute_script(_LOOK, answer)
        return Counter(found)

    def set_score(self, score: float) -> None:
        self.browser.execute_script(
            "const [s, v] = arguments; s.value = v; s.dispatchEvent(new Event('input'))",
            self["score"],
            score,
        )

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page, refused requests aside."""
        # The second is what the tests themselves do: they read the canvas.
        expected = ("Failed to load resource", "readback operations using getImageData")
        messages = [entry["message"] for entry in self.browser.get_log("browser")]
        violations: list[str] = self.browser.execute_script("return watched.violations")
        return violations + [m for m in messages if not any(part in m for part in expected)]

    def press(self, *keys: str) -> WebElement:
        """Press keys where the focus is; what has the focus then."""
        ActionChains(self.browser).send_keys(*keys).perform()
        return self.browser.switch_to.active_element

    def thumbnails(self) -> list[WebElement]:
        return self["strip"].find_elements(By.TAG_NAME, "button")

    def until_through(self) -> None:
        """Until no image waits for an answer."""
        self.wait(lambda: not self["queue"].is_displayed())

    def save_to(self, folder: Path) -> None:
        """Where the browser puts what is saved."""
        behaviour = {"behavior": "allow", "downloadPath": str(folder)}
        self.browser.execute_cdp_cmd("Page.setDownloadBehavior", behaviour)

    def screenshot(self, name: str) -> Path:
        ARTIFACTS.mkdir(exist_ok=True)
        path = ARTIFACTS / f"page-{name}.png"
        assert self.browser.save_screenshot(str(path))
        return path


_WATCH = """
window.watched = { violations: [], urls: new Set() };
addEventListener("securitypolicyviolation", (event) =>
  watched.violations.push(`${event.violatedDirective} forbids ${event.blockedURI}`));
const { createObjectURL, revokeObjectURL } = URL;
URL.createObjectURL = (blob) => {
  const url = createObjectURL.call(URL, blob);
  watched.urls.add(url);
  return url;
};
URL.revokeObjectURL = (url) => {
  watched.urls.delete(url);
  revokeObjectURL.call(URL, url);
};
"""

_PASTE = """
const [name, text] = arguments;
const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const clipboardData = new DataTransfer();
clipboardData.items.add(new File([bytes], name));
document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
"""

_LOOK = """
const answer = arguments[0], canvas = document.getElementById("boxes");
const { width, height } = canvas;
const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
const scale = width / answer.image.width;
const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const colourOf = (label) => {
  const row = document.querySelector(`[data-class="${CSS.escape(label)}"]`);
  probe.fillStyle = getComputedStyle(row).getPropertyValue("--colour");
  probe.fillRect(0, 0, 1, 1);
  return probe.getImageData(0, 0, 1, 1).data;
};
const at = (x, y, colour) => {
  const column = Math.min(width - 1, Math.max(0, Math.round(x)));
  const offset = 4 * (Math.min(height - 1, Math.round(y)) * width + column);
  if (pixels[offset + 3] < 150) return false;
  return [0, 1, 2].every((i) => Math.abs(pixels[offset + i] - colour[i]) < 40);
};
return answer.detections.filter(({ label, box }) => {
  const colour = colourOf(label);
  const heights = [0.2, 0.35, 0.5, 0.65, 0.8].map((part) => box.y1 + part * (box.y2 - box.y1));
  const hits = [box.x1, box.x2].flatMap((x) => heights.map((y) =>
    [-1, 0, 1].some((by) => at(x * scale + by, y * scale, colour))));
  return hits.filter(Boolean).length >= 5;
}).map(({ label }) => label);
"""
