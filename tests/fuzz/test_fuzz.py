"""Any content of a file is read, or refused in one line: no other error, no hang, and bounded memory.

`pytest tests/fuzz --fuzz-seconds 7200 --fuzz-seed 5` runs for two hours. A failure names the seed and the case, and
keeps its file.
"""

import dataclasses
import io
import json
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from tests.fuzz.mutations import damaged, odd_tree
from transfgu import datasets
from transfgu.datasets import images
from transfgu.datasets.listing import read_names
from transfgu.encoder import Encoder
from transfgu.errors import BadInput, UserError
from transfgu.planning.measurements import Ingest, Measurements
from transfgu.recipe import MAX_PIXELS, from_yaml, preset
from transfgu.search.trials import Ledger
from transfgu.sharing import names
from transfgu.stages.prediction import PredictionJob, known_bad, names_in, read_claim
from transfgu.store import parquet, predicted
from transfgu.store.artifacts import Manifest, Run
from transfgu.store.weights import read_weights

CASES = 15
"""Number of cases of each kind if no time is given."""
SLOWEST = 20.0
"""Time limit of a case in seconds, long enough for a busy machine."""
MOST_BYTES = 12 * MAX_PIXELS
"""Memory limit for the largest image: its decoded pixels, as RGB, and intermediate arrays."""

GOLDEN = Path(__file__).parents[1] / "golden"
VOC = datasets.classes(preset("pascal-voc"))
Files = Sequence[bytes]


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 20, (24, 17, 3), np.uint8)
    picture = Image.fromarray(pixels) if mode != "I;16" else Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode not in ("RGB", "I;16"):
        picture = picture.convert(mode)
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


IMAGES = (
    *(encoded(kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "PPM", "AVIF", "HEIF", "JPEG2000")),
    *(encoded("JPEG", exif=turned()), encoded("JPEG", "CMYK"), encoded("JPEG", "L", progressive=True)),
    *(encoded("TIFF", compression=how) for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")),
    *(encoded("TIFF", tiffinfo={274: 8}), encoded("PNG", "I;16"), encoded("PNG", "P"), encoded("PNG", "1")),
)
LABELS = (
    *(encoded("PNG", mode) for mode in ("L", "P", "1", "I;16")),
    *(
        encoded("PNG", "P", bits=4),
        encoded("TIFF", "L"),
        encoded("TIFF", "1"),
        encoded("GIF", "L"),
        encoded("PPM", "L"),
    ),
)


def weights() -> Files:
    vit = Encoder.from_pretrained("vit_shapes").vit
    state = {name: tensor for name, tensor in vit.state_dict().items() if "blocks" not in name or "blocks.0." in name}
    small = {name: tensor[..., :8].clone() for name, tensor in state.items()}
    told = safetensors.torch.save(small, {"patch_size": "8", "num_heads": "3"})
    sinks = [io.BytesIO(), io.BytesIO(), io.BytesIO()]
    torch.save({"teacher": {f"module.backbone.{n}": t for n, t in small.items()}}, sinks[0])
    torch.save(small, sinks[1], _use_new_zipfile_serialization=False)
    torch.save({"cls_emb": torch.zeros(1, 3, 8)}, sinks[2])
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 85\n"
    return (told, *(sink.getvalue() for sink in sinks), pointer, b'{"weight_map": {"a": "b"}}')


def tables() -> Files:
    found = []
    for table in (
        pa.table({"name": ["a", "b"], "mask": ["a", "b"], "size": [1, 2], "changed": [3, 4]}),
        pa.table({"name": ["a"] * 50, "maps": [b"x" * 40] * 50}),
        pa.table({"n": pa.array([[1.5], None, []], pa.list_(pa.float32()))}),
    ):
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        found.append(sink.getvalue())
    return found


def trees() -> Mapping[str, Any]:
    """Readers of our JSON files by file."""
    run = GOLDEN / "run"
    trial = {"number": 0, "parameters": {"training.lr": 0.1}, "status": "complete", "history": [{"epoch": 1}]}
    return {
        "manifest": json.loads((run / "features" / "manifest.json").read_text()),
        "fields": json.loads((run / "features" / "fields.json").read_text()),
        "scores": json.loads((run / "evaluation" / "scores.json").read_text()),
        "history": json.loads((run / "training" / "history.json").read_text()),
        "claim": json.loads((GOLDEN / "prediction" / "prediction.json").read_text()),
        "summary": json.loads((GOLDEN / "prediction" / "summary.json").read_text()),
        "trial": trial,
        "ingest": {f.name: 1.0 for f in dataclasses.fields(Ingest)},
        "measurements": {f.name: 1.0 for f in dataclasses.fields(Measurements)} | {"timings": [{}]},
        "names": {"format": 2, "names": {"0": "sky", "1": "sea"}},
    }


def read_image(data: bytes, folder: Path, random: np.random.Generator) -> None:
    found = images.decode_image(data, orient=bool(random.integers(2)))
    assert found.dtype == np.uint8
    assert found.ndim == 3


def read_label(data: bytes, folder: Path, random: np.random.Generator) -> None:
    (folder / "label").write_bytes(data)
    found = images.read_label(str(folder / "label"), VOC)
    assert -1 <= found.min() <= found.max() < len(VOC.names)
    images.read_mask(str(folder / "label"))


def load_weights(data: bytes, folder: Path, random: np.random.Generator) -> None:
    file = folder / f"w{('.pth', '.safetensors')[random.integers(2)]}"
    file.write_bytes(data)
    tensors = read_weights(str(file)).tensors
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
    Encoder.from_pretrained("vit_shapes", str(file))


def read_table(data: bytes, folder: Path, random: np.random.Generator) -> None:
    (folder / predicted.RECORD).write_bytes(data)
    parquet.read(str(folder / predicted.RECORD))
    names_in(str(folder / predicted.RECORD))
    predicted.read(str(folder))


def read_recipe(data: bytes, folder: Path, random: np.random.Generator) -> None:
    recipe = from_yaml(data, resolved=bool(random.integers(2)))
    assert recipe.digest("evaluation")


def read_list(data: bytes, folder: Path, random: np.random.Generator) -> None:
    (folder / "list.txt").write_bytes(data)
    assert all(read_names(str(folder / "list.txt"), {"a": "", "b c": ""}))


def json_reader(kind: str) -> Callable[[bytes, Path, np.random.Generator], None]:
    places = {
        **{"fields": "features/fields.json", "scores": "evaluation/scores.json", "history": "training/history.json"},
        **{"claim": "prediction.json", "summary": "summary.json", "trial": "trials/0.json", "names": names.FILE},
    }

    def read(data: bytes, folder: Path, random: np.random.Generator) -> None:
        run = Run(str(folder))
        if kind in places:
            (folder / places[kind]).parent.mkdir(exist_ok=True)
            (folder / places[kind]).write_bytes(data)
        readers: Mapping[str, Callable[[], object]] = {
            "manifest": lambda: Manifest.from_json(data),
            "fields": lambda: run.artifact("features").check(preset("shapes")),
            "scores": run.scores,
            "history": run.history,
            "claim": lambda: read_claim(str(folder)),
            "summary": lambda: known_bad(PredictionJob(run="", images="", out=str(folder))),
            "trial": lambda: Ledger(str(folder)),
            "ingest": lambda: Ingest.from_json(data, "ingest.json"),
            "measurements": lambda: Measurements.from_json(data),
            "names": lambda: names.read(run),
        }
        readers[kind]()

    return read


def bytes_of(files: Files) -> Callable[[np.random.Generator], bytes]:
    return lambda random: damaged(files[int(random.integers(len(files)))], files, random)


def texts_of(trees_: Sequence[Any], dump: Callable[[Any], str]) -> Callable[[np.random.Generator], bytes]:
    """Yield unusual trees, and damaged text of valid ones."""
    files = [dump(tree).encode() for tree in trees_]

    def make(random: np.random.Generator) -> bytes:
        if random.random() < 0.05:
            return b"[" * 100_000
        if random.random() < 0.6:
            return dump(odd_tree(trees_[int(random.integers(len(trees_)))], random)).encode("utf-8", "surrogatepass")
        return damaged(files[int(random.integers(len(files)))], files, random)

    return make


Kind = tuple[Callable[[np.random.Generator], bytes], Callable[[bytes, Path, np.random.Generator], None]]


def json_kind(name: str) -> Kind:
    return texts_of([trees()[name]], json.dumps), json_reader(name)


KINDS: Mapping[str, Callable[[], Kind]] = {
    "images": lambda: (bytes_of(IMAGES), read_image),
    "labels": lambda: (bytes_of(LABELS), read_label),
    "weights": lambda: (bytes_of(weights()), load_weights),
    **{f"JSON: {name}": partial(json_kind, name) for name in trees()},
    "Parquet": lambda: (bytes_of(tables()), read_table),
    "recipes": lambda: (
        texts_of([yaml.safe_load((GOLDEN / "run" / "recipe.yaml").read_text()), {"preset": "folder"}], yaml.safe_dump),
        read_recipe,
    ),
    "lists": lambda: (bytes_of([b"a\nb c\n", b"\xef\xbb\xbfa.jpg 1\r\n", "a\nb".encode("utf-16")]), read_list),
}


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_one_line(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    make, read = KINDS[kind]()
    seconds = request.config.getoption("--fuzz-seconds") / len(KINDS)
    seed = request.config.getoption("--fuzz-seed")
    started, case, refused = time.monotonic(), 0, 0
    while case < CASES or time.monotonic() - started < seconds:
        random = np.random.default_rng([seed, list(KINDS).index(kind), case])
        data, before = make(random), peak_bytes()
        told = "a line"
        try:
            with limit(SLOWEST):
                read(data, tmp_path, random)
        except (UserError, BadInput) as error:
            told, refused = str(error), refused + 1
        except BaseException as error:
            (tmp_path / "case").write_bytes(data)
            pytest.fail(f"{kind}, seed {seed}, case {case}: {error!r}; its file is {tmp_path / 'case'}")
        assert told, (seed, case)
        assert "\n" not in told, (seed, case)
        assert peak_bytes() - before < MOST_BYTES, (seed, case)
        case += 1
    print(f"{kind}: {case} cases, {refused} refused")
    assert refused
