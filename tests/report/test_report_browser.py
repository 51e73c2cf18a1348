"""The pages in a real browser: drawn, silent, without a network, in both colour schemes, on a phone and on paper."""

import io
import re
import shutil

import pytest
import report_folders

from openrlhf_sgpo.report import write_report
from openrlhf_sgpo.report.live import LivePage

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# No sandbox: containers run as root. The rest keeps the browser itself from asking for anything.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
# Plots of each folder, and an element that only its own kind of plot has.
PAGES = {
    "run": (lambda folder: report_folders.make_run(folder, radius=0.1), 17, ".barlayer .point path"),
    "plays": (report_folders.make_play_run, 10, ".scatterlayer .errorbar"),
    "comparison": (report_folders.make_comparison, 6, ".heatmaplayer image"),
    "leaderboard": (report_folders.make_leaderboard, 5, ".polarlayer .scatterlayer path.js-line"),
}
TRACES = ".main-svg .trace, .main-svg .hm"
# Of the page and of the writing in a plot, once the latter is no longer ``before``.
COLOURS = """async before => {
  const fill = () => getComputedStyle(document.querySelector(".plot .xtick text")).fill;
  while (fill() === before) await new Promise(requestAnimationFrame);
  return [getComputedStyle(document.body).backgroundColor, fill()];
}"""
# Plots are drawn again a moment after the window has changed. Not wait_for_function, which the page's policy forbids.
FITS = """async width => {
  const all = () => [document.documentElement, ...document.querySelectorAll(".plot .main-svg")];
  while (!all().every(element => Math.max(element.scrollWidth, element.getBoundingClientRect().right) <= width))
    await new Promise(requestAnimationFrame);
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    made = {name: make(tmp_path_factory.mktemp("browser") / name) for name, (make, _, _) in PAGES.items()}
    return {name: write_report(folder).as_uri() for name, folder in made.items()}


@pytest.fixture
def visit(browser):
    """Opens a page and returns it; in the end no page has said or asked for anything."""
    opened, noticed = [], []

    def open_page(address, width=1200, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(120_000)  # milliseconds; a busy machine takes its time
        opened.append(page)
        page.on("console", lambda message: noticed.append(message.text))
        page.on("pageerror", lambda error: noticed.append(str(error)))
        page.on("dialog", lambda dialog: noticed.append(dialog.message))
        page.on("request", lambda request: request.url == address or noticed.append(request.url))
        page.route(lambda url: not url.startswith("file:"), lambda route: route.abort())
        page.goto(address)
        page.wait_for_selector(".plot .main-svg")
        return page

    yield open_page
    for page in opened:
        page.close()
    assert noticed == []


def luminance(colour):
    """Of rgb(r, g, b): the mean of the channels, 0 to 1."""
    return sum(map(float, colour[4:-1].split(","))) / 3 / 255


@pytest.mark.parametrize("name", PAGES)
def test_every_plot_is_drawn_and_what_models_wrote_does_not_run(name, addresses, visit):
    _, count, element = PAGES[name]
    page = visit(addresses[name])
    traces = page.eval_on_selector_all(".plot", f"all => all.map(plot => plot.querySelectorAll('{TRACES}').length)")
    assert len(traces) == count and all(traces)
    assert page.locator(element).count() > 0
    widths = page.eval_on_selector_all(".plot .main-svg", "all => all.map(plot => plot.getBoundingClientRect().width)")
    assert min(widths) > 200
    assert page.title() == name
    assert page.locator("img, .answer script, .answer b, .prompt script").count() == 0
    assert any(report_folders.EVIL in text for text in page.locator(".answer p").all_text_contents())


@pytest.mark.parametrize("name", PAGES)
def test_colours_follow_the_scheme(name, addresses, visit):
    page = visit(addresses[name])
    light = page.evaluate(COLOURS, "none")
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(COLOURS, light[1])
    assert luminance(light[0]) > 0.9 and luminance(light[1]) < 0.5
    assert luminance(dark[0]) < 0.1 and luminance(dark[1]) > 0.5
    page.emulate_media(media="print", color_scheme="dark")  # paper is white
    assert page.evaluate(COLOURS, dark[1]) == light
    assert visit(addresses[name], scheme="dark").evaluate(COLOURS, "none") == dark


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_screen(name, addresses, visit):
    page = visit(addresses[name], width=800)
    for width in (800, 360):  # as it is turned, or comes to a phone
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate(FITS, width)


def test_a_screenshot_shows_something(addresses, visit):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    page = visit(addresses["run"])
    shot = image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    counts = sorted((count for count, _ in shot.getcolors(shot.width * shot.height)), reverse=True)
    # Mostly page, but not only.
    assert len(counts) > 50 and 0.02 < 1 - counts[0] / (shot.width * shot.height) < 0.8


def test_the_page_of_a_run_that_goes_on_loads_itself_again(tmp_path, visit):
    folder = report_folders.make_play_run(tmp_path / "plays")
    live = LivePage(folder, writes=True)
    live.begin_stage("stage 2 of 5, round 1: play, about 3 min left", 1, 5)
    page = visit((folder / "report.html").as_uri(), width=360)
    page.evaluate(FITS, 360)
    banner = page.locator(".running")
    assert "Stage 2 of 5, round 1: play, about 3 min left." in banner.inner_text()
    assert re.search("(seconds|minutes) ago", banner.inner_text()) and "UTC" not in banner.inner_text()
    live.end([])
    # Half a minute later the page is another one, which nobody has asked for.
    page.wait_for_selector(".running", state="detached", timeout=120_000)
    assert page.locator("progress").count() == 0
