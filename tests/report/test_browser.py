"""The pages of real runs in a real browser, on a phone and on a desk, light and dark."""

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastjepa.report.write import compose, put, write_report

if TYPE_CHECKING:
    from tests.conftest import Trainer

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENS = {"phone": (375, 812), "desk": (1440, 900)}
TAP_PIXELS = 44

# What is wrong with the page as it is shown: a list of sentences.
LOOK = """
(tap) => {
  const faults = [], name = (e) => e.tagName.toLowerCase() + " " + e.textContent.trim().slice(0, 40);
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) faults.push(`the page is ${width} wide on a screen of ${innerWidth}`);
  for (const image of document.images) {
    if (!image.complete || image.naturalWidth === 0) faults.push("an image does not load");
    const title = image.closest("figure")?.querySelector("h3")?.textContent ?? "";
    const says = image.alt.length >= 30 && image.alt !== title;
    if (!says) faults.push(`"${image.alt}" does not say what is shown`);
  }
  let before = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    const level = Number(heading.tagName[1]);
    if (level > before + 1) faults.push(`${name(heading)} comes after a heading of level ${before}`);
    before = level;
  }
  if (document.querySelectorAll("h1").length !== 1) faults.push("there is not one h1");
  for (const target of document.querySelectorAll("a, button, summary")) {
    const { width, height } = target.getBoundingClientRect();
    const size = `${width} by ${height}`;
    if (Math.min(width, height) < tap) faults.push(`${name(target)} is ${size}, small for a finger`);
  }
  for (const link of document.querySelectorAll('a[href^="#"]'))
    if (!document.getElementById(link.hash.slice(1))) faults.push(`${name(link)} leads nowhere`);
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = parse(colour).map((v) => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor, [, , , alpha = 1] = parse(colour);
      if (alpha === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!text || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const [low, high] = [light(style.color), light(behind(element))].sort((a, b) => a - b);
    const contrast = (high + .05) / (low + .05);
    if (contrast < 4.5) faults.push(`${name(element)} has a contrast of ${contrast.toFixed(2)}`);
    if (parseFloat(style.fontSize) < 12) faults.push(`${name(element)} is ${style.fontSize} high`);
  }
  return faults;
}
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Opens windows of a browser that is started for these tests, with nothing from before."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser, and none of {', '.join(BROWSERS)} is on PATH")
    with playwright.sync_playwright() as driver:
        windows = []

        def window(screen: str, scheme: str) -> Any:
            width, height = SCREENS[screen]
            windows.append(
                driver.chromium.launch_persistent_context(
                    str(tmp_path_factory.mktemp("profile")),
                    executable_path=found,
                    args=QUIET,
                    viewport={"width": width, "height": height},
                    color_scheme=scheme,
                )
            )
            return windows[-1].new_page()

        yield window
        for each in windows:
            each.close()


@pytest.fixture(scope="module", params=SCREENS)
def phone_or_desk(request: pytest.FixtureRequest, browser: Callable[..., Any]) -> Any:
    return browser(request.param, "light")


@pytest.fixture(scope="module")
def dark(browser: Callable[..., Any]) -> Any:
    return browser("desk", "dark")


@pytest.fixture(scope="module")
def pages(
    trainer_at: "Callable[[Path], Trainer]", tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Four runs, and the page of each: one that ended, one going, the same killed, one that diverged."""
    settings = ("probe.every_steps=10", "probe.at_ends=true")
    home = tmp_path_factory.mktemp("runs")
    trainers = {name: trainer_at(home / name) for name in ("ended", "going", "diverged")}
    for trainer in trainers.values():
        trainer.home.mkdir()
    going = trainers["going"]
    process = going.start(*settings, "optim.steps=100000")
    going.wait_for(process, step=25)

    page = compose(going.run)
    assert page.status.is_live
    live = put(page, going.run, refresh_s=600).rename(going.run / "report" / "live.html")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (going.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100000, "lo')
    (going.run / "report" / "snapshots" / "step_00000020.tmp").write_bytes(b"half")

    trainers["ended"](*settings, "optim.steps=23", "run.report=true").check()
    trainers["diverged"](*settings, "optim.steps=50", "optim.lr=1e30", "run.log_every=1").check(1)
    return {
        "ended": trainers["ended"].run / "report" / "index.html",
        "live": live,
        "killed": write_report(going.run),
        "diverged": write_report(trainers["diverged"].run),
    }


def faults(window: Any, path: Path) -> list[str]:
    """What is wrong with a page: as it loads, and as it is shown."""
    found: list[str] = []
    asked: list[str] = []

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            found.append(f"console: {message.text}")

    heard = {
        "console": on_console,
        "pageerror": lambda error: found.append(f"script: {error}"),
        "request": lambda request: asked.append(request.url),
        "requestfailed": lambda request: found.append(f"failed: {request.url}"),
    }
    for event, hear in heard.items():
        window.on(event, hear)
    window.goto(path.as_uri(), wait_until="load")
    found += window.evaluate(LOOK, TAP_PIXELS)
    for event, hear in heard.items():
        window.remove_listener(event, hear)
    outside = [url for url in asked if not url.startswith("data:") and url != path.as_uri()]
    return found + [f"asks for {url}" for url in outside]


@pytest.mark.parametrize("state", ["ended", "live", "killed", "diverged"])
def test_nothing_is_wrong_with_the_page_of_any_run(
    phone_or_desk: Any, pages: dict[str, Path], state: str
) -> None:
    assert faults(phone_or_desk, pages[state]) == []


@pytest.mark.parametrize("state", ["ended", "live"])
def test_nor_in_the_dark(dark: Any, pages: dict[str, Path], state: str) -> None:
    assert faults(dark, pages[state]) == []
    background = dark.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background[4:-1].split(","))) < 64


def test_pages_say_what_became_of_the_run(phone_or_desk: Any, pages: dict[str, Path]) -> None:
    said = {}
    for state, path in pages.items():
        phone_or_desk.goto(path.as_uri())
        status = phone_or_desk.locator(".status")
        said[state] = status.inner_text() if status.count() else ""
    assert said["ended"] == ""
    assert said["live"].startswith("Live: step ")
    assert " of 100,000, about " in said["live"]
    assert said["killed"].startswith("Broken off: ")
    assert said["diverged"].startswith("Broken off: ")
    events = phone_or_desk.locator(".event").all_inner_texts()  # of the page of the last, which has diverged
    assert events[-1].startswith("The run has diverged: ")


def test_a_live_page_loads_itself_again_and_stays_where_it_was(
    phone_or_desk: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    path, live = tmp_path / "index.html", pages["live"].read_text()
    path.write_text(live.replace("location.reload(), 600000", "location.reload(), 1000"))
    phone_or_desk.goto(path.as_uri())
    phone_or_desk.evaluate("window.scrollTo(0, 900)")
    path.write_text(live.replace("</main>", '<p id="news">The next one</p></main>'))
    phone_or_desk.wait_for_selector("#news", timeout=20_000)
    phone_or_desk.wait_for_function("Math.abs(window.scrollY - 900) < 2", timeout=5_000)


@pytest.mark.parametrize(
    ("there", "instead", "fault"),
    [
        ('<img alt="', '<img alt="" title="', "does not say what is shown"),
        ("data:image/png;base64,", "data:image/png;base64,AAAA", "an image does not load"),
        ('src="data:', 'src="https://nowhere.invalid/', "asks for https://nowhere.invalid/"),
        ("<h3>Loss</h3>", "<h4>Loss</h4>", "comes after a heading of level 2"),
        ("</main>", '<div style="width:4000px">wide</div></main>', "the page is 4"),
        ("--muted: #566170", "--muted: #a9b1ba", "has a contrast of"),
        ("min-height: 44px", "min-height: 20px", "small for a finger"),
        ("</main>", '<p style="font-size:9px">small</p></main>', "is 9px high"),
        ("</main>", "<script>console.error('broken')</script></main>", "console: broken"),
        ("</main>", "<script>broken()</script></main>", "script: broken is not defined"),
        ('href="#time"', 'href="#elsewhere"', "leads nowhere"),
    ],
)
def test_a_broken_page_is_found_to_be(
    phone_or_desk: Any, pages: dict[str, Path], tmp_path: Path, there: str, instead: str, fault: str
) -> None:
    html = pages["ended"].read_text()
    assert there in html
    broken = tmp_path / "index.html"
    broken.write_text(html.replace(there, instead))
    found = faults(phone_or_desk, broken)
    assert any(fault in line for line in found), found
