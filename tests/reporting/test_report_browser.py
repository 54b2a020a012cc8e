"""The report in a real browser: charts drawn, no script error, no request, in both schemes and on a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vitnas.reporting import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: the report was not rendered (needs chromium)"
)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --virtual-time-budget=5000 --enable-logging=stderr""".split()


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """Load the page with every host name unresolvable; return the DOM and what the console said."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        *flags,
    ]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


def svg_roots(dom: str) -> int:
    """Charts that were drawn: plotly stacks three main-svg layers in each."""
    body = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    count, rest = divmod(body.count('<svg class="main-svg"'), 3)
    assert rest == 0
    return count


def test_every_chart_is_drawn_in_the_dark_on_a_narrow_screen(finished: Path, tmp_path: Path) -> None:
    page = report(finished, tmp_path / "page.html")
    flags = ("--window-size=500,6000", "--blink-settings=preferredColorScheme=0")
    dom, console = browse(page, tmp_path / "profile", *flags)
    assert console == ""
    assert svg_roots(dom) == 7
    assert len(re.findall(r'<path class="point\b', dom)) > 20
    assert 'svg class="drawing"' in dom
    assert "fill: rgb(228, 231, 236)" in dom  # the dark scheme's text colour, in the charts
    widths = [int(width) for width in re.findall(r'<svg class="main-svg"[^>]* width="(\d+)"', dom)]
    assert 300 < max(widths) <= 500


@pytest.mark.slow
def test_what_a_sampler_learned_is_drawn(learned: Path, tmp_path: Path) -> None:
    dom, console = browse(report(learned, tmp_path / "page.html"), tmp_path / "profile")
    assert console == ""
    assert svg_roots(dom) == 9  # four of the sampler; this run monitored and ranked no Archs


@pytest.mark.slow
def test_an_unfinished_run_has_no_empty_charts_and_no_errors(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "half")
    for name in ("metrics.jsonl", "ranking.json", "search.json", "correlation.json"):
        (folder / name).unlink()
    dom, console = browse(report(folder), tmp_path / "profile", "--window-size=1200,6000")
    assert console == ""
    assert svg_roots(dom) == 1  # the cost of each block comes from the Arch alone
    assert "fill: rgb(31, 37, 48)" in dom  # the light scheme
