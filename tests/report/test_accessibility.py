"""The pages against axe-core's rules of accessibility, in headless Chromium, light and dark, narrow and wide."""

import asyncio
import shutil
import sys
import threading
from pathlib import Path

import pytest

from tests.made_run import make_run
from tests.report.browser import Browser, browser, chromium
from tests.report.test_comparison import rows_of
from tests.report.test_search import FOUND, METRICS
from tests.search.test_trials import search
from transfgu.report import comparison
from transfgu.report import page as report
from transfgu.report import search as search_report
from transfgu.report.serving import Playground
from transfgu.store.artifacts import Run

GOLDEN = Path(__file__).parents[1] / "golden" / "run"
AXE = Path(sys.prefix) / "axe" / "axe_playwright_python" / "axe.min.js"  # where `make setup` puts it
_PROBLEMS = """axe.run(document).then(found => ({passed: found.passes.length, violated: found.violations.flatMap(
    v => v.nodes.map(n => `${v.id}: ${n.target.join(' ')}: ${n.failureSummary.replaceAll('\\n', ' ')}`))}))"""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed"),
    pytest.mark.skipif(not AXE.exists(), reason=f"{AXE} is missing (make setup)"),
]


async def problems(found: Browser, url: str) -> list[str]:
    """What axe-core finds on a page at two widths in two schemes, and what the console tells."""
    said = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        await found.do("Emulation.setEmulatedMedia", features=[feature])
        for width in (390, 1440):
            await found.resize(width)
            await found.open(url)
            await found.value("document.querySelectorAll('details').forEach(d => { d.open = true })")
            await found.value(AXE.read_text())
            rules = await found.value(_PROBLEMS)
            assert rules["passed"] > 5
            said += [f"{scheme}, {width} px: {line}" for line in rules["violated"]]
            assert await found.value("document.documentElement.scrollWidth <= innerWidth"), (scheme, width)
    return said + found.errors


def check(folder: Path, url: str) -> list[str]:
    async def run(port: int) -> list[str]:
        async with browser(port) as found:
            return await problems(found, url)

    with chromium(folder) as port:
        return asyncio.run(run(port))


def test_a_violation_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    heading = '<h1 style="color: #aaa; background: #fff">pale</h1>'
    words = f'<main>{heading}<p>Text.</p><img src="data:,"></main>'
    page.write_text(f'<!doctype html><html lang="en"><head><title>A page</title></head><body>{words}</body></html>')
    said = check(tmp_path, page.as_uri())
    assert {line.split(": ")[1] for line in said} == {"color-contrast", "image-alt"}
    assert {line.split(": ")[0] for line in said} == {f"{s}, {w} px" for s in ("light", "dark") for w in (390, 1440)}


@pytest.mark.parametrize("labels", [True, False])
def test_a_report_has_no_violation(tmp_path: Path, labels: bool) -> None:
    made = make_run(tmp_path, labels=labels, stuff=4 if labels else 0)
    uri = report.write(made.recipe, made.run, made.stages, made.metrics)
    assert check(tmp_path, Path(uri).as_uri()) == []


@pytest.mark.parametrize("objective", ["mean_iou", "label_free"])
def test_the_report_of_a_search_has_no_violation(tmp_path: Path, objective: str) -> None:
    """One with trials of every status, and one without a winner, which has no charts."""
    asked = search(tmp_path, objective=objective)
    pages = {"all": FOUND, "none": [trial for trial in FOUND if trial.status == "failed"]}
    for name, found in pages.items():
        (tmp_path / f"{name}.html").write_text(search_report.render(asked, found, METRICS))
    assert {name: check(tmp_path, (tmp_path / f"{name}.html").as_uri()) for name in pages} == {"all": [], "none": []}


def test_a_comparison_has_no_violation(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    uri = comparison.write(made.recipe, str(tmp_path / "comparison"), rows_of(made))
    assert check(tmp_path, Path(uri).as_uri()) == []


def test_the_page_to_try_a_run_has_no_violation(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "run")
    with Playground(Run(str(tmp_path / "run"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert check(tmp_path, server.address) == []
        finally:
            server.shutdown()
            thread.join()
