"The site in a browser: every page, wide and narrow. Needs Chromium and its driver; pictures are kept."

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_docs"
WIDTHS = (1400, 400)
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in (BROWSER, DRIVER), reason="no Chromium with its driver on this machine"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files and says nothing."

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    "The site, served on this machine; built first unless it is newer than every notebook."
    index = SITE / "index.html"
    newest = max(f.stat().st_mtime for f in [*ROOT.glob("nbs/**/*.ipynb"), ROOT / "_quarto.yml"])
    if not index.exists() or index.stat().st_mtime < newest:
        command = [sys.executable, ROOT / ".ci" / "project.py", "docs"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    handler = functools.partial(Quiet, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the extra docs is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{word}")
    for word in ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def narrow(browser, width):
    "The viewport at this width: a window cannot be made as narrow as a telephone, an emulated screen can."
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def faults(browser):
    "What a reader would stumble over on the page that is open."
    found = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    if wide > 1:
        found.append(f"the page scrolls sideways by {wide} pixels")
    script = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    found += [f"no image {src}" for src in browser.execute_script(script)]
    text = browser.execute_script(
        "const d = document.body.cloneNode(true);"
        "d.querySelectorAll('pre, code, math, script, style').forEach(e => e.remove());"
        "return d.textContent"
    )
    raw = re.search(r"\$[^$\n]{0,60}\\[a-z]+|\\(?:frac|tilde|bar|top|mathbf)\b", text)
    return found + ([f"TeX left as text: {raw[0]}"] if raw else []) + clipped(browser)


def clipped(browser):
    "Code that runs out of its box: anywhere if it cannot be scrolled to, and at all on a wide page."
    if browser.execute_script("return window.innerWidth") >= WIDTHS[0]:
        return browser.execute_script(
            "return [...document.querySelectorAll('main pre.cell-code')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1)"
            ".map(e => 'code is wider than the page: ' + e.textContent.slice(0, 60))"
        )
    return browser.execute_script(
        "return [...document.querySelectorAll('main pre')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)"
        ".filter(e => !['auto', 'scroll'].includes(getComputedStyle(e).overflowX)"
        " && !['auto', 'scroll'].includes(getComputedStyle(e.parentElement).overflowX))"
        ".map(e => 'code is clipped: ' + e.textContent.slice(0, 60))"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_reads_well(address, browser, width, tmp_path_factory):
    pictures = tmp_path_factory.getbasetemp() / f"pages-{width}"
    pictures.mkdir(exist_ok=True)
    narrow(browser, width)
    wrong = {}
    for page in sorted(SITE.rglob("*.html")):
        name = page.relative_to(SITE).as_posix()
        browser.get(f"{address}/{name}")
        if found := faults(browser):
            wrong[name] = found
        browser.save_screenshot(str(pictures / f"{name.replace('/', '-')}.png"))
    assert wrong == {}, json.dumps(wrong, indent=1) + f"\npictures: {pictures}"


def test_search_finds_what_is_asked_for(address, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    narrow(browser, 1400)
    browser.get(f"{address}/index.html")
    box = browser.find_element(By.CSS_SELECTOR, "#quarto-search input")
    box.send_keys("Procrustes")
    hits = "#quarto-search a[href]"
    WebDriverWait(browser, 10).until(lambda b: b.find_elements(By.CSS_SELECTOR, hits))
    links = [a.get_attribute("href") for a in browser.find_elements(By.CSS_SELECTOR, hits)]
    assert any("procrustes" in x or "proximal" in x for x in links), links


def lines_of_sidebar(browser):
    "(text, address) of the sidebar's pages, in order."
    script = (
        "return [...document.querySelectorAll('#quarto-sidebar a.sidebar-link[href]')]"
        ".map(a => [a.textContent.trim(), a.href])"
    )
    return browser.execute_script(script)


def test_one_can_walk_from_page_to_page(address, browser):
    "The tutorials come first, chapters have their numbers, and each page leads to the next of the sidebar."
    narrow(browser, 1400)
    browser.get(f"{address}/index.html")
    lines = lines_of_sidebar(browser)
    assert [text.split()[0] for text, _ in lines[1:6]] == ["1", "2", "3", "00", "00a"]
    hrefs = [href for _, href in lines]
    assert {f"{address}/api.html", f"{address}/security.html"} <= {*hrefs}
    for here, onward in zip(hrefs[:5], hrefs[1:6]):
        browser.get(here)
        script = "return document.querySelector('.nav-page-next a').href"
        assert browser.execute_script(script) == onward


def test_headings_have_anchors_and_names_have_entries(address, browser):
    "A heading links to itself; a name on the page of names leads to its entry on a chapter's page."
    from selenium.webdriver.support.ui import WebDriverWait

    narrow(browser, 1400)
    browser.get(f"{address}/tutorials/fastai.html")
    script = "return [...document.querySelectorAll('main .anchored .anchorjs-link')].map(a => a.hash)"
    assert "#a-folder-of-images" in browser.execute_script(script)
    browser.get(f"{address}/api.html")
    script = (
        "return [...document.querySelectorAll('main li > a')]"
        ".filter(a => a.textContent == 'NearestETFHead').map(a => a.href)"
    )
    (entry,) = browser.execute_script(script)
    assert entry == f"{address}/heads.html#nearestetfhead"
    browser.get(entry)
    place = "return document.getElementById('nearestetfhead').getBoundingClientRect().top"
    WebDriverWait(browser, 10).until(lambda b: -50 < b.execute_script(place) < 300)  # it scrolls smoothly


def test_outputs_are_numbers_as_a_reader_writes_them():
    "No np.float64(...) nor np.True_ in what a page shows."
    pages = {p.relative_to(SITE).as_posix(): p.read_text(encoding="utf-8") for p in SITE.rglob("*.html")}
    outputs = {name: re.findall(r"<pre><code>(.*?)</code></pre>", s, flags=re.S) for name, s in pages.items()}
    shown = r"\bnp\.(?:float\d|int\d|uint\d|True_|False_)"
    assert [name for name, found in outputs.items() if any(re.search(shown, out) for out in found)] == []
