"""Convert masks of `transfgu predict` to the format of a labelling tool or a data set library.

`transfgu export --masks OUT --images URI --to cvat` writes OUT/cvat.xml: one polygon per connected region of a class.
"""

from collections.abc import Sequence

from transfgu.cli.command_line import Parser
from transfgu.datasets.listing import find_images
from transfgu.errors import UserError
from transfgu.sharing import exports, fiftyone, geotiff
from transfgu.sharing.exports import FIFTYONE, GEOTIFF, NAMES, check_format
from transfgu.store import storage


def parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser."""
    made = Parser(__doc__ or "", "export", "--masks URI --images URI --to FORMAT")
    add = made.add_argument
    add("--masks", metavar="URI", required=True, help="masks as PNGs: the --out of `transfgu predict`")
    add("--images", metavar="URI", required=True, help="the images: the --images of `transfgu predict`")
    add("--to", metavar="FORMAT", required=True, help=f"one of {', '.join(NAMES)}")
    add("--out", metavar="URI", help="folder for the file (default: that of --masks)")
    add_outlines(made)
    return made


def add_outlines(parser: Parser) -> None:
    """Add the flags that select regions and set their precision."""
    add = parser.add_argument
    add("--classes", metavar="NAME,NAME", default="", help="export these classes (default: all but background, ignore)")
    add(
        "--tolerance",
        metavar="X",
        type=float,
        default=1.0,
        help="tolerance of simplified outlines [pixels] (default: 1)",
    )
    add("--least", metavar="N", type=int, default=16, help="minimum area of a region [pixels] (default: 16)")


def write(masks: str, images: str, kind: str, out: str, classes: str, tolerance: float, least: int) -> str:
    """Convert the masks in a folder of `transfgu predict`.

    Args:
        masks: URI of that folder.
        images: URI of the folder of images.
        kind: the format.
        out: URI of the folder for the file; empty: that of the masks.
        classes: names of the classes to export, separated by commas; empty: all except background and ignored ones.
        tolerance: maximum distance of simplified outlines from the region's edge, in pixels.
        least: regions of fewer pixels are left out.

    Returns:
        URI of the file, or of the folder of files.

    Raises:
        UserError: there are no masks as PNGs, no such format or class.
    """
    # Import Ray only now, because it takes seconds: mistakes on the command line are reported at once.
    from transfgu.stages.prediction import mask_names, read_claim

    claim = read_claim(masks)
    if claim["files"] != "png":
        raise UserError(
            f"{storage.shown(masks)} has masks as {claim['files']}, but exports take PNGs: predict with --format png",
            code="export-format",
        )
    known = [
        exports.ExportedClass(index=c["index"], name=c["name"], colour=(c["colour"][0], c["colour"][1], c["colour"][2]))
        for c in claim["classes"]
    ]
    names = [name.strip() for name in classes.split(",") if name.strip()]
    if kind in (GEOTIFF, FIFTYONE):
        uris = find_images(images, recursive=True).files
        files = {
            mask: (uris[name], storage.join(masks, "masks", f"{mask}.png")) for name, mask in mask_names(images).items()
        }
        if kind == FIFTYONE:
            return fiftyone.write(files, exports.chosen(known, names), out or masks)
        return geotiff.write(files, known, out or masks, chosen=exports.chosen(known, names) if names else None)
    found = exports.predicted(
        mask_names(images), lambda name: storage.read_bytes_or_none(storage.join(masks, "masks", f"{name}.png"))
    )
    outlines = exports.Outlines(tolerance=tolerance, least=least)
    return exports.write(kind, found, exports.chosen(known, names), out or masks, outlines)


def main(words: Sequence[str]) -> None:
    """Parse the command line, export, print the file's name."""
    given = parser(words).parse(words)
    check_format(given.to)
    out = write(given.masks, given.images, given.to, given.out or "", given.classes, given.tolerance, given.least)
    print(f"exported: {storage.shown(out)}")
