"""Headless Chromium for tests of pages, driven by its debugging protocol."""

import asyncio
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp


class Browser:
    """A page in headless Chromium; `errors` holds what its console told."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []

    async def do(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            kind, told = message.get("method"), message.get("params", {})
            if kind == "Runtime.exceptionThrown":
                self.errors.append(str(told["exceptionDetails"]))
            elif kind == "Log.entryAdded" and told["entry"]["level"] == "error":
                self.errors.append(str(told["entry"]))
            elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
                self.errors.append(str(told["args"]))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])

    async def value(self, script: str) -> Any:
        found = await self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        for _ in range(300):
            if await self.value(script):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{script} did not become true")

    async def open(self, url: str) -> None:
        await self.do("Page.navigate", url=url)
        await self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    async def resize(self, width: int, height: int = 900) -> None:
        await self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )


@contextmanager
def chromium(folder: Path) -> Iterator[int]:
    """Start Chromium with its profile in a folder; yields the port of its debugging protocol."""
    process = subprocess.Popen(
        [
            *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"),
            *(f"--user-data-dir={folder / 'profile'}", "--no-first-run", "about:blank"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr
        line = next(line for line in process.stderr if "DevTools listening" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield int(line.partition("ws://127.0.0.1:")[2].partition("/")[0])
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def browser(port: int) -> AsyncIterator[Browser]:
    """Open the first page of a Chromium."""
    async with aiohttp.ClientSession() as session:
        pages: list[dict[str, Any]] = []
        for _ in range(300):
            try:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    pages = [page for page in await answer.json(content_type=None) if page["type"] == "page"]
                if pages:
                    break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
        async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            found = Browser(socket)
            for domain in ("Runtime", "Log", "Page", "DOM"):
                await found.do(f"{domain}.enable")
            yield found
