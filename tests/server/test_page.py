"""The page in a real browser, against a real server with the embedded model."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Server

pytest.importorskip("dbos")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"{CHROMIUM} is not there: apt-get install chromium"
)
TOKEN = "a-token-of-the-tests"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
LONG = "400"  # steps: what is to be seen while it is made
SECONDS = 90_000.0
EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a line on the screen for each."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of another site, which has the example of a client."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(EXAMPLES))) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one.server_port
        one.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, site: int) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "tokens").write_text(f"tests:{TOKEN}\n")
    flags = ("--token-file", str(folder / "tokens"), "--allow-origin", f"http://localhost:{site}")
    one = Server(folder / "save", *flags).start()
    try:
        yield one
    finally:
        assert one.stop() == 0, one.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        one = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def page(server: Server, browser: Any) -> Iterator[Any]:
    """A page that is signed in. No script of it may fail, and nothing is loaded from elsewhere."""
    context = browser.new_context(
        base_url=server.url, viewport={"width": 1100, "height": 900}, locale="en-GB"
    )
    context.set_default_timeout(SECONDS)
    one = context.new_page()
    wrong: list[str] = []
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.on(
        "request",
        lambda sent: (
            None if sent.url.startswith((server.url, "data:", "blob:")) else wrong.append(sent.url)
        ),
    )
    context.request.post("/login", data={"token": TOKEN})
    one.goto("/")
    yield one
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def made(server: Server) -> str:
    """A finished video."""
    video = server.call("POST", "/v1/videos", {**SMALL, "prompt": "a finished ball"}, HEADERS)[1]
    return wait(server, video["id"])


SMALL = {"prompt": "a red ball", "size": "48x32", "num_frames": 17, "num_inference_steps": 2}


def wait(server: Server, video_id: str) -> str:
    """The id once the video is made."""
    for _ in range(900):
        status, video = server.call("GET", f"/v1/videos/{video_id}", None, HEADERS)
        assert (status, video.get("error")) == (200, None), video
        if video["status"] == "completed":
            return video_id
        time.sleep(0.1)
    raise AssertionError(video)


def fill(page: Any, prompt: str, steps: str = "2") -> None:
    """The form for a small video."""
    page.fill("#prompt", prompt)
    page.check("input[name=num_frames][value='17']")
    if not page.locator("#own-size").is_visible():
        page.click("form summary")
    page.fill("#own-size", "48x32")
    page.fill("[name=num_inference_steps]", steps)


def until(page: Any, expression: str) -> None:
    """Wait until an expression is true. Playwright's own way needs eval, which the page forbids."""
    for _ in range(900):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never: {expression}")


def card(page: Any, prompt: str) -> Any:
    return page.locator(
        ".cards > li", has=page.get_by_role("heading", name=prompt, exact=True)
    ).first


def api(page: Any, prompt: str) -> dict[str, Any]:
    """What the API says of the newest video of a prompt."""
    videos = page.request.get("/v1/videos?limit=100").json()["data"]
    return next(video for video in videos if video["prompt"] == prompt)


def test_the_token_is_asked_once_and_kept_where_scripts_cannot_read_it(
    server: Server, browser: Any
) -> None:
    context = browser.new_context(base_url=server.url)
    page = context.new_page()
    page.goto("/")
    page.wait_for_selector("#login:not([hidden])")
    assert page.locator("#work").is_hidden()
    page.fill("#token", "another-token-of-somebody")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#token-problem').textContent")
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work:not([hidden])")
    page.reload()
    until(page, "document.querySelector('#state').textContent === 'ready'")
    assert page.locator("#login").is_hidden()
    (cookie,) = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.evaluate("document.cookie + localStorage.length + sessionStorage.length") == "00"
    page.click("#logout")
    page.wait_for_selector("#login:not([hidden])")
    assert context.request.get("/v1/videos").status == 401
    context.close()


def test_a_video_is_watched_while_it_is_made_and_after_a_reload_and_stopped(
    page: Any, made: str
) -> None:
    fill(page, "a long ball", LONG)
    page.click("#send")
    one = card(page, "a long ball")
    one.locator("canvas[data-step]").wait_for()
    first = int(one.locator("canvas").get_attribute("data-step"))
    assert f"of {LONG}" in one.locator(".stage").inner_text()
    # The picture has the shape of the video, and is not empty.
    size = one.locator("canvas").evaluate("c => [c.width, c.height]")
    assert size == [6, 4]
    colours = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert one.locator("canvas").evaluate(colours) > 4
    page.reload()
    one.locator("canvas[data-step]").wait_for()
    until(page, f"Number(document.querySelector('canvas[data-step]').dataset.step) > {first}")
    begins = "document.getElementById('estimate').textContent.includes('until it begins')"
    until(page, begins)
    video = api(page, "a long ball")
    one.get_by_role("button", name="Cancel").click()
    page.click("#confirm-no")
    assert one.count() == 1
    one.get_by_role("button", name="Cancel").click()
    page.click("#confirm-yes")
    one.wait_for(state="detached")
    assert page.request.get(f"/v1/videos/{video['id']}").status == 404
    until(page, f"!{begins}")
    assert " 0.0 GB" not in page.locator("#estimate").inner_text()


def test_words_that_the_model_does_not_read_are_told_while_they_are_written(page: Any) -> None:
    page.fill("#prompt", "一个红球")
    page.locator("#unread:has-text('一个红球')").wait_for()
    page.fill("#prompt", "a red ball")
    until(page, "document.getElementById('unread').textContent === ''")


def test_a_picture_starts_a_video_that_is_played_made_again_and_continued(page: Any) -> None:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), "blue").save(file, "PNG")
    blue = {"name": "blue.png", "mimeType": "image/png", "buffer": file.getvalue()}
    fill(page, "a blue ball")
    page.set_input_files("#file", blue)
    assert page.inner_text("#effect") == "The video starts with this picture."
    page.set_input_files("#file", {**blue, "name": "other.png"})
    assert page.inner_text("#effect") == "The video leads from the first picture to the second."
    page.get_by_role("button", name="Remove other.png").click()
    page.click("#send")
    one = card(page, "a blue ball")
    one.locator("video").wait_for()
    assert api(page, "a blue ball")["files"] == ["image"]
    assert page.locator("#files li").count() == 0

    one.locator("video").evaluate("v => { v.muted = true; return v.play(); }")
    until(page, "document.querySelector('#made video').currentTime > 0")
    corner = (
        "v => { const c = document.createElement('canvas'); c.width = c.height = 1;"
        "const d = c.getContext('2d'); d.drawImage(v, 0, 0, 1, 1);"
        "return [...d.getImageData(0, 0, 1, 1).data]; }"
    )
    red, _, blue_part, _ = one.locator("video").evaluate(corner)
    assert blue_part > red

    one.get_by_role("button", name="Same again").click()
    assert page.inner_text("#effect") == "All files are used as chosen."
    page.fill("#prompt", "a blue ball again")
    page.keyboard.press("Control+Enter")
    card(page, "a blue ball again").locator("video").wait_for()
    earlier, again = api(page, "a blue ball"), api(page, "a blue ball again")
    assert again["settings"] == earlier["settings"]
    assert again["files"] == ["image"]

    one.get_by_role("button", name="Continue this video").click()
    page.fill("#prompt", "it goes on")
    page.click("#send")
    card(page, "it goes on").locator("video").wait_for()
    assert api(page, "it goes on")["remixed_from_video_id"] == earlier["id"]


def test_what_the_server_refuses_is_said_beside_the_field(page: Any) -> None:
    fill(page, "a ball", "0")
    page.click("form summary")  # folded: it is opened where the mistake is
    page.click("#send")
    said = page.locator("#problem-num_inference_steps")
    said.wait_for()
    assert "num_inference_steps" in said.inner_text()
    assert page.evaluate("document.activeElement.name") == "num_inference_steps"
    page.fill("[name=num_inference_steps]", "2")
    page.fill("#own-size", "big")
    page.click("#send")
    until(page, "document.querySelector('#problem-size').textContent.includes('big')")
    assert said.inner_text() == ""
    page.set_input_files(
        "#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture at all"}
    )
    page.fill("#own-size", "48x32")
    page.click("#send")
    until(page, "document.querySelector('#problem-files').textContent")
    assert page.locator("#queue li").count() == 0


def test_the_keyboard_alone_sends_plays_and_deletes(page: Any, made: str) -> None:
    def tab_to(what: str, back: bool = False) -> None:
        for _ in range(80):
            if page.evaluate(f"document.activeElement.matches({what!r})"):
                return
            page.keyboard.press("Shift+Tab" if back else "Tab")
        raise AssertionError(f"the keyboard does not come to {what}")

    page.locator("#made video").first.wait_for()
    tab_to("#prompt")
    page.keyboard.type("a ball of the keyboard")
    tab_to("input[name=num_frames]")
    page.keyboard.press("ArrowLeft")
    tab_to("summary")
    page.keyboard.press("Enter")
    tab_to("[name=num_inference_steps]")
    page.keyboard.type("2")
    page.keyboard.press("Control+Enter")
    one = card(page, "a ball of the keyboard")
    one.locator("video").wait_for()
    video = api(page, "a ball of the keyboard")
    assert video["settings"]["num_frames"] == "17"
    tab_to(f"[data-id={video['id']}] button:last-child")
    question = page.locator("#confirm")
    page.keyboard.press("Enter")
    question.wait_for()
    page.keyboard.press("Escape")
    question.wait_for(state="hidden")
    assert one.count() == 1
    assert page.evaluate("document.activeElement.textContent") == "Delete"
    page.keyboard.press("Enter")
    question.wait_for()
    page.keyboard.press("Shift+Tab")  # it asks with the focus on what keeps the video
    page.keyboard.press("Enter")
    one.wait_for(state="detached")
    assert page.evaluate("document.activeElement.id") == "gallery"


def test_the_example_of_a_client_makes_watches_and_cancels_from_another_site(
    server: Server, browser: Any, site: int
) -> None:
    context = browser.new_context(viewport={"width": 760, "height": 900})
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))

    def ask(**fields: str) -> None:
        for name, value in fields.items():
            page.fill(f"#{name}", value)
        page.click("#send")

    def prompts() -> list[str]:
        return [one["prompt"] for one in server.call("GET", "/v1/videos", None, HEADERS)[1]["data"]]

    def said(words: str) -> None:
        until(page, f"document.querySelector('#status').textContent.includes({words!r})")

    page.goto(f"http://127.0.0.1:{site}/client.html")  # an origin that is not allowed
    ask(server=server.url, token=TOKEN)
    said(f"--allow-origin http://127.0.0.1:{site}")
    assert page.input_value("#prompt") not in prompts()

    page.goto(f"http://localhost:{site}/client.html")
    ask(server=f"{server.url}/", token="another-token-of-somebody")
    said("a token is needed")
    ask(token=TOKEN, size="<b>big</b>")
    said("<b>big</b>")
    assert page.locator("#status *").count() == 0

    ask(prompt="a ball of the client", size="48x32", num_frames="17", num_inference_steps=LONG)
    said(f"of {LONG}")
    until(page, "document.querySelector('#picture').naturalWidth > 0")
    page.click("#cancel")
    said("Cancelled.")
    assert page.locator("#picture").is_hidden()
    assert "a ball of the client" not in prompts()

    file = io.BytesIO()
    Image.new("RGB", (48, 32), "blue").save(file, "PNG")
    blue = {"name": "blue.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.set_input_files("#file", blue)
    ask(num_inference_steps="2")
    said("Done in")
    until(page, "document.querySelector('#video').currentTime > 0")
    newest = server.call("GET", "/v1/videos?limit=1", None, HEADERS)[1]["data"][0]
    assert (newest["prompt"], newest["files"]) == ("a ball of the client", ["input_reference"])
    with page.expect_download() as kept:
        page.click("#save")
    assert kept.value.suggested_filename == f"{newest['id']}.mp4"
    assert kept.value.path().read_bytes() == downloaded(server, newest["id"])

    # The page's own policy refuses HTML out of strings, whatever its script does.
    page.evaluate("() => { try { document.body.innerHTML = 'x'; } catch {} }")
    assert page.locator("#form").count() == 1
    assert context.cookies() == []
    context.close()
    assert wrong == []


def downloaded(server: Server, video_id: str) -> bytes:
    server.headers = HEADERS
    try:
        return server.content(video_id)
    finally:
        server.headers = {}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hinders_a_screen_reader_and_a_phone_shows_all(
    page: Any, made: str, language: str, scheme: str
) -> None:
    source = pytest.importorskip(
        "axe_playwright_python", reason="pip install axe-playwright-python"
    )
    axe = next(Path(source.__file__).parent.rglob("axe.min.js")).read_text(encoding="utf-8")
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 700})
    page.goto(f"/?lang={language}")
    page.locator("#made video").first.wait_for()
    page.click("form summary")
    page.locator("#made summary").first.click()
    page.fill("[name=num_inference_steps]", "0")
    page.fill("#prompt", "x")
    page.click("#send")
    page.locator("#problem-num_inference_steps").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.documentElement.lang") == language
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 26)"
    assert dark == (scheme == "dark")
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    bad = [
        (one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert bad == []
