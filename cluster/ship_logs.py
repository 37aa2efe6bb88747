"""Copy a folder of logs to a URI again and again: a machine that is taken away leaves what it had to say.

`python cluster/ship_logs.py FOLDER URI [SECONDS]`; a file that grew is copied whole, so what is there can be read.
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

    Of a file of more than `largest` bytes only the end is copied, because it shows what went wrong.

    Returns:
        How many files were copied.
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
    """Ship for as long as the machine lives."""
    seen: dict[str, tuple[int, int]] = {}
    while True:
        try:
            ship(Path(folder), uri, seen)
        except UserError as error:
            print(error.line, flush=True)  # the storage may be back the next time
        time.sleep(float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
