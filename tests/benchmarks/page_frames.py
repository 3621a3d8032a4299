"""How fluid the map of the page is: frames a second while it is dragged, in Chromium without a screen.

    python -m tests.benchmarks.page_frames [--points 100000] [--seconds 5]

WebGL is drawn by software here (SwiftShader, on the CPU's cores), which is the slowest case: a browser with a graphics
card draws the same with time to spare. A frame counts when deck.gl has drawn it; the map moves for every one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import sync_playwright

from embedding_service.artifact import Artifact
from embedding_service.http_artifact import http_api
from tests.embedding_service.artifacts import publish
from tests.embedding_service.test_page import ARGUMENTS, CHROMIUM, Service

COUNT = """() => {
  const { deck } = lexshard.map;
  const drawn = lexshard.map.rendered.bind(lexshard.map);
  globalThis.frames_ms = [];
  deck.setProps({ onAfterRender: () => { frames_ms.push(performance.now()); drawn(); } });
}"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder), num_items=args.points, factory="Flat", with_map=True)
        server = uvicorn.Server(
            uvicorn.Config(
                Service(http_api(Artifact.open(folder, verify=False))), port=0, log_level="error", lifespan="off"
            )
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/page"
        print(json.dumps(measure(address, args.points, args.seconds)))
        server.should_exit = True
        thread.join()


def measure(address: str, points: int, seconds: float) -> dict[str, Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 760})
        begin = time.perf_counter()
        page.goto(address)
        page.wait_for_selector("body[data-loaded]")
        load_seconds = time.perf_counter() - begin
        page.wait_for_timeout(1000)
        page.evaluate(COUNT)
        box = page.locator("#map").bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        end, step = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            step += 1
            page.mouse.move(x + 80 * (-1) ** (step // 20) * (step % 20) / 20, y)
        page.mouse.up()
        times = page.evaluate("frames_ms")
        browser.close()
    gaps = sorted(later - earlier for earlier, later in pairwise(times))
    return {
        "points": points,
        "load_seconds": round(load_seconds, 2),
        "frames": len(times),
        "frame_ms_p50": round(gaps[len(gaps) // 2], 1),
        "frame_ms_p95": round(gaps[int(0.95 * len(gaps))], 1),
        "renderer": "SwiftShader",
    }


if __name__ == "__main__":
    main()
