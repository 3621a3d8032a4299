"""The page in a browser: Debian's Chromium without a screen, WebGL by software, against the service in this process.

Skipped where no Chromium is installed (`apt-get install chromium`); LEXSHARD_CHROMIUM names one elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from embedding_service.artifact import Artifact
from embedding_service.http_api import HttpApi
from embedding_service.http_artifact import http_api
from embedding_service.retrieval import Retriever
from tests.embedding_service.artifacts import NUM_ITEMS, publish

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("LEXSHARD_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

ARGUMENTS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
TOKEN = "a token of the test"
WAIT_MS = 20_000


class Service:
    """Answers with `live`, and with what `answers` has for a path; asks for `token` where there is one."""

    def __init__(self, live: HttpApi) -> None:
        self.live = live
        self.token = ""
        self.answers: dict[str, Callable[[bytes, dict[str, str]], tuple[int, Any]]] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer = self.answers.get(scope.get("path", ""))
        headers = {name.decode(): value.decode() for name, value in scope.get("headers", [])}
        if self.token and scope["path"].startswith("/v1/") and headers.get("authorization") != f"Bearer {self.token}":
            answer = refused
        if answer is None:
            await self.live(scope, receive, send)
            return
        status, document = answer((await receive())["body"], headers)
        kind = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": kind})
        await send({"type": "http.response.body", "body": json.dumps(document).encode()})


def refused(*_: Any) -> tuple[int, Any]:
    return 401, {"error": {"code": "token_required", "message": "show the token"}}


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("page"), with_map=True, version="v1", factory="Flat")


@pytest.fixture(scope="module")
def apis(version: Path, tmp_path_factory: pytest.TempPathFactory) -> list[HttpApi]:
    other = publish(
        tmp_path_factory.mktemp("other"), with_map=True, version="v2", factory="Flat", integer_keys=True, num_items=60
    )
    return [http_api(Artifact.open(folder)) for folder in (version, other)]


@pytest.fixture(scope="module")
def served(apis: list[HttpApi]) -> Iterator[tuple[Service, str]]:
    service = Service(apis[0])
    server = uvicorn.Server(uvicorn.Config(service, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield service, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    for api in apis:
        api.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def service(served: tuple[Service, str], apis: list[HttpApi]) -> Iterator[Service]:
    yield served[0]
    served[0].live, served[0].token = apis[0], ""
    served[0].answers.clear()


@pytest.fixture
def page(browser: Any, service: Service, served: tuple[Service, str]) -> Iterator[Any]:
    """A fresh tab. At its end: nobody else was asked, nothing broke the policy, no script failed."""
    context = browser.new_context(base_url=served[1], viewport={"width": 1000, "height": 640}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    asked: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert asked
    assert [url for url in asked if not url.startswith((served[1], "data:"))] == []
    assert [text for text in problems if "Failed to load resource" not in text] == []


def show(page: Any, address: str = "/") -> Any:
    page.goto(address)
    page.wait_for_selector("body[data-loaded]")
    return page


def keys_in(page: Any, ranking: str, count: int = 20) -> list[str]:
    sync_api.expect(page.locator(f"#{ranking} li")).to_have_count(count)
    found: list[str] = page.locator(f"#{ranking} .key").all_text_contents()
    return found


def expect_keys(page: Any, ranking: str, keys: list[str]) -> None:
    """Waits until the ranking is this one; right after a click it is still that before."""
    sync_api.expect(page.locator(f"#{ranking} .key")).to_have_text(keys)


def expected(version: Path, question: str, argument: Any, **options: Any) -> list[str]:
    retriever = Retriever(Artifact.open(version, verify=False))
    results: Any = getattr(retriever, question)([argument], 20, **options)
    return [str(key) for key in results.keys[0]]


def test_a_key_is_completed_by_keyboard_and_its_neighbours_are_shown(page: Any, version: Path) -> None:
    show(page)
    page.keyboard.press("/")
    sync_api.expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("I001")
    options = page.locator("#search-list [role=option]")
    sync_api.expect(options.nth(1)).to_have_text("i0011998")  # key and count
    sync_api.expect(options).to_have_count(10)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    sync_api.expect(options.nth(1)).to_have_attribute("aria-selected", "true")
    assert page.get_attribute("#search", "aria-activedescendant") == "search-list-1"
    page.keyboard.press("Enter")
    expect_keys(page, "near", expected(version, "similar", "i0011"))
    sync_api.expect(page.locator("#near-title")).to_have_text("i0011")
    sync_api.expect(page.locator("#near-status")).to_contain_text("20 neighbours in")
    sync_api.expect(page.locator("#search-list")).to_be_hidden()
    sync_api.expect(page.locator("#map .labels .focus")).to_have_text("i0011")
    assert page.url.endswith("#item=i0011")
    page.locator("#near .item").first.click()  # a neighbour leads on
    expect_keys(page, "near", expected(version, "similar", expected(version, "similar", "i0011")[0]))


def test_an_unknown_key_is_told_and_is_never_markup(page: Any) -> None:
    show(page, "/page#item=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    sync_api.expect(page.locator("#near-title")).to_have_text("<img src=x onerror=alert(1)>")
    sync_api.expect(page.locator("#near-status")).to_contain_text("is not in the vocabulary")
    assert page.locator("main img").count() == 0


# The drawing is read in the task that made it: WebGL forgets it afterwards.
COLOURS = """() => {
  const { deck, canvas } = lexshard.map;
  deck.redraw("test");
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const context = copy.getContext("2d");
  context.drawImage(canvas, 0, 0);
  const { data } = context.getImageData(0, 0, copy.width, copy.height);
  const colours = {};
  let drawn = 0;
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 100) {
    drawn++;
    const name = [data[i], data[i + 1], data[i + 2]].map((value) => value >> 5).join();
    colours[name] = (colours[name] ?? 0) + 1;
  }
  return { drawn, num: Object.values(colours).filter((count) => count > 10).length };
}"""


def test_the_map_is_drawn_and_a_point_leads_to_its_item(page: Any) -> None:
    show(page)
    assert page.evaluate("lexshard.map.problem") is None
    sync_api.expect(page.locator("#map-told")).to_have_text(f"{NUM_ITEMS} items")
    sync_api.expect(page.locator("#legend li")).to_have_count(12)
    seen = page.evaluate(COLOURS)
    assert seen["drawn"] > 2 * NUM_ITEMS
    assert seen["num"] >= 8  # colours of 12 clusters
    row, x, y = page.evaluate(
        """() => { const { places, deck } = lexshard.map;
          let far = 0;
          for (let i = 0; i < places.length / 2; i++) if (places[2 * i] > places[2 * far]) far = i;
          return [far, ...deck.getViewports()[0].project([places[2 * far], places[2 * far + 1]])]; }"""
    )
    box = page.locator("#map").bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + y)
    sync_api.expect(page.locator("#map .labels .hovered")).to_have_text(f"i{row:04d}")
    page.mouse.click(box["x"] + x, box["y"] + y)
    sync_api.expect(page.locator("#near-title")).to_have_text(f"i{row:04d}")


def test_colours_by_an_attribute_and_one_colour_alone(page: Any) -> None:
    show(page)
    page.select_option("#colours", label="town")
    lines = page.locator("#legend li")
    sync_api.expect(lines).to_have_count(3)
    sync_api.expect(lines.nth(1)).to_have_text("Porto167")
    alphas = "() => [...new Set([0, 1, 2].map((row) => lexshard.map.colors[4 * row + 3]))].length"
    assert page.evaluate(alphas) == 1
    lines.nth(1).locator("button").click()
    sync_api.expect(lines.nth(1).locator("button")).to_have_attribute("aria-pressed", "true")
    assert page.evaluate(alphas) == 2
    lines.nth(1).locator("button").click()
    assert page.evaluate(alphas) == 1


def test_the_map_moves_by_keyboard(page: Any) -> None:
    show(page)
    page.focus("#map")
    page.evaluate("lexshard.map.deck.redraw('test')")
    start = page.evaluate("lexshard.map.deck.getViewports()[0].unproject([0, 0])")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("(x) => lexshard.map.deck.getViewports()[0].unproject([0, 0])[0] > x", arg=start[0])
    zoom = page.evaluate("lexshard.map.deck.getViewports()[0].zoom")
    page.keyboard.press("+")
    page.wait_for_function("(zoom) => lexshard.map.deck.getViewports()[0].zoom > zoom", arg=zoom)
    page.keyboard.press("0")
    page.wait_for_function(
        "([x, y]) => { const [a, b] = lexshard.map.deck.getViewports()[0].unproject([0, 0]);"
        " return Math.abs(a - x) + Math.abs(b - y) < 1e-3; }",
        arg=start[:2],
    )


def test_a_session_is_recommended_for_as_it_grows(page: Any, version: Path) -> None:
    show(page, "/page#item=i0005")
    first = keys_in(page, "near")[0]
    page.get_by_role("button", name=f"Add {first} to the session").click()
    expect_keys(page, "recommended", expected(version, "recommend", [first]))
    page.focus("#session-input")
    page.keyboard.type("i0042")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#session li")).to_have_count(2)
    sync_api.expect(page.locator("#recommended-status")).to_contain_text("20 recommendations in")
    page.wait_for_function(
        "(keys) => [...document.querySelectorAll('#recommended .key')].map((e) => e.textContent).join() === keys",
        arg=",".join(expected(version, "recommend", [first, "i0042"])),
    )
    assert page.url.endswith(f"session={first}&session=i0042")
    page.uncheck("#exclude-seen")
    page.wait_for_function(
        "(keys) => [...document.querySelectorAll('#recommended .key')].map((e) => e.textContent).join() === keys",
        arg=",".join(expected(version, "recommend", [first, "i0042"], exclude_seen=False)),
    )
    page.get_by_role("button", name=f"Remove {first} from the session").focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#session li")).to_have_count(1)
    sync_api.expect(page.get_by_role("button", name="Remove i0042 from the session")).to_be_focused()
    page.click("#clear")
    sync_api.expect(page.locator("#recommended li")).to_have_count(0)


def test_the_order_of_focus_and_the_names_of_what_takes_it(page: Any) -> None:
    show(page)
    seen = []
    for _ in range(9):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        ring = "(document.activeElement.nextElementSibling ?? document.activeElement)"  # of a radio: its label has it
        ring = ring if seen[-1] == "view-explore" else "document.activeElement"
        assert page.evaluate(f"getComputedStyle({ring}).outlineStyle") == "solid", seen[-1]
    assert seen == ["skip", "view-explore", "A", "search", "map", "colours", "fit", "BUTTON", "BUTTON"]
    unnamed = """() => [...document.querySelectorAll("button, input, select, [tabindex='0']")]
      .filter((node) => node.checkVisibility() && !(node.ariaLabel || node.labels?.length || node.textContent.trim()))
      .map((node) => node.outerHTML)"""
    assert page.evaluate(unnamed) == []


def test_light_and_dark(page: Any) -> None:
    show(page)
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) != light


LISTING = {
    "live": "v1", "previous": ["v0"], "canary": "v2", "share": 0.05, "admission": None,
    "here": {"live": "v1", "recall": [
        {"version": "v1", "index": "recommend", "k": 10, "recall": 0.9671, "half_width": 0.0124, "measured": 0.98,
         "num_queries": 1256, "low": False},
        {"version": "v1", "index": "similar", "k": 10, "recall": 0.8, "half_width": 0.02, "measured": 0.98,
         "num_queries": 64, "low": True},
        {"version": "v2", "index": "similar", "k": 10, "recall": 0.1, "half_width": 0.1, "measured": 0.98,
         "num_queries": 5, "low": True},
    ]},
    "versions": [
        {"version": "v0", "traffic": {"requests": 7, "p50_ms": None, "p99_ms": None, "ctr": None}},
        {"version": "v1", "traffic": {"requests": 1234, "p50_ms": 0.4, "p99_ms": 1234.6, "ctr": 0.1, "ctr_low": 0.08,
         "ctr_high": 0.12}, "against": "v0",
         "gates": [{"gate": "ann_recall", "value": 0.97, "limit": 0.9, "passed": True, "note": ""},
                   {"gate": "coverage", "value": 0.7, "limit": 0.8, "passed": False, "note": "keys"}]},
    ],
}  # fmt: skip


def test_figures_of_the_version_and_a_roll_back_with_a_token(page: Any, service: Service) -> None:
    asked: list[dict[str, str]] = []

    def roll_back(_: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        asked.append(headers)
        return (200, {"live": "v0"}) if headers.get("authorization") == f"Bearer {TOKEN}" else refused()

    service.answers |= {"/v1/versions": lambda *_: (200, LISTING), "/v1/versions/rollback": roll_back}
    show(page, "/page#view=version")
    sync_api.expect(page.locator("#facts")).to_contain_text("500")
    cards = page.locator("#indexes .card")
    sync_api.expect(cards).to_have_count(2)
    sync_api.expect(cards.first).to_contain_text("recall@10")
    sync_api.expect(cards.first).to_contain_text("target 0.950 met")
    probed = {name: page.locator(f"#probed-{name}") for name in ("recommend", "similar")}
    sync_api.expect(probed["recommend"]).to_have_text("0.967 ± 0.012 recall@10 now, on 1,256 recent queries")
    low = "0.800 ± 0.020 recall@10 now, on 64 recent queries: less than was measured"
    sync_api.expect(probed["similar"]).to_have_text(low)
    sync_api.expect(probed["similar"]).to_have_class("bad")
    sync_api.expect(cards.first.locator("#probed-recommend")).to_be_visible()
    sync_api.expect(cards.first).to_contain_text(re.compile(r"A query alone\d+(\.\d+)? µs"))
    sync_api.expect(cards.first.locator("svg")).to_have_count(0)  # of exact search there is one point
    rows = page.locator("#version-rows tr")
    sync_api.expect(rows.first).to_contain_text("v1live1,2340.400 ms1,235 ms10.0 % (8.0 to 12)1 of 2 missed")
    page.click("#roll-back")
    sync_api.expect(page.locator("#dialog-question")).to_have_text("Roll back to v0?")
    page.click("#dialog button[value=no]")
    assert asked == []
    for token, told in (("a wrong one", "show the token"), (TOKEN, "done")):
        page.click("#roll-back")
        page.fill("#token", token)
        page.click("#dialog button[value=yes]")
        sync_api.expect(page.locator("#versions-told")).to_have_text(told)
    assert len(asked) == 2


def test_a_service_that_asks_for_a_token(page: Any, service: Service) -> None:
    service.token = TOKEN
    page.goto("/page")
    page.fill("#token", TOKEN)
    page.click("#dialog button[value=yes]")
    page.wait_for_selector("body[data-loaded]")
    sync_api.expect(page.locator("#version")).to_have_text("v1")
    sync_api.expect(page.locator("#map-told")).to_have_text(f"{NUM_ITEMS} items")


def test_another_version_goes_live_while_one_looks(page: Any, service: Service, apis: list[HttpApi]) -> None:
    show(page, "/page#item=i0003")
    keys_in(page, "near")
    service.live = apis[1]
    page.fill("#search", "42")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#version")).to_have_text("v2")
    sync_api.expect(page.locator("#map-told")).to_have_text("60 items")
    sync_api.expect(page.locator("#near-title")).to_have_text("42")
    assert all(key.isdigit() for key in keys_in(page, "near"))


def test_a_service_that_has_gone_is_told(page: Any, service: Service) -> None:
    service.answers["/v1/similar"] = lambda *_: (503, {"error": {"code": "overloaded", "message": "come back soon"}})
    show(page, "/page#item=i0003")
    sync_api.expect(page.locator("#near-status")).to_have_text("come back soon")
