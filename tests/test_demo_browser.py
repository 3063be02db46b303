"""The page of `capsnet demo` in a real browser, with the weights that come with the package."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image, ImageDraw

from capsnet.checkpoints import pretrained
from capsnet.demo.app import application
from capsnet.demo.serving import bind
from capsnet.demo.viewer import Viewer
from capsnet.evaluation.ood import Threshold
from capsnet.models import create
from tiny import SIZES, reading

pytestmark = pytest.mark.e2e
api = pytest.importorskip("playwright.sync_api", reason="the extra e2e is not installed: no playwright")
CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip(f"there is no {CHROMIUM} (apt-get install chromium)", allow_module_level=True)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SEVEN = [[(0.25, 0.25), (0.75, 0.22), (0.62, 0.5), (0.45, 0.82)]]
THREE = [[(0.3, 0.22), (0.5, 0.15), (0.66, 0.28), (0.48, 0.46), (0.68, 0.62), (0.52, 0.82), (0.28, 0.74)]]
PIXELS = """id => {
    const canvas = document.getElementById(id);
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    return [...copy.getImageData(0, 0, canvas.width, canvas.height).data];
}"""
SECONDS = 60_000  # milliseconds; the machine may be busy with other things


def serving(viewer: Viewer) -> Iterator[str]:
    """The address of a server that ends with the test."""
    with bind("127.0.0.1", 0) as listening:
        config = uvicorn.Config(application(viewer), lifespan="off", ws="none", log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    network, card = pretrained.load("capsnet-mnist"), pretrained.load_card("capsnet-mnist")
    yield from serving(
        Viewer(network, "capsnet-mnist", reading=card.reading(network.image_shape), threshold=card.threshold)
    )


@pytest.fixture(scope="module")
def colour_address() -> Iterator[str]:
    torch.manual_seed(0)
    sizes = {**SIZES, "routing_iterations": 1}
    network = create("capsnet", image_shape=(3, 24, 40), num_classes=12, **sizes).eval().requires_grad_(False)
    yield from serving(
        Viewer(network, "colour", reading=reading((3, 24, 40)), threshold=Threshold(1e-6, 0.05, 9, "train"))
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page that remembers what it asked for and what its console said."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector(".slider")

    def draw(self, strokes: list[list[tuple[float, float]]]) -> None:
        box = self.page.locator("#drawing").bounding_box()
        for points in strokes:
            first, *others = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
            self.page.mouse.move(*first)
            self.page.mouse.down()
            for point in others:
                self.page.mouse.move(*point, steps=5)
            self.page.mouse.up()

    def winner(self, name: str) -> None:
        """Wait until the page names this winner."""
        self.page.wait_for_function("name => document.getElementById('winner').textContent === name", arg=name)

    def pixels(self, canvas: str) -> list[int]:
        found: list[int] = self.page.evaluate(PIXELS, canvas)
        return found

    def changed(self, canvas: str, before: list[int]) -> list[int]:
        """The pixels of a canvas as soon as they are not those of before."""
        code = f"([id, before]) => JSON.stringify(({PIXELS})(id)) !== JSON.stringify(before)"
        self.page.wait_for_function(code, arg=[canvas, before])
        return self.pixels(canvas)

    def rest(self) -> None:
        """Wait until the page asks for nothing."""
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_timeout(300)


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    one = Visit(browser, address)
    yield one
    one.rest()
    assert one.said == []
    assert one.asked
    assert {url.split("/")[2] for url in one.asked} == {address.removeprefix("http://")}
    one.context.close()


def test_what_is_drawn_is_recognised(visit: Visit) -> None:
    page = visit.page
    assert page.locator("body.empty").count() == 1
    visit.draw(SEVEN)
    visit.winner("7")
    page.wait_for_function("() => document.getElementById('said').textContent.startsWith('Winner: 7')")
    assert page.locator(".bar.present").count() == 1
    assert page.locator(".bar.present .name").inner_text() == "7"
    assert page.locator("#verdict").inner_text().startswith("length 0.9")  # and nothing of another kind
    seen = torch.tensor(visit.pixels("seen")).view(28, 28, 4)[..., 0].float()
    rows, columns = (seen > 76).any(1).nonzero(), (seen > 76).any(0).nonzero()
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) + 1 in (20, 21)  # as in MNIST
    assert float((seen.sum(0) * torch.arange(28)).sum() / seen.sum()) == pytest.approx(14, abs=0.5)
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#winner").inner_text() == ""
    assert max(visit.pixels("drawing")[:3]) == 0
    visit.draw(THREE)
    visit.winner("3")


def test_the_keyboard_moves_a_dimension_and_resets_it(visit: Visit) -> None:
    page = visit.page
    visit.draw(SEVEN)
    visit.winner("7")
    visit.rest()
    before = visit.pixels("redrawn")
    assert max(before) == 255
    slider = page.get_by_label("Dimension 5", exact=True)
    slider.focus()
    assert page.locator("#sweep-title").inner_text() == "Sweep of dimension 5"
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "0.2"
    assert "+0.20 from the image" in (slider.get_attribute("aria-valuetext") or "")
    moved = visit.changed("redrawn", before)
    assert sum(abs(a - b) for a, b in zip(moved, before, strict=True)) > 3 * 28 * 28
    visit.rest()
    sweep = page.evaluate("[...document.querySelectorAll('#sweep canvas')].map((cell) => cell.toDataURL())")
    assert len(set(sweep)) == 11
    here = page.evaluate("[...document.querySelectorAll('#sweep canvas')].findIndex((c) => c.className === 'here')")
    assert here == 9  # +0.20
    page.keyboard.press("Shift+Tab")  # back to the slider before, and on to Reset
    page.get_by_role("button", name="Reset").focus()
    page.keyboard.press("Enter")
    visit.rest()
    assert visit.pixels("redrawn") == before
    assert slider.input_value() == "0"


def test_another_capsule_is_chosen_with_the_keyboard(visit: Visit) -> None:
    page = visit.page
    visit.draw(SEVEN)
    visit.winner("7")
    visit.rest()
    before = visit.pixels("redrawn")
    page.get_by_label("Follow the longest").focus()
    for _ in range(4):
        page.keyboard.press("ArrowDown")
    visit.changed("redrawn", before)
    assert page.locator("#redrawn-caption").inner_text() == "What capsule 3 redraws"
    assert page.locator("#winner").inner_text() == "7"


def test_everything_is_reached_and_shown_by_the_keyboard(visit: Visit) -> None:
    page = visit.page
    visit.draw(SEVEN)
    visit.winner("7")
    visit.page.get_by_label("Dimension 1", exact=True).focus()
    page.evaluate("document.activeElement.blur()")
    wanted = {"clear", "file", "overlay", *(f"dimension-{k}" for k in range(16))}
    reached: set[str] = set()
    outlined = "getComputedStyle(document.activeElement.closest('label, input, button')).outlineStyle"
    for _ in range(30):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id")
        reached.add(name)
        if name and name != "overlay":
            assert page.evaluate(outlined) == "solid", name
    assert wanted <= reached
    page.locator("#overlay").focus()
    assert page.evaluate("getComputedStyle(document.querySelector('.knob')).outlineStyle") == "solid"


def test_the_coupling_map_lies_over_the_drawing_at_each_iteration(visit: Visit) -> None:
    page = visit.page
    visit.draw(SEVEN)
    visit.winner("7")
    visit.rest()
    assert not any(url.endswith("/api/evidence") for url in visit.asked)  # computed only when it is shown
    assert not page.locator("#coupling-map").is_visible()
    page.locator("#overlay").focus()
    page.keyboard.press("Space")
    page.wait_for_selector("#coupling-map", state="visible")
    maps = [page.evaluate("document.getElementById('coupling-map').toDataURL()")]
    drawing, shown = page.locator("#drawing").bounding_box(), page.locator("#coupling-map").bounding_box()
    assert drawing == shown
    texts = [page.locator("#overlay-text").inner_text()]
    page.locator("#iteration").focus()
    for iteration in (2, 1):
        page.keyboard.press("ArrowLeft")
        assert page.locator("#iteration-value").inner_text() == f"{iteration} of 3"
        maps.append(page.evaluate("document.getElementById('coupling-map').toDataURL()"))
        texts.append(page.locator("#overlay-text").inner_text())
    assert len(set(maps)) == len(set(texts)) == 3
    asked = len(visit.asked)
    page.keyboard.press("ArrowRight")
    visit.rest()
    assert len(visit.asked) == asked  # all iterations came at once
    page.locator("#overlay").focus()
    page.keyboard.press("Space")
    assert not page.locator("#coupling-map").is_visible()


def test_the_couplings_of_attention_are_called_by_their_names(browser: Any) -> None:
    network, card = pretrained.load("efficient-capsnet-mnist"), pretrained.load_card("efficient-capsnet-mnist")
    for place in serving(Viewer(network, "attention", reading=card.reading(network.image_shape), threshold=None)):
        visit = Visit(browser, place)
        visit.draw(SEVEN)
        visit.winner("7")
        visit.page.locator("#overlay").check(force=True)
        visit.page.wait_for_selector("#coupling-map", state="visible")
        assert visit.page.locator("#iteration-field").inner_text().split() == ["Couplings", "attention"]
        visit.page.locator("#iteration").focus()
        visit.page.keyboard.press("ArrowLeft")
        assert visit.page.locator("#iteration-value").inner_text() == "uniform"
        assert visit.said == []
        visit.context.close()


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """A photograph, so to speak: a dark seven on light paper, off the middle."""
    image = Image.new("L", (300, 220), 235)
    ImageDraw.Draw(image).line([(150, 40), (230, 40), (180, 150)], fill=30, width=12)
    image.save(tmp_path / "seven.png")
    return tmp_path / "seven.png"


def test_an_image_file_is_chosen_or_dropped(visit: Visit, sheet: Path, tmp_path: Path) -> None:
    page = visit.page
    page.set_input_files("#file", str(sheet))
    visit.winner("7")
    assert "light and dark were swapped" in page.locator("#verdict").inner_text()
    assert max(visit.pixels("seen")[:4:2]) == 0  # its corner is dark now
    page.get_by_role("button", name="Clear").click()
    code = """text => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(text)], "seven.png", { type: "image/png" }));
        document.getElementById("pad").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
    }"""
    page.evaluate(code, list(sheet.read_bytes()))
    visit.winner("7")
    visit.rest()


def test_a_wrong_file_is_told_and_forgotten(browser: Any, address: str, tmp_path: Path) -> None:
    visit = Visit(browser, address)
    (tmp_path / "broken.png").write_bytes(b"no image")
    visit.page.set_input_files("#file", str(tmp_path / "broken.png"))
    visit.page.wait_for_function("() => document.getElementById('notice').textContent.startsWith('image must be')")
    visit.draw(SEVEN)
    visit.winner("7")
    assert visit.page.locator("#notice").inner_text() == ""
    visit.context.close()


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_scrolls_sideways(browser: Any, address: str, width: int, scheme: str) -> None:
    visit = Visit(browser, address, color_scheme=scheme)
    page = visit.page
    page.set_viewport_size({"width": width, "height": 740})
    page.locator("#drawing").scroll_into_view_if_needed()
    visit.draw(SEVEN)
    visit.winner("7")
    page.locator("#overlay").check(force=True)
    page.wait_for_selector("#coupling-map", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground.split("(")[1].split(",")[0]) > 128) == (scheme == "light")
    beyond = "(e) => e.getBoundingClientRect().right > innerWidth"
    outside = page.evaluate(
        f"[...document.querySelectorAll('main *')].filter({beyond}).map((e) => e.id || e.className)"
    )
    assert outside == []
    page.locator("#dimension-15").scroll_into_view_if_needed()  # its effect stays in view: beside it, or above
    stage = page.locator("#redrawn-again" if width < 760 else "#sweep").bounding_box()
    assert 0 <= stage["y"] < 740
    visit.context.close()


def test_motion_stops_where_it_is_not_wanted(browser: Any, address: str) -> None:
    for wish, wanted in (("reduce", "0s"), ("no-preference", "0.12s")):
        visit = Visit(browser, address, reduced_motion=wish)
        code = "getComputedStyle(document.querySelector('.bar .fill')).transitionDuration"
        assert visit.page.evaluate(code) == wanted
        visit.context.close()


def test_a_network_for_colour_images_of_other_sizes(browser: Any, colour_address: str) -> None:
    visit = Visit(browser, colour_address)
    page = visit.page
    box = page.locator("#drawing").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(40 / 24, rel=0.02)
    page.locator("#pen").evaluate("e => { e.value = '#ff0000'; e.dispatchEvent(new Event('input')); }")
    visit.draw([[(0.1, 0.5), (0.9, 0.5)]])
    page.wait_for_function("() => !document.body.classList.contains('empty')")
    visit.rest()
    seen = torch.tensor(visit.pixels("seen")).view(24, 40, 4)
    assert seen[12, 20].tolist() == [255, 0, 0, 255]
    assert seen[0, 0].tolist() == [0, 0, 0, 255]
    assert page.locator(".bar").count() == 13
    assert "perhaps none of the classes" in page.locator("#verdict").inner_text()
    page.locator("#overlay").check(force=True)
    page.wait_for_selector("#coupling-map", state="visible")
    for name in ("#iteration", "#iteration-field"):
        assert not page.locator(name).is_visible()  # of one iteration there is nothing to choose
    assert visit.said == []
    visit.context.close()
