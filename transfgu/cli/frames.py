"""Write frames of videos as images, which every other command takes.

`transfgu frames VIDEO --out FOLDER` writes one frame per second; VIDEO may be a folder of videos, at any depth. A frame
of `walk.mp4` becomes `walk.mp4/00-01-30.500.jpg`: hours, minutes and seconds since the first frame.
"""

from collections.abc import Sequence

from PIL import Image

from transfgu.cli.command_line import Parser, check_out, files_below
from transfgu.datasets import videos
from transfgu.datasets.images import encoded
from transfgu.errors import BadInput, UserError, counted
from transfgu.runtime.progress import Progress
from transfgu.store import storage

_QUALITY = 95  # of the JPEGs


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "frames", "VIDEO --out URI")
    add = made.add_argument
    add("video", metavar="VIDEO", help=f"URI of a video, or of a folder of videos ({', '.join(videos.SUFFIXES)})")
    add("--out", metavar="URI", required=True, help="folder of the images")
    add("--every", metavar="X", type=float, default=1.0, help="interval of frames [seconds]; 0: all (default: 1)")
    add("--quiet", action="store_true", help="print only the result")
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line, write the frames, print how many."""
    given = parser(words).parse(words)
    if not 0 <= given.every < float("inf"):
        raise UserError(f"--every must be 0 or a number of seconds, not {given.every:g}", code="flag-range")
    videos.check_installed()
    found = _videos(given.video)
    check_out(given.out, given.video)
    progress = Progress("frames", quiet=given.quiet)
    written, bad = 0, []
    for name, uri in found.items():
        try:
            for time, pixels in videos.frames(uri, given.every):
                frame = encoded(Image.fromarray(pixels), "JPEG", quality=_QUALITY, subsampling=0)
                storage.write_bytes(storage.join(given.out, name, f"{time_text(time)}.jpg"), frame)
                written += 1
                progress.update(written, None, "frames")
        except BadInput as error:
            bad.append(f"{name} ({error})")
    progress.end()
    if not written:
        raise UserError(f"no frame could be read: {', '.join(bad[:3])}", code="frames-missing")
    if bad:
        print(f"not read to their end: {', '.join(bad)}")
    print(f"{counted(written, 'frame')} of {counted(len(found), 'video')}: {storage.shown(given.out)}")


def time_text(seconds: float) -> str:
    """Return a time as hours, minutes, seconds and milliseconds, such as 00-01-30.500."""
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    return f"{minutes // 60:02}-{minutes % 60:02}-{rest // 1000:02}.{rest % 1000:03}"


def _videos(uri: str) -> dict[str, str]:
    """Return the URIs of videos by the name of their folder of frames."""
    found = {uri.rstrip("/").rpartition("/")[2]: uri} if storage.is_file(uri) else files_below(uri)
    found = {name: file for name, file in found.items() if name.lower().endswith(videos.SUFFIXES)}
    if not found:
        raise UserError(
            f"{storage.shown(uri)} has no video ({', '.join(videos.SUFFIXES)}): check the path", code="videos-missing"
        )
    return found
