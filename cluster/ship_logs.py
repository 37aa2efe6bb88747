"""Copy a folder of logs to a URI repeatedly, so that the logs of a lost machine survive.

`python cluster/ship_logs.py FOLDER URI [SECONDS]`; a file that has grown is copied as a whole, so the copy is readable.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transfgu.errors import UserError
from transfgu.store import storage

LARGEST = 256 << 20  # bytes


def ship(folder: Path, uri: str, seen: dict[str, tuple[int, int]], *, largest: int = LARGEST) -> int:
    """Copy files that changed since `seen` (size and time by name), and update `seen`.

    Only the end of a file of more than `largest` bytes is copied, because it shows the error.

    Returns:
        Number of copied files.
    """
    copied = 0
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(file.relative_to(folder))
        try:
            state = file.stat()
            now = (state.st_size, state.st_mtime_ns)
            if seen.get(name) == now:
                continue
            with file.open("rb") as stream:
                stream.seek(max(0, now[0] - largest))
                storage.write_bytes(storage.join(uri, name), stream.read(largest))
        except FileNotFoundError:
            continue  # Ray rotates its logs
        seen[name] = now
        copied += 1
    return copied


def main(folder: str, uri: str, seconds: str = "30") -> None:
    """Copy as long as the machine runs."""
    seen: dict[str, tuple[int, int]] = {}
    while True:
        try:
            ship(Path(folder), uri, seen)
        except UserError as error:
            print(error.line, flush=True)  # the storage may work again next time
        time.sleep(float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
