"""Read frames of a video file at a given interval, by FFmpeg's libraries (through PyAV, the extra `video`)."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from transfgu.errors import BadInput, UserError
from transfgu.store import storage

# FFmpeg's format by suffix. It is never guessed from the content, because playlists lead FFmpeg to other files.
_FORMATS = {
    **dict.fromkeys((".mp4", ".m4v", ".mov"), "mov"),
    **dict.fromkeys((".mkv", ".webm"), "matroska"),
    **dict.fromkeys((".mpg", ".mpeg"), "mpeg"),
    **{".avi": "avi", ".ts": "mpegts"},
}

SUFFIXES = tuple(_FORMATS)
"""Suffixes of the files that are read."""


def check_installed() -> None:
    """Raise UserError if PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError("frames requires PyAV: pip install 'transfgu[video]'", code="package-missing") from None


def frames(uri: str, every: float | int) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Decode a video and yield its first frame, then the first frame at or after each multiple of `every` seconds.

    Frames are rotated as in players, according to the file. A frame without a time is skipped.

    Args:
        uri: of the file, with one of :data:`SUFFIXES`.
        every: seconds; 0: all frames.

    Yields:
        The time since the first frame [seconds], and the frame.

    Raises:
        BadInput: no video can be read, or it is damaged; frames before the damage were yielded.
        UserError: the storage fails.
    """
    import av

    fs, path = storage.filesystem(uri)
    with fs.open_input_file(path) as file:
        try:
            with av.open(file, format=_FORMATS[uri[uri.rindex(".") :].lower()]) as container:
                if not container.streams.video:
                    raise BadInput("no video in the file")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                first, number = None, 0
                for frame in container.decode(stream):
                    if frame.time is None:
                        continue
                    first = frame.time if first is None else first
                    time = frame.time - first
                    if time + 1e-6 < number * every:
                        continue
                    number = int((time + 1e-6) // every) + 1 if every else 0
                    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
                    yield time, np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
        except av.FFmpegError as error:
            raise BadInput(f"unreadable video: {error.strerror}") from None
