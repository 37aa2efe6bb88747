"""Map DICOM slices and grey images of 12, 16 or 32 bits to 8 bits by a window, as PNGs that every other command takes.

`transfgu rescale IMAGES --out FOLDER --low -160 --high 240` makes -160 black and 240 white. Intensities of DICOM files
are in their own unit (Hounsfield units of CT); without --low and --high the window in the DICOM file is used.
"""

import math
from collections.abc import Sequence

from PIL import Image

from transfgu.cli.command_line import Parser, check_out, files_below
from transfgu.datasets import intensities
from transfgu.datasets.images import encoded
from transfgu.datasets.names import output_names
from transfgu.errors import BadInput, UserError, counted
from transfgu.runtime.progress import Progress
from transfgu.store import storage

_SUFFIXES = (".tif", ".tiff", ".png", ".pgm")  # DICOM files are known by their first bytes
_HEAD = 132  # bytes


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "rescale", "IMAGES --out URI")
    add = made.add_argument
    add("images", metavar="IMAGES", help=f"folder of DICOM files and images ({', '.join(_SUFFIXES)}), at any depth")
    add("--out", metavar="URI", required=True, help="folder of the PNGs")
    add("--low", metavar="X", type=float, help="intensity that becomes black (default: from the DICOM file)")
    add("--high", metavar="X", type=float, help="intensity that becomes white (default: from the DICOM file)")
    add("--quiet", action="store_true", help="print only the result")
    return made


def main(words: Sequence[str]) -> None:
    """Parse the command line, write the images, print how many."""
    given = parser(words).parse(words)
    window = None
    if (given.low is None) != (given.high is None):
        raise UserError("--low and --high define a window: give both, or neither", code="flags-conflict")
    if given.low is not None:
        if not (math.isfinite(given.low) and math.isfinite(given.high) and given.low < given.high):
            raise UserError(f"--low must be less than --high, not {given.low:g} and {given.high:g}", code="flag-range")
        window = given.low, given.high
    files = files_below(given.images)
    check_out(given.out, given.images)
    names = list(files)
    progress = Progress("rescale", quiet=given.quiet)
    written, passed, bad = 0, 0, []
    for number, (name, out) in enumerate(zip(names, output_names(names), strict=True), 1):
        progress.update(number, len(names), "files")
        # Read the first bytes only, because other files may be large.
        if not (
            name.lower().endswith(_SUFFIXES) or intensities.is_dicom(storage.read_range(files[name], 0, _HEAD) or b"")
        ):
            passed += 1
            continue
        try:
            data = storage.read_bytes(files[name])
            found = [encoded(Image.fromarray(image.narrowed(window)), "PNG") for image in intensities.slices(data)]
        except BadInput as error:
            bad.append(f"{name} ({error})")
            continue
        for index, png in enumerate(found):
            part = f"{out}.png" if len(found) == 1 else f"{out}/{index:05}.png"
            storage.write_bytes(storage.join(given.out, part), png)
        written += len(found)
    progress.end()
    if not written:
        raise UserError(
            f"{storage.shown(given.images)} has no readable DICOM file or grey image of more than 8 bits"
            f"{f': {bad[0]}' if bad else ''}",
            code="images-missing",
        )
    if bad:
        print(f"{counted(len(bad), 'file')} left out: {', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}")
    if passed:
        print(f"{passed} other files not read")
    print(f"{counted(written, 'image')}: {storage.shown(given.out)}")
