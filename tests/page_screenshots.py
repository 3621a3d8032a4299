"""Pictures of the page for the README: `python -m tests.page_screenshots ARTIFACT FOLDER [ITEM ...]`.

Serves the artifact in this process and looks at it in Chromium, as test_page.py does. The items are those of the
session; the first of them is looked at. Writes page-light.png, page-dark.png and page-version.png.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

import uvicorn
from playwright.sync_api import sync_playwright

from embedding_service.artifact import Artifact
from embedding_service.http_artifact import http_api
from tests.embedding_service.test_page import ARGUMENTS, CHROMIUM, Service


def main(artifact: str, folder: str, *items: str) -> None:
    config = uvicorn.Config(Service(http_api(Artifact.open(artifact))), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/page#"
    session = urlencode([("item", items[0]), *(("session", item) for item in items)] if items else [])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for name, scheme, told in (
            ("page-light", "light", session),
            ("page-dark", "dark", ""),
            ("page-version", "light", "view=version"),
        ):
            size = {"width": 1440, "height": 820}
            page = browser.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
            page.goto(address + told)
            page.wait_for_selector("body[data-loaded]")
            page.wait_for_timeout(1000)
            if told == session and items:  # the first answer waits for the map: ask again
                page.locator("#search").press("Enter")
                page.locator("#search").blur()
                page.wait_for_timeout(1000)
            page.screenshot(path=Path(folder) / f"{name}.png")
            page.close()
        browser.close()
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
