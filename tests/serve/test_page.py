"""The web page in a real browser. Its main path runs over the real server too; the rest over a stand-in for the API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from aiohttp import web
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from proto import records
from proto.records import Feedback
from serve.store import open_store
from tests.serve.tiny import Server

pytestmark = pytest.mark.system

PAGE = Path(__file__).parents[2] / "serve" / "page.html"
# Stricter than the server's own, so that the page needs nothing but itself.
POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
TOO_LONG = "word " * 20_000  # beyond any context that is served here
T = TypeVar("T")


def lines(text: str) -> str:
    """With the line ends that a text box gives it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def refuse(status: int, message: str) -> web.Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return web.json_response(body, status=status)


class StubApi:
    """As much of the API as the page uses. It answers with the last message, word by word."""

    def __init__(self, key: str = "") -> None:
        self.key = key
        self.left = threading.Event()  # a client went away in mid-stream
        self.app = web.Application(client_max_size=1 << 22, middlewares=[self.check_key])
        self.app.router.add_get("/", self.page)
        self.app.router.add_get("/v1/models", self.models)
        self.app.router.add_post("/v1/chat/completions", self.chat)
        self.app.router.add_post("/v1/feedback", self.feedback)

    @web.middleware
    async def check_key(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.key and request.path != "/" and request.headers.get("Authorization") != f"Bearer {self.key}":
            return refuse(401, "this server requires an API key")
        response: web.StreamResponse = await handler(request)
        return response

    async def page(self, request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": POLICY}
        return web.Response(body=PAGE.read_bytes(), content_type="text/html", charset="utf-8", headers=headers)

    async def models(self, request: web.Request) -> web.Response:
        gate = {
            "passed": True,
            "forced": False,
            "tokens": 4096,
            "metrics": {"perplexity_ratio": 1.0042, "kl": 0.00312, "greedy_agreement": 0.961},
            "thresholds": {},
        }
        model = {"id": "smollm2-135m", "object": "model", "recipe": "w8a8", "max_model_len": 2048, "gate": gate}
        return web.json_response({"object": "list", "data": [model]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        call = await request.json()
        said = call["messages"][-1]["content"]
        if len(said) > 8000:
            return refuse(400, "messages has 20001 tokens and the context is 2048; shorten it")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        words = ("You said: " + said).split(" ")
        if said == "go on for ever":
            words *= 10_000
        envelope = {"id": records.new_id("chatcmpl"), "object": "chat.completion.chunk", "model": call["model"]}
        try:
            for number, word in enumerate(words):
                delta = {"content": word + " " * (number < len(words) - 1)}
                choice = {"index": 0, "delta": delta, "finish_reason": None}
                await self.send(response, envelope | {"choices": [choice], "usage": None})
                await asyncio.sleep(0.02)  # a token takes its time
        except ConnectionResetError:
            self.left.set()
            raise
        if said == "break in the middle":
            await self.send(response, {"error": {"message": "the model failed on this batch"}})
        usage = {"prompt_tokens": 9, "completion_tokens": len(words), "total_tokens": 9 + len(words)}
        await self.send(response, envelope | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await self.send(response, envelope | {"choices": [], "usage": usage})
        await response.write(b": a comment\n\ndata: [DONE]\n\n")
        return response

    async def send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")

    async def feedback(self, request: web.Request) -> web.Response:
        fields = await request.json() | {"id": records.new_id("feedback"), "created": records.utc_now()}
        fields["idempotency_key"] = request.headers["Idempotency-Key"]
        try:
            return web.json_response({"feedback_id": records.convert(fields, Feedback).id})
        except records.RecordError as error:
            return refuse(400, str(error))


@contextmanager
def serving(stub: StubApi) -> Iterator[str]:
    """The stub on a free port, on a loop in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[web.AppRunner, int]:
        runner = web.AppRunner(stub.app, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def stub() -> StubApi:
    return StubApi()


@pytest.fixture
def page_url(stub: StubApi) -> Iterator[str]:
    with serving(stub) as url:
        yield url


@pytest.fixture(params=["stub", "server"])
def any_url(request: pytest.FixtureRequest) -> str:
    """Where the main path runs: the stand-in, then the real server with the tiny model."""
    if request.param == "stub":
        return str(request.getfixturevalue("page_url"))
    return str(request.getfixturevalue("server").http_url)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--window-size=1100,850"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a user sees and does."""

    def __init__(self, browser: WebDriver, url: str) -> None:
        self.browser = browser
        browser.get_log("browser")  # type: ignore[no-untyped-call]  # forget what came before
        browser.get(url)

    def find(self, selector: str) -> WebElement:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)[-1]

    def count(self, selector: str) -> int:
        return len(self.browser.find_elements(By.CSS_SELECTOR, selector))

    def wait(self, condition: Callable[[], T]) -> T:
        return WebDriverWait(self.browser, 20, poll_frequency=0.05).until(lambda _: condition())

    def wait_text(self, selector: str, part: str) -> None:
        self.wait(lambda: self.count(selector) and part in self.find(selector).text)

    def say(self, text: str) -> None:
        # A long text goes in at once: typing it would take minutes.
        self.browser.execute_script("arguments[0].value = arguments[1]", self.find("#prompt"), text)
        self.find("#prompt").send_keys(Keys.ENTER)

    def answer(self, text: str) -> str:
        """Say it, wait for the whole answer and return that."""
        before = self.count(".answer")
        self.say(text)
        self.wait(lambda: self.count(".answer[aria-busy=false]") > before)
        return self.find(".answer .text").get_attribute("textContent") or ""  # `text` would merge blanks

    def problems(self) -> list[str]:
        """The browser's complaints, such as a broken content policy or an exception."""
        return [entry["message"] for entry in self.browser.get_log("browser")]  # type: ignore[no-untyped-call]


@pytest.fixture
def page(browser: WebDriver, page_url: str) -> Page:
    return Page(browser, page_url)


@pytest.fixture
def any_page(browser: WebDriver, any_url: str) -> Page:
    return Page(browser, any_url)


def test_model_and_gate_are_shown(page: Page) -> None:
    page.wait_text("#gate", "gate")
    assert page.find("#model").text not in ("", "Pawl")
    assert page.find("#gate").text.startswith("w8a8 · gate passed: perplexity +")
    assert not page.problems()


def test_answer_streams_and_is_measured(browser: WebDriver, any_url: str) -> None:
    for _ in range(8):  # the tiny model draws its answers, and now and then a very short one
        page = Page(browser, any_url)
        page.browser.execute_script("""
            window.lengths = new Set();
            const note = () => window.lengths.add(document.querySelector(".answer .text")?.textContent.length ?? 0);
            const all = { childList: true, subtree: true, characterData: true };
            new MutationObserver(note).observe(document.querySelector("#log"), all);
        """)
        if len(page.answer("Tell me about the seasons of the year")) > 40:
            break
    lengths = page.browser.execute_script("return [...window.lengths]")
    assert lengths == sorted(lengths)
    assert len(lengths) >= 5, "the answer came in one piece"
    page.wait_text(".figures", "tokens/s")
    assert "first token" in page.find(".figures").text
    # The composer is ready for the next question.
    assert page.browser.switch_to.active_element == page.find("#prompt")
    assert not page.problems()


def test_the_next_question_carries_the_conversation(page: Page) -> None:
    page.answer("Tell me about the seasons of the year")
    page.answer("And in Lapland?")
    assert page.count(".turn") == 4
    assert not page.problems()


def test_thumb_is_stored(any_page: Page) -> None:
    page = any_page
    page.answer("Hello")
    for name, other in [("down", "up"), ("up", "down")]:
        page.find(f".{name}").click()
        page.wait(lambda name=name: page.find(f".{name}").get_attribute("aria-pressed") == "true")  # type: ignore[misc]
        assert page.find(".state").text == "stored"
        assert page.find(f".{other}").get_attribute("aria-pressed") == "false"
    assert not page.problems()


def test_correction_is_stored(any_page: Page) -> None:
    page = any_page
    answer = page.answer("Hello")
    page.find(".correct").click()
    area = page.find(".correction textarea")
    assert area.get_attribute("value") == lines(answer)
    area.clear()
    area.send_keys("Good day to you.")
    page.find(".correction [type=submit]").click()
    page.wait_text(".state", "correction stored")
    assert not page.find(".correction").is_displayed()
    assert not page.problems()


def test_what_is_said_on_the_page_is_in_the_records(browser: WebDriver, server: Server) -> None:
    page = Page(browser, server.http_url)
    answer = page.answer("Is this kept?")
    page.find(".up").click()
    page.wait(lambda: page.find(".up").get_attribute("aria-pressed") == "true")
    judged = [j for j in open_store(str(server.records)).scan() if "Is this kept?" in str(j.interaction.messages)]
    assert [(j.feedback.metric_name, j.feedback.value) for j in judged] == [("thumbs", True)]
    assert judged[0].interaction.completion == answer


def test_refused_feedback_says_why(page: Page) -> None:
    page.answer("Hello")
    # The correction box is the page's own; no user can make it send this much, but a script can.
    page.browser.execute_script("""
        const send = window.fetch;
        window.fetch = (path, options) =>
            send(path, { ...options, body: options.body?.replace('"thumbs"', '"no such thing"') });
    """)
    page.find(".up").click()
    page.wait_text(".state", "not stored: ")
    assert "metric_name" in page.find(".state").text
    assert page.find(".up").get_attribute("aria-pressed") == "false"


def test_error_is_shown_and_the_chat_goes_on(page: Page) -> None:
    page.say(TOO_LONG)
    page.wait_text(".error", "context")
    assert page.find(".error").get_attribute("role") == "alert"
    assert page.find(".error button").is_displayed()
    assert any(page.answer("Hello") for _ in range(5)), "the tiny model may draw an empty answer"


def test_error_in_mid_stream_keeps_what_came(page: Page) -> None:
    page.say("break in the middle")
    page.wait_text(".error", "the model failed on this batch")
    assert page.find(".answer .text").text == "You said: break in the middle"
    page.find(".error button").click()  # try again
    page.wait(lambda: page.count(".answer[aria-busy=true]") == 1)
    page.wait_text(".error", "the model failed on this batch")
    assert page.count(".turn") == 2


def test_text_is_never_markup(page: Page) -> None:
    attack = '<img src=x onerror="window.hacked = 1"><b>bold</b></span><script>window.hacked = 1</script>'
    page.answer(attack)
    assert page.find(".user .text").text == attack
    assert page.count("#log img, #log b, #log script") == 0
    assert page.browser.execute_script("return window.hacked") is None
    assert not page.problems()


def test_stop_and_new_chat(page: Page, stub: StubApi) -> None:
    page.say("go on for ever")
    page.wait_text(".answer .text", "ever You said")
    page.find("#stop").click()
    page.wait_text(".figures", "stopped")
    assert stub.left.wait(10), "the server was not told"
    assert page.find("#send").is_displayed()
    page.find("#new").click()
    assert page.count(".turn") == 0
    page.find(".ideas button").click()
    page.wait(lambda: page.count(".answer[aria-busy=false]") == 1)
    assert not page.problems()


def test_api_key_is_asked_for_and_kept_in_the_tab(browser: WebDriver) -> None:
    with serving(StubApi("secret")) as url:
        page = Page(browser, url)
        page.wait(lambda: page.find("#settings").get_attribute("open"))
        assert page.find("#gate").text == "this server requires an API key"
        assert browser.switch_to.active_element == page.find("#key")
        page.find("#key").send_keys("secret" + Keys.ENTER)
        page.wait_text("#gate", "gate passed")
        assert page.answer("Hello") == "You said: Hello"
        browser.refresh()
        page.wait_text("#gate", "gate passed")
        assert browser.execute_script("return localStorage.length") == 0


def test_narrow_screens_need_no_sideways_scrolling(page: Page) -> None:
    size = page.browser.get_window_size()
    try:
        page.browser.set_window_size(500, 800)  # the narrowest window that Chromium makes
        page.browser.execute_script("document.body.style.width = '320px'")
        page.answer("a" * 300)
        assert page.browser.execute_script("return document.querySelector('#scroll').scrollWidth") <= 320
        assert page.find("#send").rect["x"] + page.find("#send").rect["width"] <= 320
    finally:
        page.browser.set_window_size(size["width"], size["height"])
