"""Windows of intensities, on files that pydicom brings and on images of 16 and 32 bits made here."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from transfgu.cli import rescale
from transfgu.datasets import intensities
from transfgu.datasets.intensities import Slice
from transfgu.errors import BadInput


def test_a_window_by_hand() -> None:
    values = np.array([[-200, -160, 40, 240, 999]], np.float32)
    image = Slice(values=values, window=(0, 1000))
    assert image.narrowed((-160, 240)).tolist() == [[0, 0, 128, 255, 255]]  # 127.5 to even
    assert image.narrowed(None).tolist() == [[0, 0, 10, 61, 255]]
    assert Slice(values=values, inverted=True).narrowed((-160, 240)).tolist() == [[255, 255, 128, 0, 0]]
    with pytest.raises(BadInput):
        Slice(values=values).narrowed(None)


@pytest.mark.parametrize("kind", ["uint16", "float32", "int32"])
def test_grey_images_of_more_than_8_bits(tmp_path: Path, kind: str) -> None:
    values = np.arange(0, 4096, 16).reshape(16, 16).astype(kind)  # 12 bits
    sink = io.BytesIO()
    Image.fromarray(values).save(sink, "TIFF")
    (found,) = intensities.slices(sink.getvalue())
    np.testing.assert_array_equal(found.values, values)
    assert found.narrowed((0, 4080))[0, :3].tolist() == [0, 1, 2]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(np.full((20, 30), 500, np.uint16)).save(folder / "deep" / "cells.png")
    Image.new("RGB", (9, 9)).save(folder / "photo.png")
    (folder / "broken.tif").write_bytes(b"II*\0")
    (folder / "notes.txt").write_text("")
    rescale.main([str(folder), "--out", str(out), "--low", "400", "--high", "600", "--quiet"])
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("2 files left out: broken.tif (")
    assert "photo.png (image of 8 bits or in colour, which needs no window)" in told[0]
    assert told[1] == "1 other files not read"
    assert [str(p.relative_to(out)) for p in out.rglob("*.png")] == ["deep/cells.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "deep" / "cells.png")), np.full((20, 30), 128))
    with refused("images-missing no window: give --low and --high"):
        rescale.main([str(folder / "deep"), "--out", str(out)])
    for flags, code in (
        (["--low", "1"], "flags-conflict"),
        (["--low", "5", "--high", "5"], "flag-range"),
        (["--low", "0", "--high", "inf"], "flag-range"),
    ):
        with refused(code):
            rescale.main([str(folder), "--out", str(out), *flags])
    with refused("folders-nested"):
        rescale.main([str(folder), "--out", str(folder / "out")])


def test_dicom_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pydicom = pytest.importorskip("pydicom")
    examples = pytest.importorskip("pydicom.data")
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    files = {name: Path(examples.get_testdata_file(name, download=False)) for name in ("CT_small.dcm", "MR_small.dcm")}
    (folder / "ct").write_bytes(files["CT_small.dcm"].read_bytes())  # without a suffix, as scanners write them
    (folder / "mr.dcm").write_bytes(files["MR_small.dcm"].read_bytes())
    ct, mr = pydicom.dcmread(files["CT_small.dcm"]), pydicom.dcmread(files["MR_small.dcm"])
    (found,) = intensities.slices(files["CT_small.dcm"].read_bytes())
    np.testing.assert_array_equal(found.values, ct.pixel_array.astype(np.float32) - 1024)  # Hounsfield units
    assert found.window is None
    (other,) = intensities.slices(files["MR_small.dcm"].read_bytes())
    width, stored = float(mr.WindowWidth), mr.pixel_array.astype(float)
    expected = np.clip((stored - (600 - 0.5)) / (width - 1) + 0.5, 0, 1) * 255  # DICOM PS3.3, C.11.2.1.2
    assert np.abs(other.narrowed(None) - expected).max() <= 0.51
    rescale.main([str(folder), "--out", str(out), "--quiet"])
    told = capsys.readouterr().out
    assert told.startswith("1 file left out: ct (no window: give --low and --high)")
    assert Image.open(out / "mr.png").size == (64, 64)
    mr.PhotometricInterpretation = "MONOCHROME1"
    mr.NumberOfFrames, mr.PixelData = 2, mr.PixelData * 2
    mr.save_as(folder / "mr.dcm")
    rescale.main([str(folder), "--out", str(tmp_path / "two"), "--low", "-100", "--high", "1900", "--quiet"])
    written = sorted(str(p.relative_to(tmp_path / "two")) for p in (tmp_path / "two").rglob("*.png"))
    assert written == ["ct.png", "mr/00000.png", "mr/00001.png"]
    first = np.asarray(Image.open(tmp_path / "two" / "mr" / "00000.png")).astype(int)
    assert np.abs(first - (255 - np.clip((stored + 100) / 2000, 0, 1) * 255)).max() <= 0.51
    (folder / "ct").write_bytes(files["CT_small.dcm"].read_bytes()[:600])
    with pytest.raises(BadInput):
        list(intensities.slices((folder / "ct").read_bytes()))
