"""The documentation as a site: built without a warning, complete, and looked at in a real browser."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install -e ".[docs]"')

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CI builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


def pages_of_the_menu(entries):
    for entry in entries:
        for target in entry.values():
            if isinstance(target, list):
                yield from pages_of_the_menu(target)
            else:
                yield target


def test_every_page_of_the_menu_is_built_and_none_asks_another_host(site):
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    for name in pages_of_the_menu(settings["nav"]):
        page = (site / name).with_suffix(".html").read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)", page)
        assert not loaded, f"{name} loads {loaded}"
        assert "\n:::" not in page and "--8&lt;--" not in page, f"{name}: an insertion was not made"


def test_links_to_files_of_the_repository_lead_to_their_pages_or_nowhere(site):
    """In docs/ they are written for the repository, where `../recipes` is a folder."""
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="results.html"' in home
    assert "The loop around a step" in (site / "results.html").read_text(encoding="utf-8")
    assert 'href="recipes.html"' in (site / "results.html").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links begin at the site's root
            continue
        for target in re.findall(r'<a\b[^>]*\shref="([^"#?]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_reference_shows_what_docstrings_say(site):
    model = (site / "api" / "model.html").read_text(encoding="utf-8")
    for told in ("num_items_in_batch", "0-d float32 tensor", "StrictDataclassClassValidationError"):
        assert told in model, told
    for document in sorted((ROOT / "docs" / "api").glob("*.md")):
        page = (site / "api" / f"{document.stem}.html").read_text(encoding="utf-8")
        listed = re.findall(
            r"^::: (\S+)(?:\n    options:\n      members: \[(.*?)\])?", document.read_text(), re.M
        )
        assert listed, document
        for module, members in listed:
            for name in [f"{module}.{member.strip()}" for member in members.split(",") if member] or [module]:
                assert f'id="{name}"' in page, f"{name} has no docstring, or is not there"


LOOK = """
import sys
from playwright.sync_api import sync_playwright
chromium, address, *names = sys.argv[1:]
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for width, height in ((390, 844), (1280, 900)):
        context = browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(180_000)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        for name in names:
            page.goto(f"{address}/{name}")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name}: {wide} pixels on a page of {width}"
            assert page.locator("h1").first.is_visible(), name
        assert said == [], said
        assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))], asked
        if address.startswith("http"):
            page.goto(f"{address}/index.html")
            if width < 1000:
                page.locator("label[for=__search]").first.click()
            page.locator("input.md-search__input").click()
            page.keyboard.type("linear_cross_entropy", delay=20)
            found = page.locator(".md-search-result__item a").first
            found.wait_for()
            assert "api/model.html" in found.get_attribute("href"), found.get_attribute("href")
            found.click()
            page.wait_for_url("**/api/model.html*")
            assert said == [], said
        context.close()
    browser.close()
print("looked")
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("over", ["loopback", "files"])
def test_the_site_in_a_real_browser_on_a_phone_and_a_desktop(site, over):
    """No overflow to the side, no word in the console, no other host asked; a server's search finds."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    names = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "404.html")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *arguments: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        if over == "files":  # the same pages; what differs is how they load the rest
            names = ["index.html", "data.html", "api/model.html"]
        address = f"http://127.0.0.1:{server.server_port}" if over == "loopback" else f"file://{site}"
        # In a process of its own: Playwright leaves an event loop behind.
        done = subprocess.run(
            [sys.executable, "-c", LOOK, CHROMIUM, address, *names],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stdout.strip() == "looked", done.stderr[-2000:]
    finally:
        server.shutdown()
