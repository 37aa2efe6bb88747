"""Serve a page on which users try a run: they upload photographs, see masks, and name concepts.

Everyone who can open the page can write the names of the run. So it requires a token, listens on the loopback device by
default, and answers only requests for its own address, which excludes scripts of other sites (DNS rebinding). It uses
the standard library only.
"""

import hmac
import json
import secrets
import threading
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import yaml

from transfgu import naming, pipeline
from transfgu.datasets import images, pictures
from transfgu.errors import BadInput, UserError
from transfgu.report.page import concept_views, template, write
from transfgu.segmenter import Segmenter
from transfgu.sharing.names import parse
from transfgu.store import storage
from transfgu.store.artifacts import Run

MAX_BODY = 128 * 2**20
"""Maximum size of an uploaded photograph, in bytes."""
_COOKIE = "transfgu"
_LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Playground(ThreadingHTTPServer):
    """The server; call `serve_forever()` to start it and `shutdown()` to stop it.

    Args:
        run: an evaluated run, or a folder with a model.
        host: the address to listen on; addresses other than loopback are open to the network.
        port: 0: any free port.
        token: the token that the page's address must contain; empty: a new random one.

    Raises:
        UserError: the run has no model, or the server can't listen on the address.
    """

    daemon_threads = True

    def __init__(self, run: Run, host: str = "127.0.0.1", port: int = 0, token: str = "") -> None:
        self.run, self.token = run, token or secrets.token_urlsafe(24)
        self.lock = threading.Lock()
        self.segmenter = Segmenter.load(run.uri)
        self.concepts = self._concepts()
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(
                f"can't listen on {host}:{port} ({error.strerror or error}): choose another --host or --port",
                code="address-unavailable",
            ) from None
        self.names = {host, *(_LOCAL if host in ("127.0.0.1", "::1", "localhost") else ())}

    @property
    def address(self) -> str:
        """URL of the page, with its token."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={self.token}"

    def _concepts(self) -> list[Any]:
        recipe = self.segmenter.recipe
        if "concepts" not in recipe.stages or self.run.artifact("concepts").manifest() is None:
            return []
        return concept_views(recipe, self.run, Segmenter.load(self.run.uri, named=False))

    def page(self, nonce: str) -> str:
        """Return the page as HTML."""
        segmenter = self.segmenter
        unnamed = pipeline.class_table(segmenter.recipe, self.run, named=False).names
        return template("serve.html").render(
            title=storage.shown(self.run.uri).rstrip("/").rpartition("/")[2],
            classes=[
                {
                    **{"name": name, "colour": list(colour)},
                    **{"pale": pictures.is_pale(colour), "background": pictures.css(colour)},
                }
                for name, colour in zip(segmenter.classes, segmenter.colours, strict=True)
            ],
            hatch=list(pictures.HATCH),
            concepts=self.concepts,
            names=[segmenter.names.get(index, name) for index, name in enumerate(unnamed)],
            nonce=nonce,
        )

    def predict(self, data: bytes) -> np.ndarray:
        """Return the mask of an image file's bytes: (H, W) class indices.

        Raises:
            UserError: the bytes are not a readable image.
        """
        try:
            pixels = images.pixels_of(data, orient=True, max_pixels=self.segmenter.recipe.dataset.max_pixels)
        except BadInput as error:
            raise UserError(f"this photograph can't be used ({error}): choose another file", code="image-bad") from None
        with self.lock:
            return self.segmenter.predict(pixels)

    def name(self, given: dict[str, str]) -> None:
        """Give names to the run's classes, as `transfgu name` does.

        Args:
            given: names by the index of the unnamed class; entries that equal the unnamed name are ignored.

        Raises:
            UserError: an index without a class, an empty name, or another process is working on the run.
        """
        unnamed = pipeline.class_table(self.segmenter.recipe, self.run, named=False).names
        tree = {int(index) if index.isdecimal() else index: name for index, name in given.items()}
        names = parse(yaml.safe_dump(tree, allow_unicode=True), unnamed, "the form")
        with self.lock:
            naming.name_classes(self.run, {i: n for i, n in names.items() if n != unnamed[i]}, write, lambda _: None)
            self.segmenter = Segmenter.load(self.run.uri)


class _Handler(BaseHTTPRequestHandler):
    server: Playground
    server_version = "transfgu"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer with the page; an address with the token sets the cookie that other requests require."""
        parts = urlsplit(self.path)
        token = parse_qs(parts.query).get("token", [""])[0]
        if not self._is_own_address():
            self._answer(403, "text/plain", b"this address is not the page's own")
        elif parts.path == "/" and token and hmac.compare_digest(token.encode(), self.server.token.encode()):
            # Redirect to an address without the token, so that it appears in no history or screenshot.
            cookie = f"{_COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            self._answer(303, "text/plain", b"", {"Location": "/", "Set-Cookie": cookie})
        elif not self._is_known():
            self._answer(401, "text/plain", b"open the address that transfgu serve printed: it holds the token")
        elif parts.path == "/":
            nonce = secrets.token_urlsafe(16)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data: blob:; "
                "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
            )
            page = self.server.page(nonce).encode()
            self._answer(200, "text/html; charset=utf-8", page, {"Content-Security-Policy": policy})
        else:
            self._answer(404, "text/plain", b"there is no such page")

    def do_POST(self) -> None:
        """Handle a photograph sent to `predict`, or names sent to `names`."""
        action: dict[str, Callable[[bytes], None]] = {"/predict": self._predict, "/names": self._names}
        length = self.headers.get("Content-Length", "")
        if not (self._is_own_address() and self._is_known()):
            self._answer(401, "text/plain", b"open the address that transfgu serve printed: it holds the token")
        elif self.path not in action:
            self._answer(404, "text/plain", b"there is no such page")
        elif not length.isdecimal() or int(length) > MAX_BODY:
            self._answer(413, "text/plain", f"the file is too large: at most {MAX_BODY >> 20} MiB".encode())
        else:
            try:
                action[self.path](self.rfile.read(int(length)))
            except UserError as error:
                self._answer(400, "text/plain; charset=utf-8", str(error).encode())

    def _predict(self, data: bytes) -> None:
        mask = self.server.predict(data)
        size = "x".join(map(str, mask.shape))
        self._answer(200, "application/octet-stream", mask.astype("<u2").tobytes(), {"X-Size": size})

    def _names(self, data: bytes) -> None:
        try:
            given = json.loads(data)
            given = {str(index): str(name) for index, name in given.items()}
        except (ValueError, AttributeError):
            raise UserError("the names are not a JSON object: reload the page", code="names-unreadable") from None
        self.server.name(given)
        self._answer(200, "text/plain", b"")

    def _is_own_address(self) -> bool:
        """Return True if the request names this server and, if a script sent it, comes from the server's own page."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        names = self.server.names
        is_own = not set(_LOCAL) & names or host.rpartition(":")[0] in names or host in names
        return is_own and origin in (None, f"http://{host}")

    def _is_known(self) -> bool:
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.server.token.encode())

    def _answer(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.close_connection = True  # otherwise an unread body would be read as the next request
        self.send_response(status)
        common = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        for name, value in {**common, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing, because a request line may contain the token."""
