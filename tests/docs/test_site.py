"""The documentation as a site, in a browser: no errors, and the theme's script ran on each page."""

import functools
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.stem for page in ROOT.glob("docs/*.md"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=20000", "--enable-logging=stderr", "--window-size=1280,900"),
    "--dump-dom",
)

FRAMES = """<!doctype html><meta charset="utf-8"><pre id="seen"></pre><script>
const pages = PAGES, seen = {};
for (const name of pages) {
  const frame = document.createElement("iframe");
  frame.width = 1200; frame.height = 900;
  frame.src = name === "index" ? "/" : name === "planted" ? "/planted.html" : `/${name}/`;
  frame.onload = () => setTimeout(() => {
    const page = frame.contentDocument, count = (what) => page.querySelectorAll(what).length;
    seen[name] = {
      heading: page.querySelector("h1")?.textContent,
      tables: count("article table:not(.highlighttable)"),
      wrapped: count("article .md-typeset__table table"),
      blocks: count("article pre"), colored: count("article pre span[class]"),
      outside: [...page.querySelectorAll("script[src],link[rel=stylesheet],img")].map(
        (x) => new URL(x.src || x.href).host).filter((host) => host !== location.host),
    };
    document.getElementById("seen").textContent = JSON.stringify(seen);
  }, 1000);
  document.body.append(frame);
}
</script>"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as it is published; a warning is an error."""
    site = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def visit(site, tmp_path_factory):
    """What the browser saw of every page, and the errors on its console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    (site / "planted.html").write_text("<h1>x</h1><script>nothing.at.all()</script>")
    names = json.dumps([*PAGES, "planted"])
    (site / "frames.html").write_text(FRAMES.replace("PAGES", names))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/frames.html"
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    try:
        done = subprocess.run(
            [browser, *FLAGS, profile, url], capture_output=True, text=True, timeout=240
        )
    finally:
        server.shutdown()
        server.server_close()
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen, done.stderr
    console = re.findall(r':CONSOLE[:(]\d+\)?\] "(.*?)", source: (\S+)', done.stderr)
    return json.loads(seen[1]), console


def test_the_site_is_built(site):
    assert (site / "index.html").is_file()
    assert {path.parent.name for path in site.glob("*/index.html")} == {*PAGES} - {"index"}


def test_only_the_planted_error_is_on_the_console(visit):
    _, console = visit
    assert [source.rpartition("/")[2] for _, source in console] == ["planted.html"], console


def test_every_page_is_there_and_whole(visit):
    """The theme's script wraps tables, of the pages whose headings begin with numbers, too."""
    seen, _ = visit
    assert sorted(seen) == sorted([*PAGES, "planted"])
    for name in PAGES:
        page = seen[name]
        assert page["heading"], name
        assert page["wrapped"] == page["tables"], name
        assert page["outside"] == [], name
    assert seen["guide"]["tables"] > 0
    colored = [name for name in PAGES if seen[name]["blocks"] and not seen[name]["colored"]]
    assert colored == []
