"""Exported masks, read by the tools' own libraries, or according to their published descriptions."""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.refusals import refused
from transfgu.errors import UserError
from transfgu.sharing import exports, fiftyone
from transfgu.sharing.exports import ExportedClass, ExportedMask, Outlines

coco = pytest.importorskip("pycocotools.coco")

CLASSES = [
    ExportedClass(index=0, name="background", colour=(0, 0, 0)),
    ExportedClass(index=1, name="cow & calf", colour=(255, 0, 16)),
    ExportedClass(index=2, name="ring", colour=(0, 128, 0)),
    ExportedClass(index=3, name="ignore", colour=(128, 128, 128)),
]
EXACT = Outlines(tolerance=0.0, least=0)


def masks() -> list[ExportedMask]:
    first = np.zeros((40, 60), np.uint8)
    first[5:20, 10:30] = 1
    first[30:38, 2:9] = 1
    y, x = np.mgrid[:40, :60]
    away = np.hypot(x - 45, y - 20)
    first[(away < 14) & (away > 6)] = 2
    second = np.full((30, 20), 3, np.uint8)
    second[3:9, 4:8] = 2
    return [ExportedMask(name="a/one.jpg", mask=first), ExportedMask(name="two.png", mask=second)]


def written(kind: str, folder: Path, classes: list[ExportedClass] | None = None, outlines: Outlines = EXACT) -> Path:
    shown = exports.chosen(CLASSES, []) if classes is None else classes
    return Path(exports.write(kind, masks(), shown, str(folder), outlines))


def test_coco_opens_it(tmp_path: Path) -> None:
    opened = coco.COCO(str(written("coco", tmp_path)))
    assert [c["name"] for c in opened.loadCats(opened.getCatIds())] == ["cow & calf", "ring"]
    for number, item in enumerate(masks(), start=1):
        (picture,) = opened.loadImgs(number)
        assert picture["file_name"] == item.name
        for category in (2, 3):
            found = opened.loadAnns(opened.getAnnIds(imgIds=[number], catIds=[category]))
            inside = sum((opened.annToMask(a) for a in found), np.zeros(item.mask.shape, np.uint8))
            np.testing.assert_array_equal(inside, item.mask == category - 1)
            assert sum(a["area"] for a in found) == (item.mask == category - 1).sum()
    ring = opened.loadAnns(opened.getAnnIds(imgIds=[1], catIds=[3]))[0]
    assert ring["bbox"] == [32, 7, 27, 27]


def test_the_panoptic_pixels_are_the_masks(tmp_path: Path) -> None:
    tree = json.loads(written("coco-panoptic", tmp_path).read_text())
    for item, annotation in zip(masks(), tree["annotations"], strict=True):
        pixels = np.asarray(Image.open(tmp_path / "panoptic" / annotation["file_name"])).astype(int)
        ids = pixels @ (1, 256, 65536)
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in annotation["segments_info"]}
        for segment in annotation["segments_info"]:
            np.testing.assert_array_equal(ids == segment["id"], item.mask == segment["category_id"] - 1)
            assert segment["area"] == (ids == segment["id"]).sum()
            x, y, width, height = segment["bbox"]
            assert (ids == segment["id"])[y : y + height, x : x + width].sum() == segment["area"]


def painted(rings: list[list[tuple[float, float]]], size: tuple[int, int]) -> np.ndarray:
    """Fill polygons at eight times the size, because their corners are between pixels."""
    picture = Image.new("L", (8 * size[1], 8 * size[0]))
    for ring in rings:
        ImageDraw.Draw(picture).polygon([(8 * x, 8 * y) for x, y in ring], fill=1)
    return np.asarray(picture)[4::8, 4::8]


def test_cvat_reads_polygons_of_its_labels(tmp_path: Path) -> None:
    """Read masks according to the description of `CVAT for images 1.1`."""
    root = ElementTree.parse(written("cvat", tmp_path)).getroot()
    assert root.findtext("version") == "1.1"
    assert [label.findtext("name") for label in root.iter("label")] == ["cow & calf", "ring"]
    assert [label.findtext("color") for label in root.iter("label")] == ["#ff0010", "#008000"]
    for item, image in zip(masks(), root.iter("image"), strict=True):
        assert (image.get("name"), image.get("height"), image.get("width")) == (item.name, *map(str, item.mask.shape))
        for name, index in (("cow & calf", 1), ("ring", 2)):
            rings = [
                [(float(x), float(y)) for x, y in (p.split(",") for p in polygon.attrib["points"].split(";"))]
                for polygon in image.iter("polygon")
                if polygon.get("label") == name
            ]
            assert (painted(rings, item.mask.shape) == (item.mask == index)).mean() > 0.98


def test_label_studio_reads_percent_of_the_image(tmp_path: Path) -> None:
    """Read masks according to the description of the format of its predictions."""
    tasks = json.loads(written("labelstudio", tmp_path).read_text())
    view = ElementTree.parse(tmp_path / "labelstudio.xml").getroot()
    (image,), (labels,) = view.findall("Image"), view.findall("PolygonLabels")
    known = {label.get("value") for label in labels}
    for item, task in zip(masks(), tasks, strict=True):
        assert task["data"][str(image.get("value")).lstrip("$")] == item.name
        height, width = item.mask.shape
        (prediction,) = task["predictions"]
        assert len({region["id"] for region in prediction["result"]}) == len(prediction["result"])
        rings: dict[str, list[list[tuple[float, float]]]] = {}
        for region in prediction["result"]:
            assert (region["from_name"], region["to_name"]) == (labels.get("name"), labels.get("toName"))
            assert (region["original_height"], region["original_width"]) == (height, width)
            (name,) = region["value"]["polygonlabels"]
            assert name in known
            points = [(x * width / 100, y * height / 100) for x, y in region["value"]["points"]]
            rings.setdefault(name, []).append(points)
        for name, index in (("cow & calf", 1), ("ring", 2)):
            assert (painted(rings.get(name, []), item.mask.shape) == (item.mask == index)).mean() > 0.98


def test_geojson_has_holes_and_closed_rings(tmp_path: Path) -> None:
    features = json.loads(written("geojson", tmp_path).read_text())["features"]
    assert {f["properties"]["image"] for f in features} == {"a/one.jpg", "two.png"}
    for feature in features:
        assert feature["geometry"]["type"] == "Polygon"
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
    features_module = pytest.importorskip("rasterio.features")
    for item in masks():
        own = [
            f["geometry"] for f in features if f["properties"]["image"] == item.name and f["properties"]["index"] == 2
        ]
        burnt = features_module.rasterize(own, out_shape=item.mask.shape)
        np.testing.assert_array_equal(burnt, item.mask == 2)


def test_fiftyone_finds_each_images_mask(tmp_path: Path) -> None:
    """Read masks by the rules of `ImageSegmentationDirectory`: names without suffix are keys, OpenCV reads the PNGs."""
    cv2 = pytest.importorskip("cv2")
    files = {}
    for name, item in zip(("a/one", "two.v1"), masks(), strict=True):
        mask = tmp_path / "masks" / f"{name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        indexed = Image.fromarray(item.mask)
        indexed.putpalette([value for c in CLASSES for value in c.colour])
        indexed.save(mask)
        files[name] = (str(tmp_path / "images" / item.name), str(mask))
    files["gone"] = (str(tmp_path / "images" / "gone.png"), str(tmp_path / "masks" / "gone.png"))
    folder = Path(fiftyone.write(files, exports.chosen(CLASSES, []), str(tmp_path)))
    images = {
        str(Path(key).with_suffix("")): path for key, path in json.loads((folder / "data.json").read_text()).items()
    }
    labels = {str(p.relative_to(folder / "labels").with_suffix("")): p for p in (folder / "labels").rglob("*.png")}
    assert images == {name: files[name][0] for name in ("a/one", "two.v1")}
    assert labels.keys() == images.keys()
    assert json.loads((folder / "mask_targets.json").read_text()) == {"2": "cow & calf", "3": "ring"}
    for name, item in zip(("a/one", "two.v1"), masks(), strict=True):
        read = cv2.imread(str(labels[name]), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(read, np.where(np.isin(item.mask, (1, 2)), item.mask + 1, 0))


def test_fiftyone_has_room_for_256_classes(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    mask = np.array([[0, 255]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "x.png")
    classes = [ExportedClass(index=i, name=f"{i}", colour=(0, 0, 0)) for i in (0, 255)]
    folder = fiftyone.write({"x": ("/images/x.png", str(tmp_path / "x.png"))}, classes, str(tmp_path))
    read = cv2.imread(f"{folder}/labels/x.png", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(read, [[1, 256]])


def test_fiftyone_reads_no_buckets(tmp_path: Path) -> None:
    with refused("export-images-remote s3://bucket/x.jpg"):
        fiftyone.write({"x": ("s3://bucket/x.jpg", str(tmp_path / "x.png"))}, CLASSES, str(tmp_path))


def test_only_chosen_classes() -> None:
    assert [c.name for c in exports.chosen(CLASSES, [])] == ["cow & calf", "ring"]
    assert [c.name for c in exports.chosen(CLASSES, ["background"])] == ["background"]
    with pytest.raises(UserError) as caught:
        exports.chosen(CLASSES, ["horse"])
    assert caught.value.code == "export-class-unknown"
    with pytest.raises(UserError) as caught:
        exports.check_format("yolo")
    assert caught.value.code == "export-unknown"


def test_small_regions_and_corners_are_fewer(tmp_path: Path) -> None:
    exact = json.loads(written("coco", tmp_path).read_text())["annotations"]
    fewer = json.loads(written("coco", tmp_path, outlines=Outlines(tolerance=1.5, least=100)).read_text())[
        "annotations"
    ]
    assert len(exact) == 4
    assert len(fewer) == 2
    assert sum(len(a["segmentation"][0]) for a in fewer) < sum(len(a["segmentation"][0]) for a in exact) / 2


def test_masks_are_found_under_their_images_names() -> None:
    sink = io.BytesIO()
    Image.fromarray(np.eye(3, dtype=np.uint8)).save(sink, "PNG")
    files = {"a": sink.getvalue()}
    found = list(exports.predicted({"b.jpg": "b", "a.jpg": "a"}, files.get))
    assert [item.name for item in found] == ["a.jpg"]
    np.testing.assert_array_equal(found[0].mask, np.eye(3))
