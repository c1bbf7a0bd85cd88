"""A headless browser that looks at a folder of pages, through a server of this process."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from contextlib import contextmanager

import pytest


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def find_browser():
    """The name of a browser; without one the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("there is no chromium")
    return browser


@contextmanager
def visiting(folder, profile):
    """Give a function that returns what the browser makes of a page: the document as text."""
    browser = find_browser()
    handler = functools.partial(QuietHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def visit(page):
        return subprocess.run(
            [
                browser,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                f"--user-data-dir={profile}",
                "--window-size=1400,900",
                "--virtual-time-budget=10000",
                "--dump-dom",
                f"http://127.0.0.1:{server.server_port}/{page}",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout

    try:
        yield visit
    finally:
        server.shutdown()
        server.server_close()
