"""Whole runs by the command, from S3 to S3, through a gateway that refuses requests or is unreachable for a while.

Data, labels, encoder and run folder are all on S3. The runs are small, because such faults cost time per request.
"""

import base64
import json
import os
import random
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest

from tests.faults.commands import output_of, train
from tests.faults.harness import assert_same, history, row, write_data
from tests.gateway import HANG_UP, Asked, Gateway
from transfgu.methods import STAGES
from transfgu.recipe import Recipe
from transfgu.store import storage
from transfgu.store.artifacts import Run

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.s3]

IMAGES, EPOCHS = 48, 2  # two parts
OUTAGE_SECONDS = 20.0
TOKEN = "a-token-of-somebody's-that-no-file-may-hold"
RAY_TOKEN = "7c" * 32

_BEGINS = re.compile(r"PUT .*/(\w+)/fields\.json$")


class Busy:
    """Answers 503 to one request in five."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def __call__(self, line: str) -> int | None:
        return 503 if self._random.random() < 0.2 else None


class Outages:
    """Closes connections for a while, once in each stage: from its first request for its inputs."""

    def __init__(self) -> None:
        self._wanted = {
            "features": "/images/",
            "concepts": "/features/part-",
            "pseudo_labels": "/images/",
            "training": "PUT .*/checkpoint_",
            "evaluation": "/labels/",
        }
        self.stages: list[str] = []
        """Stages that have had their fault."""
        self._stage, self._back = "", 0.0
        self._lock = threading.Lock()

    def __call__(self, line: str) -> int | None:
        with self._lock:
            if begun := _BEGINS.match(line):
                self._stage = begun[1]
            if self._stage in self._wanted and re.search(self._wanted[self._stage], line):
                del self._wanted[self._stage]
                self.stages.append(self._stage)
                self._back = time.monotonic() + OUTAGE_SECONDS
            return HANG_UP if time.monotonic() < self._back else None


@dataclass(frozen=True)
class Done:
    """A whole run that ended with success."""

    run: Run
    """Copy of its folder on this machine's disk."""
    seconds: Mapping[str, float]
    """Seconds of each stage."""
    asked: list[Asked]
    told: str
    """Output of the command."""
    ray: Path
    """Folder of Ray's logs."""


@dataclass(frozen=True)
class Bucket:
    """A bucket with data and encoder."""

    uri: str
    recipe: Recipe
    """Return the recipe with data in the bucket."""
    endpoint: str
    folder: Path
    """Return the recipe with data on this machine's disk."""

    def whole_run(self, name: str, gateway: Gateway) -> Done:
        """Run `python jobs/train.py` through the gateway, with tokens in its environment.

        `--verbose` keeps Ray's folder, whose path must be short.
        """
        uri, ray, copy = storage.join(self.uri, name), self.folder / name[:4], self.folder / f"{name}-run"
        ray.mkdir()
        environment = {"AWS_ENDPOINT_URL_S3": gateway.url, "TRANSFGU_TEST_TOKEN": TOKEN, "RAY_AUTH_TOKEN": RAY_TOKEN}
        told = output_of(train(self.recipe, uri, ray, "--verbose", **environment), seconds=420)
        gateway.close()
        for file in storage.list_files(uri):
            target = copy / file.removeprefix(uri + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(file))
        stages = json.loads((copy / "metrics.json").read_text())["stages"]
        seconds = {stage: float(stages[stage]["seconds"]) for stage in STAGES}
        done = Done(Run(str(copy)), seconds, gateway.asked, told, ray)
        print(f"\n{name}: " + ", ".join(f"{stage} {s:.0f} s" for stage, s in seconds.items()))
        print("requests: " + ", ".join(f"{stage} {count}" for stage, count in requests(done.asked).items()))
        return done


def requests(asked: Iterable[Asked]) -> Counter[str]:
    """Return the number of requests in each stage."""
    counts, stage = Counter[str](), "before"
    for one in asked:
        if begun := _BEGINS.match(one.line):
            stage = begun[1]
        counts[stage] += 1
    return counts


def made(asked: Iterable[Asked]) -> Counter[str]:
    """Return how often each part and each checkpoint was written."""
    lines = [one.line for one in asked if one.fault is None]
    return Counter(line for line in lines if re.search(r"^PUT .*(/part-|/student\.safetensors)", line))


def assert_nothing_made_twice(done: Done) -> None:
    counts = made(done.asked)
    assert len(counts) == 2 * 2 + EPOCHS
    assert set(counts.values()) == {1}
    assert history(done.run) == list(range(1, EPOCHS + 1))


@pytest.fixture(scope="module")
def bucket(s3_endpoint: str) -> Iterator[Bucket]:
    folder = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))  # short, as Ray's sockets will lie in it
    recipe = write_data(folder, IMAGES)
    uri = f"s3://transfgu-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=uri.removeprefix("s3://"))
    for file in (f for f in folder.rglob("*") if f.is_file()):
        storage.write_bytes(storage.join(uri, str(file.relative_to(folder))), file.read_bytes())
    places = {"data": "images", "labels": "labels", "encoder.weights": "encoder.safetensors"}
    fields = {field: storage.join(uri, name) for field, name in places.items()}
    recipe = recipe.with_fields({**fields, "epochs": EPOCHS})
    yield Bucket(uri, recipe, s3_endpoint, folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undisturbed_on_s3(bucket: Bucket) -> Done:
    return bucket.whole_run("undisturbed", Gateway(bucket.endpoint))


@pytest.fixture(scope="module")
def throttled(bucket: Bucket) -> Done:
    gateway = Gateway(bucket.endpoint)
    gateway.fault = Busy()
    return bucket.whole_run("503", gateway)


@pytest.mark.ci_long
def test_one_request_in_five_is_answered_503(undisturbed_on_s3: Done, throttled: Done) -> None:
    refused = sum(one.fault == 503 for one in throttled.asked)
    assert 0.15 < refused / len(throttled.asked) < 0.25
    for stage in STAGES:
        assert_same(throttled.run, undisturbed_on_s3.run, stage)
    assert_nothing_made_twice(throttled)
    more = sum(throttled.seconds.values()) - sum(undisturbed_on_s3.seconds.values())
    what = f"S3 answers 503 to {refused} of {len(throttled.asked)} requests"
    row(what, "whole run", "continues by itself", more, "those requests; no part or epoch twice")


def test_s3_is_gone_for_a_while_in_every_stage(undisturbed_on_s3: Done, bucket: Bucket) -> None:
    gateway, outages = Gateway(bucket.endpoint), Outages()
    gateway.fault = outages
    done = bucket.whole_run("outages", gateway)
    assert outages.stages == list(STAGES[1:])
    refused = requests(one for one in done.asked if one.fault is not None or _BEGINS.match(one.line))
    for stage in STAGES:
        assert_same(done.run, undisturbed_on_s3.run, stage)
    assert_nothing_made_twice(done)
    for stage in outages.stages:
        more = done.seconds[stage] - undisturbed_on_s3.seconds[stage]
        lost = f"{refused[stage] - 1} requests; no part or epoch twice"
        row(f"S3 gone for {OUTAGE_SECONDS:.0f} s", stage, "continues by itself", more, lost)


@pytest.mark.ci_long
def test_no_secret_is_written_anywhere(throttled: Done, bucket: Bucket, tmp_path: Path) -> None:
    told = tmp_path / "told"
    told.write_text(throttled.told)
    places = {"printed": [told], "Ray's": files(throttled.ray), "artefacts": files(Path(throttled.run.uri))}
    # The search finds what is there: the bucket's name in each place, and a secret in each of its disguises.
    name = bucket.uri.removeprefix("s3://")
    found = {place: holding(among, name) for place, among in places.items()}
    assert all(found.values())
    assert any("worker" in file.name for file in found["Ray's"])
    assert any(file.suffix == ".parquet" for file in found["artefacts"])
    assert any("checkpoint" in str(file) for file in places["artefacts"])
    planted = tmp_path / "planted"
    for lead in ("", "1", "12"):
        planted.write_bytes(base64.b64encode(f"{lead}{TOKEN}".encode()))
        assert holding([planted], TOKEN) == [planted]
    secrets = [os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"], TOKEN, RAY_TOKEN]
    among = [file for files_of in places.values() for file in files_of]
    for secret in secrets:
        assert holding(among, secret) == [], secret
    sizes = ", ".join(f"{len(of)} {place}" for place, of in places.items())
    outcome = f"in none of {len(among)} files ({sizes})"
    row(f"{len(secrets)} secrets in the environment", "whole run", outcome, None, "–")


def files(folder: Path) -> list[Path]:
    """Return all regular files below a folder."""
    return [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]


def holding(among: Iterable[Path], value: str) -> list[Path]:
    """Return the files that contain the value, as it is or in base64, including compressed columns of Parquet."""
    forms = [value.encode()]
    for lead in range(3):  # base64 takes three bytes at a time: the value looks different by its place in a text
        encoded = base64.b64encode(bytes(lead) + value.encode())
        # What stands at the ends depends on the neighbours, too.
        forms.append(encoded[(0, 2, 3)[lead] : (lead + len(value.encode())) // 3 * 4])
    return [file for file in among if any(form in contents(file) for form in forms)]


def contents(file: Path) -> bytes:
    """Return the content of a file; for Parquet, its columns and metadata instead of the compressed form."""
    if file.suffix != ".parquet":
        return file.read_bytes()
    table = pq.read_table(file)
    return repr((table.schema.metadata, table.to_pylist())).encode()
