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
    newest = max(f.stat().st_mtime for f in [*ROOT.glob("nbs/*.ipynb"), ROOT / "_quarto.yml"])
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
    return found + ([f"TeX left as text: {raw[0]}"] if raw else [])


@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_reads_well(address, browser, width, tmp_path_factory):
    pictures = tmp_path_factory.getbasetemp() / f"pages-{width}"
    pictures.mkdir(exist_ok=True)
    narrow(browser, width)
    wrong = {}
    for page in sorted(SITE.glob("*.html")):
        browser.get(f"{address}/{page.name}")
        if found := faults(browser):
            wrong[page.name] = found
        browser.save_screenshot(str(pictures / f"{page.stem}.png"))
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
