"""The page of a server in a real browser: what people do with it, by mouse, keys and links.

Run by `make test-browser`, which installs Debian's chromium where it can.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nar.serving.app import App
from nar.serving.jobs import Store
from nar.serving.models import Served
from serving_tools import serving, wait_until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `make test-browser` installs Debian's, as root"),
]
SECONDS = 120  # for one thing to happen, on a machine that does other work
DONE = "#stop[hidden]"
COLLECT = """() => {  // every picture that the first tile shows while it grows
  window.seen = new Set();
  const small = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
  const look = () => {
    const canvas = document.querySelector(".tile canvas:not([hidden])");
    if (canvas && /front/.test(document.querySelector("#progress").textContent)) {
      small.getContext("2d").drawImage(canvas, 0, 0, 64, 64);
      window.seen.add(small.toDataURL());
    }
    requestAnimationFrame(look);
  };
  look();
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, App]]:
    models = [Served.load(name) for name in ("fashion", "emoji", "clips")]
    with serving(models, store=Store(tmp_path_factory.mktemp("jobs"))) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: tuple[str, App]) -> Iterator[Callable[..., Any]]:
    """Open the page as a new visitor; at the end nothing may have been wrong, and nothing asked of others.

    `allowed` is a pattern of what the browser may complain of.
    """
    contexts, wrong = [], []

    def opened(
        fragment: str = "",
        *,
        url: str = server[0],
        allowed: str = "$^",
        ready: str = "html[data-ready]",
        **options: Any,
    ) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)

        def said(message: Any) -> None:
            if message.type in ("error", "warning") and not re.search(allowed, message.text):
                wrong.append(message.text)

        def asked(request: Any) -> None:
            if not request.url.startswith((f"{url}/", f"blob:{url}/")):
                wrong.append(request.url)

        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        page.goto(f"{url}/{fragment}")
        page.wait_for_selector(ready)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def choose(page: Any, name: str, value: str) -> None:
    """Click a radio button that looks like a card or a chip."""
    page.locator(f'label:has([name={name}][value="{value}"])').click()


def generate(page: Any, number: int = 1, button: str = "#generate") -> None:
    """Press Generate, and wait for all results."""
    before = page.locator("#items li").count()
    page.fill("#n", str(number))
    page.click(button)
    page.wait_for_selector(f"#items li:nth-child({before + number})")
    page.wait_for_selector(f".tile:nth-child({number}) .result:not([hidden])")
    page.wait_for_selector(DONE, state="attached")


def pixels(page: Any, selector: str) -> str:
    """What a picture of the page shows, as text."""
    page.wait_for_selector(selector)  # the gallery comes after the page
    shown: str = page.eval_on_selector(
        selector,
        """async (image) => {
          await image.decode();
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
          canvas.getContext("2d").drawImage(image, 0, 0);
          return canvas.toDataURL();
        }""",
    )
    return shown


def check_accessible(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_a_picture_grows_and_is_kept(visit: Callable[..., Any]) -> None:
    page = visit()
    choose(page, "model", "emoji")
    page.fill("#prompt", "a red apple")
    for _ in range(3):  # beside other work a browser shows fewer frames
        page.evaluate(COLLECT)
        generate(page)
        if page.evaluate("window.seen.size") >= 8:
            break
    assert page.evaluate("window.seen.size") >= 8
    assert page.get_attribute(".tile img", "alt") == "a red apple"
    result = pixels(page, ".tile img")
    page.fill("#front", "9")
    assert page.is_hidden(".tile img")
    assert page.is_visible(".tile canvas")
    page.fill("#front", "31")
    assert page.is_visible(".tile img")
    check_accessible(page)
    page.reload()
    assert pixels(page, "#items img") == result
    choose(page, "model", "emoji")
    page.focus("#prompt")
    page.keyboard.press("ArrowUp")
    assert page.input_value("#prompt") == "a red apple"


def test_a_link_generates_the_same(visit: Callable[..., Any]) -> None:
    page = visit()
    choose(page, "class_label", "sneaker")
    page.fill("#guidance_scale", "1.75")
    generate(page, number=2)
    page.click(".tile:nth-child(2) img")
    assert page.text_content("#viewer-title") == "sneaker"
    check_accessible(page)
    page.click("#link")
    page.wait_for_selector("#viewer-status:has-text('copied')")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.get_attribute("#link", "href")
    other = visit(link[link.index("#") :])
    other.wait_for_selector(".tile:nth-child(2) .result:not([hidden])")
    other.wait_for_selector(DONE, state="attached")
    for place in (1, 2):
        selector = f".tile:nth-child({place}) img"
        assert pixels(other, selector) == pixels(page, selector)
    assert pixels(page, ".tile:nth-child(1) img") != pixels(page, ".tile:nth-child(2) img")
    page.click("#again")
    page.wait_for_selector("#items li:nth-child(4)")
    page.wait_for_selector(DONE, state="attached")
    assert pixels(page, ".tile:nth-child(2) img") == pixels(other, ".tile:nth-child(2) img")
    page.click("#items button")
    page.click("#delete")
    page.wait_for_selector("#items li:nth-child(4)", state="detached")
    page.click("#close")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#empty")
    page.wait_for_selector("#items li", state="detached")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#items li").count() == 0


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        ("#seed=1&temprature=2", "The link has a setting temprature"),
        ("#seed=1&class_label=spaceship", "fashion has no class spaceship"),
        ("#seed=1&prompt=boot", "fashion takes no prompt"),
        ("#seed=1&model=dalle", "The model dalle is not on this server"),
    ],
)
def test_a_wrong_link_says_what_is_wrong(visit: Callable[..., Any], fragment: str, said: str) -> None:
    page = visit(fragment)
    assert said in page.text_content("#error")
    assert page.is_hidden("#stop")


def test_a_download_has_its_settings_and_brings_them_back(visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit()
    choose(page, "class_label", "ankle boot")
    generate(page)
    page.click("#items button")
    page.wait_for_selector("#download[href^=blob]")
    with page.expect_download() as waiting:
        page.click("#download")
    path = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(path)
    with Image.open(path) as picture:
        picture.load()
        told = json.loads(picture.text["parameters"])
    assert told["model"] == "fashion"
    assert told["class_label"] == "ankle boot"
    assert path.name == f"fashion-ankle-boot-{told['seed']}.png"
    other = visit()
    other.set_input_files("#file", path)
    other.wait_for_selector("#editor:not([hidden])")
    assert other.input_value("#seed") == str(told["seed"])
    assert other.is_checked('[value="ankle boot"]')
    assert other.is_checked("#keep")


def test_what_is_painted_is_redrawn(visit: Callable[..., Any]) -> None:
    page = visit()
    choose(page, "class_label", "sneaker")
    generate(page)
    page.click(".tile img")
    page.click("#edit")
    page.wait_for_selector("#mask:focus")
    page.click("#generate")
    assert "Nothing is painted" in page.text_content("#error")
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.6 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.7 * box["height"], steps=5)
    page.mouse.up()
    stroke = int(page.text_content("#mask-state").split()[0])
    assert 6 <= stroke <= 30
    page.click("#undo")
    assert page.text_content("#mask-state").startswith("0 of 64")
    page.click("#invert")
    assert page.text_content("#mask-state").startswith("64 of 64")
    page.click("#clear")
    choose(page, "tool", "rectangle")
    page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + 0.55 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + 0.95 * box["height"], steps=3)
    page.mouse.up()
    assert page.text_content("#mask-state").startswith("16 of 64")
    check_accessible(page)
    page.fill("#seed", "5")
    choose(page, "class_label", "bag")
    generate(page, button="#redraw")
    changed = page.evaluate(
        """async () => {  // where the new picture differs from the old one
          const data = async (image) => {
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [32, 32];
            const pen = canvas.getContext("2d");
            pen.drawImage(image, 0, 0);
            return pen.getImageData(0, 0, 32, 32).data;
          };
          const [made, old] = await Promise.all([...document.querySelectorAll("#items img")].slice(0, 2).map(data));
          return Array.from({ length: 1024 }, (_, place) => made[4 * place] !== old[4 * place]);
        }"""
    )
    places = [(place // 32, place % 32) for place, is_other in enumerate(changed) if is_other]
    assert len(places) > 50
    assert all(row >= 16 and column >= 16 for row, column in places)
    page.click("#items button")
    assert page.is_hidden("#link")  # the picture that was edited is not in it
    page.click("#again")
    page.wait_for_selector("#items li:nth-child(3)")
    page.wait_for_selector(DONE, state="attached")
    assert pixels(page, "#items li:nth-child(1) img") == pixels(page, "#items li:nth-child(2) img")
    page.click("#leave")
    assert page.text_content("#generate") == "Generate"


def test_everything_by_keys(visit: Callable[..., Any]) -> None:
    page = visit()
    press = page.keyboard.press

    def tab_to(selector: str) -> None:
        for _ in range(60):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            press("Tab")
        raise AssertionError(f"no tab leads to {selector}")

    tab_to("[name=model]")
    tab_to("[name=class_label]")
    press("ArrowRight")
    assert page.is_checked("[value=t-shirt]")
    tab_to("#n")
    press("Control+a")
    page.keyboard.type("1")
    press("Enter")  # in a field it submits the form
    page.wait_for_selector(".tile .result:not([hidden])")
    page.wait_for_selector(DONE, state="attached")
    tab_to(".result button")
    press("Enter")
    page.wait_for_selector("dialog[open]")
    tab_to("#edit")
    press("Enter")
    page.wait_for_selector("#mask:focus")
    for key in ("ArrowLeft", "ArrowUp", "Shift+ArrowRight", "Enter"):
        press(key)
    assert page.text_content("#mask-state").startswith("20 of 64")
    assert page.input_value("#rect-width") == "5"
    for key in ("i", "z", "Delete", "z", "e", "]", "["):
        press(key)
    assert page.is_checked("[value=eraser]")
    assert page.text_content("#mask-state").startswith("20 of 64")
    tab_to("#rect-x")
    press("ArrowUp")
    tab_to("#rect-add")
    press("Enter")
    assert page.text_content("#mask-state").startswith("20 of 64")
    page.keyboard.press("Shift+Tab")
    page.focus("#generate")
    press("Enter")
    page.wait_for_selector("#items li:nth-child(2)")
    page.wait_for_selector(DONE, state="attached")


def test_stop_frees_the_model(visit: Callable[..., Any], server: tuple[str, App]) -> None:
    page = visit()
    choose(page, "model", "emoji")
    page.fill("#n", "10")
    page.click("#generate")
    page.wait_for_selector("#progress:has-text('front')")
    batcher = server[1].models["emoji"].batcher
    assert batcher.running > 0
    page.click("#stop")
    page.wait_for_selector("#progress:has-text('Stopped')")  # the answer ends a moment later
    wait_until(lambda: batcher.running + batcher.waiting == 0)
    assert page.is_enabled("#generate")
    choose(page, "model", "clips")
    page.click("#more summary")
    page.fill("#num_frames", "400")
    page.fill("#n", "2")
    page.click("#generate")
    page.wait_for_selector("#progress:has-text('front')")
    page.keyboard.press("Escape")
    page.wait_for_selector("#progress:has-text('Stopped')")  # the answer ends a moment later
    jobs = server[1].videos.store.jobs
    wait_until(lambda: all(job["status"] == "completed" for job in jobs()))


def test_a_clip_plays_and_continues(visit: Callable[..., Any]) -> None:
    page = visit()

    def of_video(name: str, selector: str = ".tile video") -> Any:
        return page.eval_on_selector(selector, f"video => video.{name}")

    choose(page, "model", "clips")
    choose(page, "class_label", "food-drink")
    generate(page)
    wait_until(lambda: of_video("currentTime") > 0.2, SECONDS)
    assert of_video("videoWidth") == 64
    page.click("#items button")
    check_accessible(page)
    page.click("#extend")
    page.wait_for_selector("#source:not([hidden])")
    page.click("#more summary")
    page.fill("#num_frames", "26")
    generate(page)
    wait_until(lambda: (of_video("duration") or 0) > 4, SECONDS)
    assert of_video("duration", "#items li:nth-child(2) video") < 4


def test_the_server_s_errors_are_shown(visit: Callable[..., Any]) -> None:
    page = visit(allowed="status of 400")
    choose(page, "model", "emoji")
    page.fill("#guidance_scale", "1")
    page.click("#more summary")
    page.fill("#negative_prompt", "blue")
    page.click("#generate")
    page.wait_for_selector("#error:not([hidden])")
    assert page.text_content("#error").startswith("negative_prompt needs guidance")
    assert page.is_enabled("#generate")
    check_accessible(page)


def test_many_classes_are_typed(visit: Callable[..., Any], server: tuple[str, App]) -> None:
    page = visit()
    card = server[1].models["fashion"].card()
    names = [*card["class_names"], *(f"thing {number}" for number in range(990))]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{**card, "class_names": names}]}))
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.fill("input[name=class_label]", "sandal")
    generate(page)
    assert page.get_attribute(".tile img", "alt") == "sandal"
    check_accessible(page)


def test_a_broken_connection_is_said(visit: Callable[..., Any]) -> None:
    page = visit(allowed="ERR_FAILED")
    page.route("**/generations", lambda route: route.abort())
    page.click("#generate")
    page.wait_for_selector("#error:has-text('can\\'t be reached')")
    page.route("**/generations", lambda route: route.fulfill(content_type="text/event-stream", body=": accepted\n\n"))
    page.click("#generate")
    page.wait_for_selector("#error:has-text('before its last picture')")
    assert page.is_enabled("#generate")


def test_a_full_server_is_asked_again(visit: Callable[..., Any]) -> None:
    page = visit(allowed="status of 503")
    tries = []

    def refuse_once(route: Any) -> None:
        tries.append(route.request.url)
        if len(tries) > 1:
            return route.continue_()
        error = {"message": "the queue is full; try again in 2.0 s", "type": "x", "param": None, "code": None}
        return route.fulfill(status=503, headers={"retry-after-ms": "2000"}, json={"error": error})

    page.route("**/generations", refuse_once)
    page.click("#generate")
    page.wait_for_selector("#progress:has-text('asking again in')")
    assert "the queue is full" in page.text_content("#progress")
    page.wait_for_selector(".tile .result:not([hidden])")
    assert len(tries) == 2


def test_a_key_is_asked_for(visit: Callable[..., Any], toy_folder: Path) -> None:
    with serving([Served.load(f"toy={toy_folder}")], keys=["secret"]) as (url, _):
        page = visit("", url=url, allowed="status of 401", ready="#key-dialog[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#error:has-text('a key is needed')")
        page.reload()
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready]")
        assert page.text_content("#models strong") == "toy"
        check_accessible(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_room_for_all(visit: Callable[..., Any], scheme: str) -> None:
    size = {"width": 360, "height": 740}
    page = visit(color_scheme=scheme, viewport=size, has_touch=True, reduced_motion="reduce")
    generate(page)
    assert page.is_hidden("#growth")  # nothing moves
    page.click(".tile img")
    check_accessible(page)
    page.click("#edit")
    page.wait_for_selector("#mask:focus")
    box = page.locator("#mask").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert not page.text_content("#mask-state").startswith("0 of")
    check_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    small = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, summary, a")].filter((one) => {
          const box = (one.closest("label") ?? one).getBoundingClientRect();
          return box.width && Math.min(box.width, box.height) < 24;
        }).map((one) => one.outerHTML)"""
    )
    assert small == []
