"""Frames of videos that PyAV encodes for these tests."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from transfgu.cli import frames as command
from transfgu.datasets import videos
from transfgu.errors import BadInput

av = pytest.importorskip("av")
RATE = 10
LEVELS = (40, 90, 140, 190)  # grey of the frames, one after the other


def write_video(path: Path, count: int = 25, codec: str = "mpeg4") -> None:
    """So many frames of 64 x 48 pixels, ten a second, of grey levels in turn; the left half is black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = Fraction(1, RATE)
        for number in range(count):
            pixels = np.full((48, 64, 3), LEVELS[number % len(LEVELS)], np.uint8)
            pixels[:, :32] = 0
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("every", "wanted"), [(0, range(25)), (1, (0, 10, 20)), (0.25, (0, 3, 5, 8, 10, 13, 15, 18, 20, 23))]
)
def test_frames_come_at_an_interval(tmp_path: Path, every: float | int, wanted: range | tuple[int, ...]) -> None:
    write_video(tmp_path / "a.mp4")
    found = list(videos.frames(str(tmp_path / "a.mp4"), every))
    assert [round(time * RATE) for time, _ in found] == list(wanted)
    for (_, pixels), number in zip(found, wanted, strict=True):
        assert pixels.shape == (48, 64, 3)
        assert abs(pixels[:, 40:].mean() - LEVELS[number % len(LEVELS)]) < 4
        assert pixels[:, :24].mean() < 4


def test_the_command_writes_images_by_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "videos" / "day" / "walk.mp4")
    write_video(tmp_path / "videos" / "run.MKV", count=12)
    (tmp_path / "videos" / "broken.mp4").write_bytes((tmp_path / "videos" / "day" / "walk.mp4").read_bytes()[:300])
    (tmp_path / "videos" / "notes.txt").write_text("")
    command.main([str(tmp_path / "videos"), "--out", str(tmp_path / "out"), "--quiet"])
    told = capsys.readouterr().out
    assert told.splitlines()[-1].startswith("5 frames of 3 videos")
    assert told.startswith("not read to their end: broken.mp4 (unreadable video")
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.jpg"))
    times = ["00-00-00.000", "00-00-01.000", "00-00-02.000"]
    assert written == [f"day/walk.mp4/{t}.jpg" for t in times] + [f"run.MKV/{t}.jpg" for t in times[:2]]
    assert Image.open(tmp_path / "out" / written[1]).size == (64, 48)
    command.main([str(tmp_path / "videos" / "run.MKV"), "--out", str(tmp_path / "one"), "--every", "0", "--quiet"])
    assert capsys.readouterr().out.startswith("12 frames of 1 video:")


def test_a_turned_video_is_shown_upright(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", count=3)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # nine numbers of 16.16 or 2.30 bits: here the identity
    turned = [0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30]  # by a quarter, clockwise
    data[matrix : matrix + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in turned)
    (tmp_path / "turned.mp4").write_bytes(bytes(data))
    _, pixels = next(videos.frames(str(tmp_path / "turned.mp4"), 0))
    assert pixels.shape == (64, 48, 3)
    assert pixels[:24].mean() < 4  # its left is now above
    assert abs(pixels[40:].mean() - LEVELS[0]) < 4


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1\nother.mp4\n")
    with pytest.raises(BadInput):
        list(videos.frames(str(tmp_path / "list.mp4"), 1))
    with refused("frames-missing list.mp4"):
        command.main([str(tmp_path), "--out", str(tmp_path) + "-out"])
    with refused("folders-nested"):
        command.main([str(tmp_path), "--out", str(tmp_path / "out")])
    with refused("flag-range"):
        command.main([str(tmp_path), "--out", str(tmp_path) + "-out", "--every", "-1"])
    (tmp_path / "none").mkdir()
    with refused("videos-missing"):
        command.main([str(tmp_path / "none"), "--out", str(tmp_path) + "-out"])


def test_times_as_text() -> None:
    assert command.time_text(3 * 3600 + 62.0304) == "03-01-02.030"
    assert command.time_text(59.9996) == "00-01-00.000"
