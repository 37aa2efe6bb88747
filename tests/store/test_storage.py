"""Storage: the same behaviour on a local tree and on S3, and one line for every error."""

import errno
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from tests.gateway import Gateway
from tests.refusals import refused
from transfgu.errors import UserError
from transfgu.store import storage


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3), "fsspec"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty folder on each kind of storage."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3")) + "/folder"
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def faults(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    proxy = Gateway(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    yield proxy
    proxy.close()


def test_bytes_come_back(root: str) -> None:
    uri = storage.join(root, "a b", "c%41.bin")
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert list(storage.read_chunks(uri, 2)) == [b"tw", b"o"]
    assert storage.is_file(uri)
    assert storage.exists(uri)


def test_absence(root: str) -> None:
    missing = storage.join(root, "none")
    assert storage.read_bytes_or_none(missing) is None
    assert not storage.exists(missing)
    assert storage.list_files(missing) == []
    assert storage.is_empty(missing)
    storage.delete(missing)
    with refused("file-missing none"):
        storage.read_bytes(missing)
    with refused("file-missing"):
        list(storage.read_chunks(missing, 1))


def test_what_depends_on_what_is_there(root: str) -> None:
    uri = storage.join(root, "a/x")
    assert not storage.replace(uri, b"", b"one")
    assert storage.create(uri, b"one")
    assert not storage.create(uri, b"two")
    assert not storage.replace(uri, b"two", b"three")
    assert storage.read_bytes(uri) == b"one"
    assert storage.replace(uri, b"one", b"two")
    assert storage.read_bytes(uri) == b"two"


@pytest.mark.s3
def test_of_two_that_replace_a_file_at_once_one_does(s3: str, s3_endpoint: str, faults: Gateway) -> None:
    """Another process writes between our reading and our writing."""
    uri, bucket = f"{s3}/x", s3.removeprefix("s3://")
    storage.write_bytes(uri, b"dead")

    def other(line: str) -> None:
        if line.startswith("PUT"):
            boto3.client("s3", endpoint_url=s3_endpoint).put_object(Bucket=bucket, Key="x", Body=b"other")

    faults.fault = other
    assert not storage.replace(uri, b"dead", b"ours")
    assert storage.read_bytes(uri) == b"other"


@pytest.mark.s3
def test_a_server_that_knows_no_conditions(s3: str, faults: Gateway) -> None:
    faults.pending = [501]
    assert storage.create(f"{s3}/x", b"one")
    faults.pending = [501]
    assert not storage.create(f"{s3}/x", b"two")
    assert storage.read_bytes(f"{s3}/x") == b"one"
    assert faults.met == 2

    faults.fault = lambda line: 501 if line.startswith("PUT") and faults.met == 2 else None
    assert storage.replace(f"{s3}/x", b"one", b"two")
    assert storage.read_bytes(f"{s3}/x") == b"two"
    assert faults.met == 3


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_no_condition_that_failed(s3: str) -> None:
    with refused(f"storage-failed {s3}-gone/x"):
        storage.create(f"{s3}-gone/x", b"")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_is_made_where_there_are_no_hard_links(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    assert storage.create(str(tmp_path / "x"), b"one")
    assert not storage.create(str(tmp_path / "x"), b"two")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"one"}


def test_list_and_delete(root: str) -> None:
    names = ["b.txt", "a/z.txt", "a/deep/er/y.txt", "a0.txt"]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"x")
    listed = storage.list_files(root)
    assert listed == sorted(storage.join(root, n) for n in names)
    assert [storage.read_bytes(u) for u in listed] == [b"x"] * 4
    assert storage.list_files(root, recursive=False) == [storage.join(root, n) for n in ("a0.txt", "b.txt")]
    assert not storage.is_empty(root)
    storage.delete(storage.join(root, "a"))
    storage.delete(storage.join(root, "b.txt"))
    assert storage.list_files(root) == [storage.join(root, "a0.txt")]


def test_local_forms_of_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("x/1.txt", b"1")
    expected = str(tmp_path / "x" / "1.txt")
    for uri in ("x", "./x/", "~/x", f"file://{tmp_path}/x", f"{tmp_path}/y/../x"):
        assert storage.list_files(uri) == [expected], uri
        assert storage.is_local(uri)
    assert storage.read_bytes(f"file://{tmp_path}/x%2F1.txt") == b"1"
    assert storage.join("/", "a/", "/b") == "/a/b"


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "f"
    storage.write_bytes(str(target), b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with refused("storage-failed"):
            storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    (tmp_path / ".f.0.partial").write_bytes(b"ne")  # what a killed process leaves
    assert storage.list_files(str(tmp_path)) == [str(target)]


def test_unwritable_and_unreadable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage.check_writable(str(tmp_path / "new" / "run"))
    assert list((tmp_path / "new" / "run").iterdir()) == []
    storage.check_readable(str(tmp_path / "file"))
    storage.check_readable(str(tmp_path))
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        with refused(f"storage-failed {place}"):
            storage.check_writable(str(place))
    with refused("file-missing nowhere"):
        storage.check_readable(str(tmp_path / "nowhere"))
    with refused("storage-failed"):
        storage.read_bytes(str(tmp_path))


@pytest.mark.parametrize(
    ("uri", "refusal"),
    [
        ("zzz://a@host/x", "uri-invalid zzz://host/x"),
        ("s3://key:secret@bucket/x", "uri-invalid s3://bucket/x s3://bucket/path"),
        (
            "ftp://me:p@ss@host/x",
            "uri-password ftp://host/x FSSPEC_FTP_USERNAME FSSPEC_FTP_PASSWORD",
        ),
        ("s3://", "uri-invalid s3:// s3://bucket/path"),
    ],
)
def test_uris_that_name_no_place(uri: str, refusal: str) -> None:
    with refused(refusal) as caught:
        storage.read_bytes(uri)
    assert "secret" not in str(caught.value)
    assert "p@ss" not in str(caught.value)


def test_gs_uris_are_google_cloud_storage() -> None:
    fs, path = storage.filesystem("gs://bucket/a/b")
    assert (fs.type_name, path) == ("gcs", "bucket/a/b")


@pytest.mark.s3
def test_missing_bucket(s3: str) -> None:
    for check in (storage.check_readable, storage.check_writable):
        with refused("bucket-missing no-such-bucket s3://no-such-bucket/x"):
            check("s3://no-such-bucket/x")
    with refused("storage-failed"):
        storage.write_bytes("s3://no-such-bucket/x", b"")
    storage.check_writable(f"{s3}/run")
    assert storage.list_files(f"{s3}/run") == []


@pytest.mark.s3
def test_large_object_in_one_piece(s3: str) -> None:
    data = os.urandom(1 << 16) * 200  # 13 MB: more than one part of an upload
    storage.write_bytes(f"{s3}/large", data)
    assert storage.read_bytes(f"{s3}/large") == data


@pytest.mark.s3
def test_an_image_takes_one_request_to_write_and_one_to_read(s3: str, faults: Gateway) -> None:
    path = f"/{s3.removeprefix('s3://')}/image"
    storage.write_bytes(f"{s3}/image", os.urandom(300_000))
    assert [asked.line for asked in faults.asked] == [f"PUT {path}"]
    assert len(storage.read_bytes(f"{s3}/image")) == 300_000
    assert storage.read_range(f"{s3}/image", 299_990, 100) == storage.read_bytes(f"{s3}/image")[299_990:]
    assert [asked.line for asked in faults.asked[1:]] == [f"GET {path}"] * 3


@pytest.mark.s3
def test_files_of_a_folder_are_listed_at_once(s3: str, faults: Gateway) -> None:
    uris = [f"{s3}/folder/{i}" for i in range(5)]
    for i, uri in enumerate(uris):
        storage.write_bytes(uri, b"x" * i)
    faults.asked.clear()
    found = storage.versions([*uris, f"{s3}/folder/none"], few=4)
    assert [version and version.size for version in found] == [0, 1, 2, 3, 4, None]
    assert len(faults.asked) == 1


def test_many_files_come_in_order(root: str) -> None:
    uris = [storage.join(root, str(i)) for i in range(40)]
    for uri in uris[::2]:
        storage.write_bytes(uri, uri.encode())
    before = storage.reads()
    assert list(storage.read_many(uris)) == [uri.encode() if i % 2 == 0 else None for i, uri in enumerate(uris)]
    assert storage.reads() - before == 40
    assert next(iter(storage.read_many(uris))) == uris[0].encode()


def test_a_change_shows_without_reading(root: str) -> None:
    uri = storage.join(root, "x")
    storage.write_bytes(uri, b"1")
    first = storage.versions([uri])
    storage.write_bytes(uri, b"12")
    assert storage.versions([uri]) != first
    assert storage.read_range(uri, 1, 9) == b"2"
    assert storage.read_range(uri, 3, 9) == b""
    assert storage.read_range(storage.join(root, "none"), 0, 1) is None
    storage.write_bytes(uri, b"")
    assert storage.read_range(uri, 0, 9) == b""


@pytest.mark.s3
def test_profile_and_config_file_count(
    s3: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [os.environ[f"AWS_{n}"] for n in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")]
    for name in ("ENDPOINT_URL_S3", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}")
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = eu-north-1\nservices = here\n[services here]\ns3 =\n  endpoint_url = {s3_endpoint}\n"
    )
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {keys[0]}\naws_secret_access_key = {keys[1]}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with refused("credentials-missing AWS_ACCESS_KEY_ID"):
        storage.write_bytes(f"{s3}/x", b"1")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with refused("credentials-invalid nobody"):
        storage.write_bytes(f"{s3}/x", b"1")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage.write_bytes(f"{s3}/x", b"1")
    assert storage.read_bytes(f"{s3}/x") == b"1"
    assert storage.filesystem(f"{s3}/x")[0].region == "eu-north-1"


@pytest.mark.processes
@pytest.mark.s3
def test_another_process_finds_its_own_way(s3: str) -> None:
    storage.write_bytes(f"{s3}/x", b"from afar")
    code = f"from transfgu.store import storage; print(storage.read_bytes('{s3}/x').decode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "from afar\n"


@pytest.mark.s3
def test_throttled_and_dropped_requests_are_tried_again(s3: str, faults: Gateway) -> None:
    faults.pending = [503, 0]
    storage.write_bytes(f"{s3}/x", b"patience")
    faults.pending = [0]
    assert storage.read_bytes(f"{s3}/x") == b"patience"
    faults.pending = [503]
    assert storage.list_files(s3) == [f"{s3}/x"]
    assert faults.met == 4


@pytest.mark.s3
def test_many_requests_at_once_are_each_tried_again(s3: str, faults: Gateway) -> None:
    storage.write_bytes(f"{s3}/x", b"patience")
    faults.pending = [0] * 112  # the SDK's "standard" strategy repeats a hundred for a whole process
    with ThreadPoolExecutor(28) as pool:
        assert list(pool.map(storage.read_bytes, [f"{s3}/x"] * 28)) == [b"patience"] * 28
    assert faults.met == 112


@pytest.mark.s3
def test_checks_wait_for_an_endpoint_that_is_busy(s3: str, faults: Gateway) -> None:
    storage.write_bytes(f"{s3}/x", b"1")
    faults.pending = [503] * 3
    storage.check_readable(f"{s3}/x")
    faults.pending = [503] * 3
    storage.check_writable(f"{s3}/run")
    assert faults.met == 6


@pytest.mark.s3
def test_denial_is_one_line_without_a_second_try(s3: str, faults: Gateway) -> None:
    for action in (
        lambda: storage.check_readable(f"{s3}/x"),
        lambda: storage.check_writable(f"{s3}/x"),
        lambda: storage.read_bytes(f"{s3}/x"),
        lambda: storage.write_bytes(f"{s3}/x", b""),
        lambda: storage.list_files(f"{s3}/x"),
    ):
        before, faults.pending = faults.met, [403] * 9
        with pytest.raises(UserError) as caught:
            action()
        message = str(caught.value)
        assert f"{s3}/x" in message
        assert "access is denied: check the key's permissions for this bucket" in message
        assert "secret" not in message
        assert faults.met - before <= 2


@pytest.mark.s3
def test_nobody_at_the_endpoint(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with refused(f"storage-failed {s3}/x http://127.0.0.1:9"):
        storage.check_readable(f"{s3}/x")


def test_a_folder_that_nobody_can_make(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with refused("storage-failed file/run"):
        storage.check_writable(str(tmp_path / "file" / "run"))


def test_a_folder_without_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o555)
    as_root = os.geteuid() == 0  # for whom nothing is closed
    if as_root:
        os.seteuid(65534)
    try:
        with refused("storage-failed closed/run"):
            storage.check_writable(str(closed / "run"))
    finally:
        if as_root:
            os.seteuid(0)


def test_messages_hide_passwords() -> None:
    assert storage.shown("ftp://me:pass@host/x") == "ftp://host/x"
    assert storage.shown("/a@b/c") == "/a@b/c"


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of a certain size is mounted by root alone")
def test_a_full_disk_has_its_own_code(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], check=True)
    try:
        with refused(f"disk-full {tmp_path}/file free some space"):
            storage.write_bytes(str(tmp_path / "file"), bytes(1 << 20))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
