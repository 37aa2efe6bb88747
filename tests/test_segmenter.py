"""The segmenter against encoder and decoder used directly, and its errors."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from PIL import Image

import transfgu
from tests.made_run import SIDE, MadeRun, make_run
from tests.refusals import refused
from transfgu.datasets import images
from transfgu.decoder import MaskDecoder, winners
from transfgu.encoder import Encoder, normalise
from transfgu.segmenter import Segmenter, class_table


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("bare"), labels=False, things=4, stuff=0)


def photograph(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_it_is_encoder_and_decoder_then_the_assignment(labelled: MadeRun) -> None:
    image = photograph(50, 90)
    encoder = Encoder.from_pretrained("tiny", labelled.recipe.encoder.weights)
    weights = safetensors.torch.load_file(labelled.run.file("model.safetensors"))
    decoder = MaskDecoder.from_state_dict(weights, num_heads=3)
    resized = torch.from_numpy(images.resize(image, (SIDE, SIDE)))[None]
    with torch.no_grad():
        logits = decoder(encoder(normalise(resized)).patches)[0]
    masks = F.interpolate(logits.mT.reshape(1, 10, 8, 8), (50, 90), mode="bilinear")
    clusters = masks[0].argmax(dim=0).numpy()
    assignment = json.loads(Path(labelled.run.artifact("evaluation").file("scores.json")).read_text())["assignment"]
    assert sorted(assignment) == list(range(10))
    assert assignment != list(range(10))  # else this test could not see it
    expected = np.full_like(clusters, -1)
    for true_class, cluster in enumerate(assignment):
        expected[clusters == cluster] = true_class

    np.testing.assert_array_equal(Segmenter.load(labelled.run.uri).predict(image), expected)


def test_images_come_in_many_forms(labelled: MadeRun, tmp_path: Path) -> None:
    image = photograph(30, 40)
    Image.fromarray(image).save(tmp_path / "photo.png")
    segmenter = transfgu.Segmenter.load(Path(labelled.run.uri), device="cpu")
    expected = segmenter.predict(image)
    assert expected.shape == (30, 40)
    for form in (Image.fromarray(image), tmp_path / "photo.png", f"file://{tmp_path}/photo.png"):
        np.testing.assert_array_equal(segmenter.predict(form), expected)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    turned = segmenter.predict(np.rot90(image, -1))
    turned_forms: list[images.Picture] = [tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes()]
    for turned_form in [*turned_forms, Image.open(tmp_path / "turned.png")]:
        np.testing.assert_array_equal(segmenter.predict(turned_form), turned)
        np.testing.assert_array_equal(segmenter.predict(turned_form, orient=False), expected)
    grey = Image.fromarray(image).convert("L")
    np.testing.assert_array_equal(segmenter.predict(grey), segmenter.predict(grey.convert("RGB")))


def test_a_list_gives_a_list_however_long(labelled: MadeRun) -> None:
    segmenter = Segmenter.load(labelled.run.uri)
    photographs = [photograph(20 + i, 40) for i in range(18)]
    predictions = segmenter.predict(photographs)
    assert isinstance(predictions, list)
    assert len(predictions) == 18
    for image, prediction in zip(photographs, predictions, strict=True):
        np.testing.assert_array_equal(prediction, segmenter.predict(image))
    assert segmenter.predict([]) == []


def test_probabilities_are_the_classes_at_the_images_size(labelled: MadeRun) -> None:
    segmenter = Segmenter.load(labelled.run.uri)
    image = photograph(50, 90)
    probabilities = segmenter.predict(image, probabilities=True)
    assert probabilities.shape == (10, 50, 90)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(axis=0), segmenter.predict(image))
    resized = torch.from_numpy(images.resize(image, (SIDE, SIDE)))[None]
    logits = F.interpolate(segmenter.logits(resized), (50, 90), mode="bilinear")[0]
    assert segmenter.class_of.tolist() != list(range(10))  # else the next line could not see it
    for cluster, index in enumerate(segmenter.class_of):
        expected = (logits[cluster] - logits.logsumexp(dim=0)).exp()
        np.testing.assert_allclose(probabilities[index], expected, rtol=1e-4)
    several = segmenter.predict([image, photograph(20, 30)], probabilities=True)
    assert [p.shape for p in several] == [(10, 50, 90), (10, 20, 30)]


def test_an_image_in_one_tile_is_predicted_as_a_whole(labelled: MadeRun) -> None:
    segmenter = Segmenter.load(labelled.run.uri)
    image = photograph(50, 90)
    for tile in (90, 500):
        np.testing.assert_array_equal(segmenter.predict(image, tile=tile), segmenter.predict(image))
    shares = segmenter.predict(image, probabilities=True)
    np.testing.assert_array_equal(segmenter.predict(image, probabilities=True, tile=90), shares)


def test_tiles_of_an_image(labelled: MadeRun, tmp_path: Path) -> None:
    segmenter = Segmenter.load(labelled.run.uri)
    image = photograph(150, 90)
    Image.fromarray(image).save(tmp_path / "photo.png")
    found = segmenter.predict(image, tile=64, overlap=16)
    assert found.shape == (150, 90)
    assert found.dtype == np.uint8
    for form in (tmp_path / "photo.png", Image.fromarray(image)):
        np.testing.assert_array_equal(segmenter.predict(form, tile=64, overlap=16), found)
    shares = segmenter.predict([image], probabilities=True, tile=64, overlap=16)[0]
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(shares.argmax(axis=0), found)
    # Where one tile alone lies, it is that tile's prediction.
    corner = segmenter.predict(image[:64, :64], probabilities=True)
    np.testing.assert_allclose(shares[:, :20, :20], corner[:, :20, :20], rtol=1e-3)
    with refused("image-unreadable"):
        segmenter.predict(tmp_path / "none.png", tile=64, overlap=16)


def test_a_shared_model_is_whole_and_says_what_it_is(labelled: MadeRun, tmp_path: Path) -> None:
    segmenter = Segmenter.load(labelled.run.uri)
    segmenter.recipe = segmenter.recipe.with_fields({"data": "s3://private/photos"})
    segmenter.save_pretrained(tmp_path / "shared")
    again = Segmenter.from_pretrained(tmp_path / "shared", device="cpu")
    image = photograph(50, 90)
    np.testing.assert_array_equal(again.predict(image), segmenter.predict(image))
    assert (again.classes, again.colours, again.scores) == (segmenter.classes, segmenter.colours, segmenter.scores)
    texts = [p.read_text() for p in (tmp_path / "shared").rglob("*") if p.suffix in (".md", ".yaml", ".json")]
    assert len(texts) == 4
    for text in texts:  # paths of anybody's data stay at home
        assert "private" not in text
        assert str(labelled.run.uri) not in text
        assert labelled.recipe.encoder.weights not in text
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.library_name == "transfgu"
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert metrics["mean_iou"] == round(labelled.metrics["mean_iou"], 2)
    assert f"| 1 | quilt | {labelled.metrics['iou'][1]:.1f} |" in card.text


def test_the_card_of_a_model_without_labels(bare: MadeRun, tmp_path: Path) -> None:
    segmenter = Segmenter.load(bare.run.uri)
    segmenter.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert "no labels to score with" in card.text
    assert "| 4 | concept 4 |" in card.text
    assert Segmenter.from_pretrained(tmp_path).classes == segmenter.classes


def test_classes_are_named_after_labels_where_there_were_some(labelled: MadeRun, bare: MadeRun) -> None:
    named = Segmenter.load(labelled.run.uri)
    assert named.classes[:2] == ("target", "quilt")
    assert named.colours[0] == (228, 26, 28)
    unnamed = Segmenter.load(bare.run.uri)
    assert unnamed.classes == ("background", "concept 1", "concept 2", "concept 3", "concept 4")
    assert len(set(unnamed.colours)) == 5


def test_concepts_are_numbered_as_they_stand_in_a_mask(labelled: MadeRun) -> None:
    names, class_of = class_table(labelled.recipe, None)
    assert names == tuple(f"concept {i}" for i in range(10))
    np.testing.assert_array_equal(class_of, np.arange(10))
    # True class 0 was matched to cluster 3, so cluster 3 is class 0.
    clusters = np.array([3, 0, 1, 2, 4, 5, 6, 7, 8, 9])
    assert class_table(labelled.recipe, clusters)[1].tolist() == [1, 2, 3, 0, 4, 5, 6, 7, 8, 9]


def test_winners_of_a_large_image_are_those_of_all_logits_at_once() -> None:
    logits = torch.randn(5, 4, 6)
    size = (210, 210)
    everything = F.interpolate(logits[None], size, mode="bilinear")[0]
    found = winners(logits, size, held_logits=3 * 210 * 210 + 1)  # three clusters at a time
    assert set(found.flatten().tolist()) == set(everything.argmax(dim=0).flatten().tolist())
    # Groups of another size may round otherwise, so where two are equal either may win.
    torch.testing.assert_close(everything.gather(0, found[None])[0], everything.amax(dim=0), atol=1e-5, rtol=0)


def test_the_first_of_equals_wins() -> None:
    assert winners(torch.zeros(3, 2, 2), (4, 4)).eq(0).all()


@pytest.mark.processes
def test_no_ray_in_a_fresh_process(labelled: MadeRun) -> None:
    program = """
import sys
sys.modules["ray"] = None  # an import of it fails, as where it is not installed
import transfgu
assert not {"torch", "numpy"} & set(sys.modules), "importing the package must be cheap"
import numpy as np
prediction = transfgu.Segmenter.load(sys.argv[1]).predict(np.zeros((20, 30, 3), np.uint8))
assert prediction.shape == (20, 30)
from transfgu.methods import METHODS
for method in METHODS.values():
    method.load("model")
from transfgu.cli.main import command_module
for name in ("status", "runs", "name", "export", "serve", "compare", "schema"):
    command_module(name).parser([])
print("done", transfgu.__version__)
"""
    ended = subprocess.run([sys.executable, "-c", program, labelled.run.uri], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[0] == "done"


@pytest.mark.processes
def test_prediction_needs_no_more_than_its_page_installs(labelled: MadeRun) -> None:
    page = (Path(__file__).parents[1] / "docs" / "index.md").read_text().partition("## Install for prediction alone")[2]
    installed = re.findall(r"^pip install (?!--)(.*)$", page, re.MULTILINE)[0].split()
    program = """
import sys
from importlib import metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

run, *waiting = sys.argv[1:]
kept = {"transfgu"}
while waiting:
    name = canonicalize_name(waiting.pop())
    if name in kept:
        continue
    kept.add(name)
    try:
        needed = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # one of another platform
        continue
    needs = [Requirement(line) for line in needed]
    waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
owners = {module: {canonicalize_name(o) for o in of} for module, of in metadata.packages_distributions().items()}

class Installed:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        absent = top in owners and not owners[top] & kept
        return None if absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):  # importlib.metadata asks the finders, too
        return getattr(self.finder, name)

sys.meta_path[:] = [Installed(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
for absent in ("ray", "faiss", "boto3", "optuna"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{absent} can be imported")
import numpy as np
from transfgu import Segmenter
assert Segmenter.load(run).predict(np.zeros((20, 30, 3), np.uint8)).shape == (20, 30)
print("predicted", flush=True)
from transfgu.cli.command_line import run_job
from transfgu.cli.main import run_command
run_job(lambda: run_command(["train", "shapes", "--run", run + "-2"]))
"""
    command = [sys.executable, "-c", program, labelled.run.uri, *installed]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.splitlines()[:1] == ["predicted"], ended.stderr
    assert ended.stderr.rstrip().endswith("[ray-missing]"), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.returncode == 2


@pytest.mark.long
def test_a_photograph_costs_little_more_than_encoder_and_decoder(tmp_path: Path) -> None:
    # ViT-S/8 and 27 classes; CPU time, as other processes come and go, each the least of four.
    program = """
import sys, time
import numpy as np, safetensors.torch, torch
from transfgu import Segmenter
from transfgu.decoder import MaskDecoder
from transfgu.recipe import preset
folder = sys.argv[1]
recipe = preset("coco-stuff-27").with_fields({"encoder.weights": "random"})
open(folder + "/recipe.yaml", "w").write(recipe.to_yaml())
safetensors.torch.save_file(MaskDecoder(384, 27, num_heads=6).state_dict(), folder + "/model.safetensors")
segmenter = Segmenter.load(folder, device="cpu")
photo = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
batch = torch.zeros(1, 3, 320, 320)

def bare():
    with torch.inference_mode():
        return segmenter.decoder(segmenter.encode.encoder.patch_tokens(batch))

def cost(action):
    started = time.process_time()
    action()
    return time.process_time() - started

taken = [(cost(lambda: segmenter.predict(photo)), cost(bare)) for _ in range(5)][1:]
assert "ray" not in sys.modules
whole, alone = (min(times) for times in zip(*taken))
print(f"{whole / alone:.3f}", f"predict {whole:.2f} s, encoder and decoder {alone:.2f} s")
"""
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout.split()[0]) <= 1.1, ended.stdout


def test_the_version_is_the_packages() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{transfgu.__version__}"\n' in project
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = transfgu.nothing_here


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (exec, (f"open({str(self.mark)!r}, 'w')",))


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    mark = tmp_path / "unpickled"
    Path(made.run.file("model.safetensors")).write_bytes(pickle.dumps(Bomb(mark)))
    with refused("weights-damaged model.safetensors"):
        Segmenter.load(made.run.uri)
    assert not mark.exists()


def test_mistakes_are_answered_in_one_line(tmp_path: Path) -> None:
    with refused("run-missing"):
        Segmenter.load(tmp_path / "nowhere")
    made = make_run(tmp_path)
    segmenter = Segmenter.load(made.run.uri)
    for empty in (np.zeros((4, 4)), np.zeros((0, 0, 3), np.uint8), b"", Image.new("RGB", (0, 0))):
        with refused("image-unreadable"):
            segmenter.predict(empty)
    (tmp_path / "text.png").write_text("no picture")
    with refused("image-unreadable text.png"):
        segmenter.predict(tmp_path / "text.png")
    other = MaskDecoder(24, 7, num_heads=3)
    safetensors.torch.save_file(other.state_dict(), made.run.file("model.safetensors"))
    with refused("model-mismatch 7 10"):
        Segmenter.load(made.run.uri)
    Path(made.run.file("model.safetensors")).unlink()
    with refused("model-missing"):
        Segmenter.load(made.run.uri)


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5, 3), (5, 0, 3), (1, 5, 3), (), (3,), (2, 3, 4, 5), (4, 4, 2)])
def test_arrays_that_are_no_images_are_one_line(labelled: MadeRun, shape: tuple[int, ...]) -> None:
    segmenter = Segmenter.load(labelled.run.uri)
    for tile in (None, 128):
        with refused("image-unreadable"):
            segmenter.predict(np.zeros(shape, np.uint8), tile=tile)
    with refused("image-unreadable"):
        segmenter.predict(np.zeros((4, 4, 3), np.float32))
    assert segmenter.predict([]) == []


@pytest.mark.parametrize("assignment", [[0, 0], [0, 99], [-1, 0], "ab", [0.5, 1], [None, 1]])
def test_an_assignment_that_is_no_permutation_is_damage(labelled: MadeRun, tmp_path: Path, assignment: Any) -> None:
    shutil.copytree(labelled.run.uri, tmp_path / "run")
    file = tmp_path / "run" / "evaluation" / "scores.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "assignment": [*assignment, *told["assignment"][2:]]}))
    with refused("file-damaged scores.json"):
        Segmenter.load(str(tmp_path / "run"))
