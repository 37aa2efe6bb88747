"""The page to try a run: its access, its answers, and its behaviour in a browser."""

import asyncio
import base64
import http.client
import io
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from tests.report.browser import browser, chromium
from transfgu.datasets.shapes import scene
from transfgu.report.serving import MAX_BODY, Playground
from transfgu.segmenter import Segmenter
from transfgu.sharing import names
from transfgu.store.artifacts import Run

pytestmark = pytest.mark.processes

GOLDEN = Path(__file__).parents[1] / "golden" / "run"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Playground]:
    shutil.copytree(GOLDEN, tmp_path / "run")
    with Playground(Run(str(tmp_path / "run"))) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def photograph(kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(scene(7, "val", 0)[0]).save(sink, kind)
    return sink.getvalue()


def ask(
    server: Playground, method: str, path: str, body: bytes = b"", *, token: str | None = "", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of an answer; `token` None: without a cookie."""
    port = server.server_address[1]
    if token is not None:
        headers["Cookie"] = f"transfgu={token or server.token}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body or None, {"Host": f"127.0.0.1:{port}", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_the_token_opens_the_page_once_and_a_cookie_from_then_on(server: Playground) -> None:
    assert ask(server, "GET", "/", token=None)[0] == 401
    assert ask(server, "GET", "/?token=wrong", token=None)[0] == 401
    assert ask(server, "GET", "/", token="wrong")[0] == 401
    status, _, headers = ask(server, "GET", f"/?token={server.token}", token=None)
    assert (status, headers["Location"]) == (303, "/")
    assert headers["Set-Cookie"] == f"transfgu={server.token}; HttpOnly; SameSite=Strict; Path=/"
    status, body, headers = ask(server, "GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert server.token.encode() not in body
    assert ask(server, "GET", "/other")[0] == 404


def test_other_sites_and_names_are_kept_out(server: Playground) -> None:
    assert ask(server, "GET", "/", Host="evil.example:80")[0] == 403
    assert ask(server, "POST", "/predict", photograph(), Origin="http://evil.example")[0] == 401
    assert ask(server, "POST", "/predict", photograph(), token=None)[0] == 401
    own = f"http://127.0.0.1:{server.server_address[1]}"
    assert ask(server, "POST", "/predict", photograph(), Origin=own)[0] == 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_photograph_gets_the_mask_that_predict_makes(server: Playground, kind: str) -> None:
    status, body, headers = ask(server, "POST", "/predict", photograph(kind))
    wanted = Segmenter.load(server.run.uri).predict(photograph(kind))
    assert (status, headers["X-Size"]) == (200, "128x128")
    np.testing.assert_array_equal(np.frombuffer(body, "<u2").reshape(128, 128), wanted)


def test_what_is_no_photograph_is_one_line(server: Playground) -> None:
    status, body, _ = ask(server, "POST", "/predict", b"no picture")
    assert status == 400
    assert body.startswith(b"this photograph can't be used")
    too_long = {"Content-Length": str(MAX_BODY + 1)}
    assert ask(server, "POST", "/predict", b"", token="", **too_long)[0] == 413
    assert ask(server, "POST", "/elsewhere", b"x")[0] == 404
    assert ask(server, "POST", "/predict", photograph())[0] == 200  # it goes on


def test_names_are_those_of_the_run(server: Playground) -> None:
    status, body, _ = ask(server, "POST", "/names", json.dumps({"0": "dart board", "1": "dart board"}).encode())
    assert (status, body) == (200, b"")
    assert names.read(server.run) == {0: "dart board", 1: "dart board"}
    assert Segmenter.load(server.run.uri).classes[0] == server.segmenter.classes[0] == "dart board"
    assert len(server.segmenter.classes) == 9
    assert b"dart board" in ask(server, "GET", "/")[1]
    for wrong in (b'{"0": ""}', b'{"77": "cow"}', b"[]", b"no JSON"):
        assert ask(server, "POST", "/names", wrong)[0] == 400
    everything = {str(index): name for index, name in enumerate(Segmenter.load(server.run.uri, named=False).classes)}
    assert ask(server, "POST", "/names", json.dumps(everything).encode())[0] == 200
    assert names.read(server.run) == {}


def test_an_address_that_is_taken(server: Playground) -> None:
    with refused("address-unavailable --port"):
        Playground(server.run, port=server.server_address[1])


async def drive(server: Playground, port: int, photo: Path, shots: Path) -> list[str]:
    """Use the page as a user does; returns the console's errors."""
    async with browser(port) as page:
        await page.do("Page.navigate", url=server.address)
        await page.until("location.pathname + location.search === '/' && document.readyState === 'complete'")
        assert await page.value("document.querySelectorAll('#names input').length") == 10
        root = (await page.do("DOM.getDocument"))["root"]["nodeId"]
        found = await page.do("DOM.querySelector", nodeId=root, selector="#file")
        await page.do("DOM.setFileInputFiles", files=[str(photo)], nodeId=found["nodeId"])
        await page.until("!by('result').hidden && by('photo').complete && by('photo').naturalWidth === 128")
        alphas = "[...by('mask').getContext('2d').getImageData(0, 0, 128, 128).data].filter((_, i) => i % 4 === 3)"
        assert await page.value(f"{alphas}.every(a => a === 153)")  # 60 %
        set_opacity = "by('opacity').value = 100; by('opacity').dispatchEvent(new Event('input'));"
        assert await page.value(f"{set_opacity} {alphas}.every(a => a === 255)")
        first = "document.querySelector('#classes input')"
        assert await page.value(f"{first}.click(); const i = +{first}.dataset.index; "
                                   f"{alphas}.every((a, p) => (a === 0) === (mask.data[p] === i))")  # fmt: skip
        assert await page.value(f"by('none').click(); {alphas}.every(a => a === 0)")
        await page.value("by('all').click()")
        for width in (390, 1440):
            await page.resize(width)
            assert await page.value("document.documentElement.scrollWidth <= innerWidth"), width
            shot = await page.do("Page.captureScreenshot", captureBeyondViewport=True)
            (shots / f"serve-{width}.png").write_bytes(base64.b64decode(shot["data"]))
        # A class near white is hatched: a quarter of its pixels are grey.
        await page.value("mask.data.fill(classes.findIndex(c => c.pale)); list(); draw()")
        reds = "[...by('mask').getContext('2d').getImageData(0, 0, 128, 128).data].filter((_, i) => i % 4 === 0)"
        share = await page.value(f"{reds}.filter(red => red === 110).length / mask.data.length")
        assert 0.2 < share < 0.35
        assert "gradient" in await page.value("getComputedStyle(document.querySelector('#classes .swatch')).background")
        await page.value("by('name0').value = 'dart board'; by('names').requestSubmit()")
        await page.until("document.readyState === 'complete' && classes[0].name === 'dart board'")
        return page.errors


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_the_page_in_a_browser(server: Playground, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(photograph())
    with chromium(tmp_path) as port:
        assert asyncio.run(drive(server, port, photo, tmp_path)) == []
    assert names.read(server.run) == {0: "dart board"}
