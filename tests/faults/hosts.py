"""Simulate hosts by processes in their own namespaces: network, processes, host name, /tmp and /dev/shm.

All processes on a host end with its first process, and that one ends with its creator, for any reason: the kernel then
removes network and disks, and nothing remains to clean up. Requires root.
"""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

INTERFACE = "eth0"
"""The connection of a host to the other."""

_TOOLS = ("bash", "hostname", "ip", "mount", "nsenter", "unshare")
_SPACES = ("--net", "--mount", "--pid", "--uts")
# The host's first process adopts what others leave behind, and waits until nobody holds the other end of its input.
_FIRST = """
hostname {name}
mount -t tmpfs -o size=4g tmpfs /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
ip link set lo up
echo ready
read -r _
"""


def why_not() -> str:
    """Return why hosts are not possible here; empty if they are."""
    if os.geteuid():
        return "namespaces are made by root alone"
    if missing := [tool for tool in _TOOLS if not shutil.which(tool)]:
        return f"needs {', '.join(missing)}"
    done = subprocess.run(["unshare", *_SPACES, "--fork", "--mount-proc", "true"], capture_output=True, check=False)
    return done.stderr.decode().strip() if done.returncode else ""


class Host:
    """A host, whose processes share only the machine's files with other hosts, except /tmp and /dev/shm."""

    def __init__(self, name: str, address: str) -> None:
        """Create a host; others use its `address` after :func:`join`."""
        self.name, self.address = name, address
        self._started: list[subprocess.Popen[str]] = []
        self._outer = subprocess.Popen(
            ["unshare", *_SPACES, "--fork", "--mount-proc", "--kill-child", "bash", "-ec", _FIRST.format(name=name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._outer.stdin
        assert self._outer.stdout
        if self._outer.stdout.readline() != "ready\n":
            raise RuntimeError(f"no host {name}")
        self.pid = psutil.Process(self._outer.pid).children()[0].pid
        """The id of its first process, as seen by this process."""

    def end(self) -> None:
        """Stop it and all of its processes."""
        assert self._outer.stdin
        assert self._outer.stdout
        self._outer.stdin.close()
        for process in (self._outer, *self._started):
            process.wait(60)
        self._outer.stdout.close()

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[str]:
        """Start a command on it, with output to `log`."""
        with log.open("wb") as output:
            started = subprocess.Popen(
                self._inside("/", command), env=environment, stdout=output, stderr=output, text=True
            )
        self._started.append(started)
        return started

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on it, in `folder`, with a time limit in seconds."""
        inside = self._inside(str(folder), command)
        return subprocess.run(inside, env=environment, capture_output=True, text=True, timeout=seconds, check=False)

    def _inside(self, folder: str, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *_SPACES, "env", f"--chdir={folder}", *command]

    @contextmanager
    def network(self) -> Iterator[None]:
        """Create sockets in this block, by this thread, in the host's network; they stay there."""
        libc = ctypes.CDLL(None, use_errno=True)  # Python has `os.setns` from 3.12 on
        with Path("/proc/thread-self/ns/net").open() as own, Path(f"/proc/{self.pid}/ns/net").open() as its:
            if libc.setns(its.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")
            try:
                yield
            finally:
                libc.setns(own.fileno(), 0)

    def get(self, port: int, path: str) -> Any:
        """Return the JSON answer of a server on its loopback device."""
        with self.network(), urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as answer:
            return json.load(answer)


def join(one: Host, other: Host) -> None:
    """Connect two hosts by a virtual cable, which disappears with either host."""
    ends = (INTERFACE, "netns", str(one.pid), "type", "veth", "peer", "name", INTERFACE, "netns", str(other.pid))
    subprocess.run(["ip", "link", "add", *ends], check=True)
    for host in (one, other):
        for change in (("addr", "add", f"{host.address}/24", "dev", INTERFACE), ("link", "set", INTERFACE, "up")):
            subprocess.run(["nsenter", f"--target={host.pid}", "--net", "ip", *change], check=True)


@contextmanager
def reachable(host: Host, target: tuple[str, int]) -> Iterator[int]:
    """Open a port at the host's address that forwards to `target` on this machine."""
    with host.network():
        listening = socket.create_server((host.address, 0))
    with listening:
        threading.Thread(target=_accept, args=(listening, target), name="forward", daemon=True).start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)  # who waits for a connection is told


def _accept(listening: socket.socket, target: tuple[str, int]) -> None:
    with suppress(OSError):  # until it is shut
        while True:
            near, _ = listening.accept()
            threading.Thread(target=_connect, args=(near, target), daemon=True).start()


def _connect(near: socket.socket, target: tuple[str, int]) -> None:
    with near, socket.create_connection(target) as far:
        back = threading.Thread(target=_pass_on, args=(far, near), daemon=True)
        back.start()
        _pass_on(near, far)
        back.join()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):  # an end that is gone is gone for both
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
