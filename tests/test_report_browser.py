"""The page of a run in headless Chromium, at the widths of a phone and of a wide screen."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

import pytest

from conjopt.report import History, write_html

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (400, 1600)
NAME = "a run of <script>alert('ü')</script> & \"quotes\", and averylongnamewithoutanyspace" * 2


def record(step):
    hard = 300 <= step < 340
    return {
        "step": step,
        "limited_by": ("edge", "Polyak cap", "trust region")[step // 50 % 3],
        "loss": math.nan if step == 200 else 2 / step**0.5 + 0.3,
        "data_floor": 0.3,
        "excess_loss": 2 / step**0.5,
        "step_size": 1 / step**0.4,
        "limits/edge": 1.5 / step**0.4,
        "limits/Polyak cap": 2 / step**0.4,
        "limits/trust region": math.inf if hard else 1 / step**0.4,
        "slope": 0.4 / step**0.5,
        "raw_slope": 0.6 / step**0.5,
        "curvature": 1 + math.sin(step / 50) ** 2,
        "correlation": 0.3 + 0.2 * math.cos(step / 80),
        "batch_size": 64,
        "recommended_batch_size": 64 + step,
        "noise_scale": 20.0 + step,
        "gradient_energy": 5 / step,
        "lo": 3.0,
        "hi": 40 + step / 10,
        "lower": 0.1 / step**0.5,
        "risk": 2 / step**0.5,
        "upper": 9 / step**0.5,
        "conditions/C1": "fails" if hard else "holds",
        "conditions/C2": "unknown",
        "conditions/C3": "holds" if step > 100 else "unknown",
        "conditions/C4": "holds",
        "skipped_steps": step // 100,
        NAME: float(step),
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name, as files."""
    folder = tmp_path_factory.mktemp("report page ü")
    one, several = History(folder / "one.jsonl"), History(folder / "several.jsonl")
    with one, several:
        for step in range(1, 600):
            one.record(**record(step))
        for model in ("mlp", NAME):
            for seed in range(3):
                for step in range(1, 50):
                    several.record(
                        model=model,
                        seed=seed,
                        step=step,
                        train_loss=(seed + 1) / step,
                        step_size=0.1,
                    )
    found = {}
    for history in (one, several):
        found[history.path.stem] = history.path.with_suffix(".html")
        write_html(history, found[history.path.stem], title=NAME)
    empty = folder / "empty.html"
    write_html(History(), empty)
    return found | {"empty": empty}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, pages):
    """Open a page; what it said and asked for is checked at the end."""
    contexts, complaints, requests = [], [], []

    def open_page(name, width=1600, scheme="light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints
    assert len(requests) == len(contexts), requests  # of each page nothing but itself
    assert all(request.startswith("file:") for request in requests)


def pictured(page, path):
    """Keep a picture of the whole page. On a busy machine Chromium may fail to make one in time."""
    for left in (2, 1, 0):
        try:
            page.screenshot(path=path, full_page=True)
            return
        except playwright.Error as error:
            if not left or "Unable to capture screenshot" not in str(error):
                raise


def luminance(colour):
    """Relative luminance (WCAG 2) of a computed colour."""
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "several", "empty"])
def test_a_page_fits_its_window(open_page, name, width, scheme, tmp_path):
    page = open_page(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    beyond = page.evaluate(
        """[...document.querySelectorAll("h1,h2,h3,p,li,figure,dl,svg")]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"""
    )
    assert not beyond
    pictured(page, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000


def test_every_panel_is_there_and_seen(open_page):
    for width in WIDTHS:
        page = open_page("one", width)
        headings = page.locator("h2")
        assert headings.all_inner_texts() == [
            "Loss and data floor",
            "Step size and what limits it",
            "Slope and curvature",
            "Gradient correlation and batch size",
            "The sandwich: energy, lo and hi",
            "Conditions of convergence",
            "Also recorded",
            "The last values",
        ]
        for heading in headings.all():
            assert heading.is_visible()
        charts = page.locator("figure > svg")
        assert charts.count() == 12
        for chart in charts.all():
            box = chart.bounding_box()
            assert box["width"] > 250
            assert box["height"] > 60
            # Text of a chart is as large as text can be read.
            size = chart.evaluate(
                "e => e.getBoundingClientRect().width / e.viewBox.baseVal.width * 12"
            )
            assert size >= 9
        told = page.locator("header li").all_inner_texts()
        assert "599 records, steps 1 to 599." in told
        assert any("trust region" in line for line in told)
        assert any("was NaN in 1 record" in line for line in told)
        assert page.locator("#conditions rect.fails").count() >= 1


def test_names_of_any_kind_are_text(open_page):
    page = open_page("one")
    assert page.title() == NAME
    assert page.locator("h1").inner_text() == NAME
    assert page.locator("script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out(open_page, scheme):
    page = open_page("one", scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    card = page.locator("figure").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert (luminance(ground) > 0.8) == (scheme == "light")
    assert (luminance(ground) < 0.05) == (scheme == "dark")
    for selector, behind in (
        ("h1", ground),
        ("section > p", ground),
        ("header li", ground),
        ("dt", ground),
        ("figure h3", card),
        (".legend li", card),
        (".notes", card),
    ):
        colour = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
        assert contrast(colour, behind) >= 4.5, selector
    ink = page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")
    assert contrast(ink, card) >= 4.5
    colours = page.evaluate(
        """[0,1,2,3,4,5].map(i => {
          const e = document.createElementNS("http://www.w3.org/2000/svg", "path");
          e.setAttribute("class", "l s" + i);
          document.querySelector("svg").append(e);
          return getComputedStyle(e).stroke; })"""
    )
    assert len(set(colours)) == 6
    for colour in colours:
        assert contrast(colour, card) >= 3


def test_lines_differ_by_more_than_their_colours(open_page):
    page = open_page("one")
    dashes = page.locator("#loss svg[role=img] path.l").evaluate_all(
        "all => all.map(e => getComputedStyle(e).strokeDasharray)"
    )
    assert len(dashes) == len(set(dashes)) == 3
    shapes = page.locator("#step .legend path.m").evaluate_all("all => all.map(e => e.outerHTML)")
    shapes = [re.search(r' d="([^"]*)"', shape)[1] for shape in shapes]
    assert len(shapes) == len(set(shapes)) == 3


def test_the_page_is_whole_without_script(open_page):
    page = open_page("several", java_script_enabled=False)
    assert page.locator("figure > svg").count() == 2
    assert page.locator("table tr").count() == 7


def test_a_wide_table_scrolls_in_itself_and_by_keyboard(open_page):
    page = open_page("several", 400)
    table = page.locator(".table")
    assert table.evaluate("e => e.scrollWidth > e.clientWidth")
    table.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(100):
        if table.evaluate("e => e.scrollLeft > 0"):
            return
        page.wait_for_timeout(50)
    raise AssertionError("the table did not scroll")


def test_charts_have_names_for_those_who_do_not_see_them(open_page):
    page = open_page("one")
    charts = page.get_by_role("img")
    assert charts.count() == 12
    assert page.get_by_role("img", name="step size against step").count() == 1
    description = page.locator("#loss-0-d").text_content()
    assert "loss of the batch: from 2.3 to 0.382" in description


def test_screenshots_can_be_kept(open_page, tmp_path):
    """For looking at: REPORT_SCREENSHOTS=folder keeps a picture of each width and scheme."""
    folder = Path(os.environ.get("REPORT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            picture = folder / f"report-{width}-{scheme}.png"
            pictured(open_page("one", width, scheme), picture)
            sizes[picture.name] = picture.read_bytes()
    assert len(set(sizes.values())) == 4  # the schemes look different
