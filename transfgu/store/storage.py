"""Read and write files by URI; each process finds its own credentials, and none is sent to another process.

A URI is a path, `file://`, `s3://`, `gs://`, or any scheme that an installed fsspec knows. pyarrow reads and writes.
For S3, credentials, region and endpoint come from boto3's default chain (environment, profile, configuration file,
instance role), once per process and again when temporary credentials have expired.
"""

import contextlib
import errno
import os
import re
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from transfgu.errors import UserError
from transfgu.store import s3_get, waits
from transfgu.store.walk import walk

_ATTEMPTS = s3_get.ATTEMPTS
_BOTO_ATTEMPTS = 9  # its pauses double from half a second to 20, on average: as long
_CHECK_ATTEMPTS = 2  # a check before work starts should fail soon
_CHECK_SILENT_SECONDS = 5  # time limit of a check without any byte; a check has at most three attempts
_PARTIAL = ".partial"
_1970 = datetime(1970, 1, 1, tzinfo=UTC)

IN_FLIGHT = 8
"""Requests of one task or thread pool that wait for a remote storage at the same time."""

_lock = threading.Lock()
_reads = 0
_accesses: dict[tuple[Any, ...], "_S3Access"] = {}
_filesystems: dict[tuple[Any, ...], Any] = {}


class Version(NamedTuple):
    """Size and modification time of a file, which show a change without reading it."""

    size: int
    """Bytes."""
    changed: int
    """Modification time, ns since 1970; 0 if the storage does not report it. S3 reports whole seconds."""
    tag: str = ""
    """Entity tag of an object in S3, which changes with its content; empty if unknown."""

    def is_of(self, other: "Version") -> bool:
        """Return True if both describe the same content, as far as both are known."""
        tags = {self.tag, other.tag} - {""}
        return self[:2] == other[:2] and len(tags) < 2


class Folder(NamedTuple):
    """Content of a folder."""

    files: dict[str, Version]
    """By URI."""
    dangling: Sequence[str] = ()
    """URIs of broken links."""
    unnamed: Sequence[str] = ()
    """Entries with unusable names: not UTF-8, or a key with an empty part."""


def filesystem(uri: str) -> tuple[Any, str]:
    """Return the pyarrow file system of `uri`, and the path of `uri` in it.

    Do not pickle the file system, because it may hold credentials: pass URIs to other processes.

    Raises:
        UserError: unknown scheme, or no credentials.
    """
    return _filesystem(uri, _ATTEMPTS)


def travelling(uri: str) -> tuple[Any, str]:
    """Return the same as :func:`filesystem`, with a file system that can be pickled: it holds no credentials.

    Each process that unpickles it finds its own credentials, and repeats failed requests as this module does.
    """
    return pafs.PyFileSystem(_Handler(scheme(uri))), filesystem(uri)[1]


def scheme(uri: str) -> str:
    """Return `file` for local paths, else the part before `://`."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    return match[1].lower() if match else "file"


def is_local(uri: str) -> bool:
    """Return True if `uri` is a path in this machine's file tree, which may be a shared mount."""
    return scheme(uri) == "file"


def absolute(uri: str) -> str:
    """Return `uri` as other processes can use it: absolute if local, `~` expanded, no slash at the end."""
    if not is_local(uri):
        return uri.rstrip("/")
    path = unquote(urlsplit(uri).path) if "://" in uri else uri
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - does not resolve links, as intended


def resolved(uri: str) -> str:
    """Return a form that is equal for two names of one folder or file: links are resolved, slashes count once."""
    if is_local(uri):
        return os.path.realpath(absolute(uri))
    kind, _, rest = uri.partition("://")
    return f"{kind.lower()}://" + re.sub("/+", "/", rest).strip("/")


def within(uri: str, folder: str) -> bool:
    """Return True if `uri` is `folder` or in it, with links resolved."""
    return (resolved(uri) + "/").startswith(resolved(folder).rstrip("/") + "/")


def join(uri: str, *parts: str) -> str:
    """Return `uri` with path parts appended."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def read_bytes(uri: str) -> bytes:
    """Read a file.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    data = read_bytes_or_none(uri)
    if data is None:
        raise UserError(f"there is no file {shown(uri)}: check the path", code="file-missing")
    return data


def read_bytes_or_none(uri: str) -> bytes | None:
    """Read a file; returns None if there is no such file."""
    return _read(uri, None)


def read_range(uri: str, offset: int, length: int) -> bytes | None:
    """Return `length` bytes of a file from `offset`, fewer at its end; None if there is no such file.

    Raises:
        UserError: it can't be read.
    """
    return _read(uri, (offset, length))


def read_many(uris: Sequence[str]) -> Iterator[bytes | None]:
    """Yield the files' contents in order, or None if there is no such file; remote files are read ahead.

    Raises:
        UserError: a file can't be read.
    """
    if len(uris) < 2 or all(is_local(uri) for uri in uris):
        yield from map(read_bytes_or_none, uris)
        return
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        waiting: deque[Future[bytes | None]] = deque()
        try:
            for uri in uris:
                if len(waiting) == 2 * IN_FLIGHT:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(read_bytes_or_none, uri))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def reads() -> int:
    """Return how many files, or ranges of files, this process has read: on S3, each is one request."""
    return _reads


def _read(uri: str, span: tuple[int, int] | None) -> bytes | None:
    global _reads
    with _lock:
        _reads += 1
    with _one_line(uri, "read"):
        fs, path = filesystem(uri)  # reports wrong credentials in one line
        if scheme(uri) == "s3":
            bucket, _, key = path.partition("/")
            return s3_get.get(bucket, key, span)
        try:
            # A file, not a stream: with a known size it is read in one request, a stream in one per 16 KB.
            with fs.open_input_file(path) as file:
                data: bytes = file.read() if span is None else file.read_at(span[1], span[0])
                return data
        except (FileNotFoundError, NotADirectoryError):
            return None


def opened(uri: str) -> Any:
    """Open a file to read parts of it.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    with _one_line(uri, "read"):
        fs, path = filesystem(uri)
        return fs.open_input_file(path)


def read_chunks(uri: str, size: int) -> Iterator[bytes]:
    """Yield a file in pieces of at most `size` bytes, for files that do not fit in memory.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    with _one_line(uri, "read", told=False):
        fs, path = filesystem(uri)
        with _told(uri, "read"):
            opened = fs.open_input_stream(path)
        with opened as stream:
            while True:
                with _told(uri, "read"):
                    piece = stream.read(size)
                if not piece:
                    return
                yield piece


def write_bytes(uri: str, data: bytes) -> None:
    """Create or replace a file in one piece: a reader sees either the old or the new contents.

    Parent folders are created.
    """
    with _one_line(uri, "write"):
        _write(uri, data)


def create(uri: str, data: bytes) -> bool:
    """Create a file in one piece unless it exists; returns True if it was created.

    If several processes try at the same time, one succeeds, on local file systems and on S3. Where a store has no such
    request, all may succeed; an S3 server that ignores the condition even replaces the file.
    """
    with _one_line(uri, "write"):
        if is_local(uri):
            return _create_local(Path(absolute(uri)), data)
        if scheme(uri) == "s3" and (made := _put_s3(uri, data, IfNoneMatch="*")) is not None:
            return made
        fs, path = filesystem(uri)
        if fs.get_file_info(path).type is not pafs.FileType.NotFound:
            return False
        _write(uri, data)
        return True


def replace(uri: str, held: bytes, data: bytes) -> bool:
    """Replace a file's contents if they are still `held`; returns True if they were.

    If several processes try at the same time, one succeeds on S3. Elsewhere, and on servers without such a request,
    all may succeed.
    """
    with _one_line(uri, "write"):
        if scheme(uri) == "s3" and (replaced := _replace_s3(uri, held, data)) is not None:
            return replaced
        if read_bytes_or_none(uri) != held:
            return False
        _write(uri, data)
        return True


def exists(uri: str) -> bool:
    """Return True if there is a file or a folder."""
    return _kind(uri) is not pafs.FileType.NotFound


def is_file(uri: str) -> bool:
    """Return True if there is a file."""
    return _kind(uri) is pafs.FileType.File


def list_files(uri: str, recursive: bool = True) -> list[str]:
    """Return the URIs of the files under a folder, sorted; empty if the folder is missing or empty.

    Local paths are absolute. Files that are being written are not listed.
    """
    return sorted(list_versions(uri, recursive))


def list_versions(uri: str, recursive: bool = True) -> dict[str, "Version"]:
    """Return the files of :func:`list_files`, with the size and the modification time of each."""
    return list_folder(uri, recursive).files


def list_folder(uri: str, recursive: bool = True, *, tags: bool = False) -> "Folder":
    """Return the same as :func:`list_versions`, with unreadable entries; local links are followed once per folder.

    Args:
        uri: of the folder.
        recursive: include subfolders.
        tags: also return the entity tags of objects in S3, which pyarrow's listing leaves out.
    """
    uri = absolute(uri)
    with _one_line(uri, "list"):
        if is_local(uri):
            found = walk(uri, recursive=recursive)
            files = {
                path: Version(size=about.st_size, changed=about.st_mtime_ns)
                for path, about in found.files.items()
                if not path.endswith(_PARTIAL)
            }
            return Folder(files=files, dangling=sorted(found.dangling), unnamed=sorted(found.unnamed))
        listed = _s3_versions(uri, recursive) if tags and scheme(uri) == "s3" else _versions(uri, recursive)
        files = {name: version for name, version in listed.items() if not name.endswith(_PARTIAL)}
        # pyarrow lists keys with //, but refuses all other requests for them.
        unnamed = sorted(name for name in files if not {"", ".", ".."}.isdisjoint(name[len(uri) + 1 :].split("/")))
        return Folder(files={name: files[name] for name in files.keys() - set(unnamed)}, unnamed=unnamed)


def _versions(uri: str, recursive: bool) -> dict[str, Version]:
    """Return the files of a folder that is not local, by URI, without entity tags."""
    fs, path = filesystem(uri)
    try:
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    except NotADirectoryError:
        return {}
    prefix = uri[: len(uri) - len(path)] if uri.endswith(path) else f"{scheme(uri)}://"
    return {prefix + info.path: _version(info) for info in infos if info.type == pafs.FileType.File}


def _s3_versions(uri: str, recursive: bool) -> dict[str, Version]:
    """Return the same as :func:`_versions` for a folder in S3, with entity tags: one request per thousand objects."""
    bucket, _, path = uri.partition("://")[2].partition("/")
    asked = {"Bucket": bucket, "Prefix": f"{path.rstrip('/')}/" * bool(path)}
    one_level = {} if recursive else {"Delimiter": "/"}
    pages = _s3_client(uri).get_paginator("list_objects_v2").paginate(**asked, **one_level)
    found: dict[str, Version] = {}
    with _boto_errors():
        for page in pages:
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # a folder's own object
                    changed = (item["LastModified"] - _1970) // timedelta(microseconds=1) * 1000
                    version = Version(size=item["Size"], changed=changed, tag=item.get("ETag", ""))
                    found[f"s3://{bucket}/{item['Key']}"] = version
    return found


def versions(uris: Sequence[str], *, few: int = 100) -> list["Version | None"]:
    """Return size and modification time of each file, None if there is no such file.

    Files of one folder are listed in one request per thousand; for few files there is one request per file.

    Raises:
        UserError: the storage can't be read.
    """
    folders: dict[str, list[str]] = {}
    for uri in uris:
        folders.setdefault(uri.rpartition("/")[0], []).append(uri)

    def look(item: tuple[str, list[str]]) -> dict[str, Version]:
        folder, files = item
        if len(files) > few and not is_local(folder):
            return list_versions(folder, recursive=False)
        with _one_line(folder, "list"):
            fs = filesystem(files[0])[0]
            infos = fs.get_file_info([filesystem(file)[1] for file in files])
            return {f: _version(i) for f, i in zip(files, infos, strict=True) if i.type == pafs.FileType.File}

    found: dict[str, Version] = {}
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for part in pool.map(look, folders.items()):
            found |= part
    return [found.get(uri) for uri in uris]


def _version(info: Any) -> "Version":
    return Version(size=info.size or 0, changed=info.mtime_ns or 0)


def is_empty(uri: str) -> bool:
    """Return True if the folder `uri` has no file at any depth, or does not exist."""
    if is_local(uri):
        if any(files for _, _, files in os.walk(absolute(uri))):
            return False
        with _one_line(uri, "list"):
            return not walk(absolute(uri)).files  # links are followed, too
    return not exists(uri)  # an object store has no empty folders


def delete(uri: str) -> None:
    """Delete a file, or a folder and everything in it; nothing happens if there is neither."""
    with _one_line(uri, "delete"):
        fs, path = filesystem(uri)
        kind = fs.get_file_info(path).type
        if kind == pafs.FileType.File:
            fs.delete_file(path)
        elif kind == pafs.FileType.Directory:
            fs.delete_dir(path)


def check_readable(uri: str) -> None:
    """Raise UserError unless `uri` is a file or a folder that this user may read."""

    def look(fs: Any, path: str) -> None:
        kind = fs.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            _check_bucket(uri, fs, path)
            raise UserError(f"there is no file or folder {shown(uri)}: check the path", code="file-missing")
        if kind == pafs.FileType.Directory:
            if scheme(uri) == "s3":
                _list_one(uri)
            else:
                fs.get_file_info(pafs.FileSelector(path, recursive=False))
        else:
            with fs.open_input_stream(path) as stream:
                stream.read(1)

    with _one_line(uri, "read"):
        _check(uri, look)


def _list_one(uri: str) -> None:
    """Raise OSError unless a folder in S3 can be listed; one object is asked for."""
    bucket, _, path = uri.partition("://")[2].partition("/")
    with _boto_errors():
        _s3_client(uri, _CHECK_ATTEMPTS).list_objects_v2(
            Bucket=bucket, Prefix=f"{path.rstrip('/')}/" * bool(path), MaxKeys=1
        )


def check_writable(uri: str) -> None:
    """Raise UserError unless files can be created in the folder `uri`, which need not exist."""
    with _one_line(uri, "write"):
        if not is_local(uri):
            _check(uri, lambda fs, path: _check_bucket(uri, fs, path))
        probe = join(uri, ".write-check")
        _write(probe, b"")
        fs, path = filesystem(probe)
        fs.delete_file(path)


def _check(uri: str, look: Callable[[Any, str], None]) -> None:
    """Check a file or folder with few attempts, because a user waits; with all attempts if the endpoint is busy."""
    try:
        look(*_filesystem(uri, _CHECK_ATTEMPTS))
    except OSError as error:
        if not re.search(_BUSY, str(error)):
            raise
        look(*filesystem(uri))


def object_store_options(uri: str) -> dict[str, str]:
    """Return credentials, region and endpoint of an S3 URI, by the names that Rust's `object_store` has for them.

    Other schemes have none. Do not print or pickle them.

    Raises:
        UserError: no credentials.
    """
    if scheme(uri) != "s3":
        return {}
    access = _s3_access()
    access_key, secret_key, token = access.keys()
    found = {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key}
    if token:
        found["aws_session_token"] = token
    if access.endpoint:
        found |= {"aws_endpoint": access.endpoint, "aws_region": access.region or "us-east-1"}
        found["allow_http"] = str(access.endpoint.startswith("http://")).lower()
    return found


def shown(uri: str) -> str:
    """Return `uri` as it may be printed, without user name and password."""
    return re.sub(r"(?<=://)[^/]*@", "", uri)


def _kind(uri: str) -> Any:
    with _one_line(uri, "read"):
        fs, path = filesystem(uri)
        return fs.get_file_info(path).type


def _write(uri: str, data: bytes) -> None:
    if is_local(uri):
        _write_local(Path(absolute(uri)), data)
        return
    fs, path = filesystem(uri)
    if scheme(uri) not in ("s3", "gs"):
        fs.create_dir(path.rpartition("/")[0], recursive=True)
    # An object appears when its upload is completed; a failed write is never completed, not even by a destructor.
    stream = fs.open_output_stream(path)
    stream.write(data)
    stream.close()


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}{_PARTIAL}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _create_local(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}{_PARTIAL}"
    try:
        temporary.write_bytes(data)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            # No hard links, as on FAT or in a mounted bucket: for a moment the file exists without its content.
            with path.open("xb") as file:
                file.write(data)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _replace_s3(uri: str, held: bytes, data: bytes) -> bool | None:
    """Do the same as :func:`replace`; return None if the server reports that it has no such request."""
    found = _ask_s3(uri, "head_object")
    if isinstance(found, int) or read_bytes_or_none(uri) != held:
        return False
    # In the standard the tag is in quotes; Ceph's gateway compares the text between them.
    tag = str(found["ETag"])
    return _put_s3(uri, data, IfMatch=tag) or _put_s3(uri, data, IfMatch=tag.strip('"'))


def _put_s3(uri: str, data: bytes, **condition: str) -> bool | None:
    """Return True if the condition held and the object was written; None if the server has no conditional writes."""
    answer = _ask_s3(uri, "put_object", Body=data, **condition)
    return None if answer == 501 else not isinstance(answer, int)


def _s3_client(uri: str, attempts: int = _BOTO_ATTEMPTS) -> Any:
    """Return a client of boto3 for requests that pyarrow can't make; `attempts` of each request at most."""
    import boto3
    import botocore.config

    filesystem(uri)  # reports wrong credentials in one line, and sets options for other servers
    config = botocore.config.Config(
        retries={"max_attempts": attempts, "mode": "standard"},
        connect_timeout=s3_get.CONNECT_SECONDS,
        read_timeout=s3_get.SILENT_SECONDS,
    )
    return boto3.client("s3", config=config)


@contextlib.contextmanager
def _boto_errors() -> Iterator[None]:
    """Raise boto3's errors as OSError."""
    import botocore.exceptions

    try:
        yield
    except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
        raise OSError(str(error)) from None


def _ask_s3(uri: str, operation: str, **fields: Any) -> Any:
    """Return the answer to a request about one object, or its status if the condition failed."""
    import botocore.exceptions

    client = _s3_client(uri)
    bucket, _, key = uri.partition("://")[2].partition("/")
    try:
        return getattr(client, operation)(Bucket=bucket, Key=key, **fields)
    except botocore.exceptions.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # A missing bucket is a mistake, a missing object is not.
        if status in (409, 412, 501) or error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey"):
            return status
        raise OSError(str(error)) from None
    except botocore.exceptions.BotoCoreError as error:
        raise OSError(str(error)) from None


def _check_bucket(uri: str, fs: Any, path: str) -> None:
    bucket = path.partition("/")[0]
    if scheme(uri) in ("s3", "gs") and fs.get_file_info(bucket).type == pafs.FileType.NotFound:
        raise UserError(
            f"there is no bucket {bucket} for {shown(uri)}{_where(uri)}: check the name, or create the bucket",
            code="bucket-missing",
        )


def _where(uri: str) -> str:
    """Return the endpoint as text if it is not the provider's default."""
    if scheme(uri) != "s3":
        return ""
    endpoint = _s3_access().endpoint
    return f" at {shown(endpoint)}" if endpoint else ""


class _Handler(pafs.FileSystemHandler):  # type: ignore[misc]  # pyarrow brings no types
    """A file system that forwards each call to this process's own file system of the scheme."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handler) and other._scheme == self._scheme

    def __hash__(self) -> int:
        return hash(self._scheme)

    def _at(self, path: str) -> Any:
        return filesystem(path if self._scheme == "file" else f"{self._scheme}://{path}")[0]

    def get_type_name(self) -> str:
        """See pyarrow's interface; the same holds for the following methods."""
        return f"transfgu+{self._scheme}"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._at(paths[0]).get_file_info(paths) if paths else []

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._at(selector.base_dir).get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._at(path).create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._at(path).delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._at(path).delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("no one's to delete")

    def delete_file(self, path: str) -> None:
        self._at(path).delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._at(src).move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._at(src).copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self._at(path).open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        return self._at(path).open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self._at(path).open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self._at(path).open_append_stream(path, metadata=metadata)


def _filesystem(uri: str, attempts: int) -> tuple[Any, str]:
    kind = scheme(uri)
    if kind == "file":
        return _cached(("file",), pafs.LocalFileSystem), absolute(uri)
    rest = uri.partition("://")[2].strip("/")
    if kind in ("s3", "gs"):
        if not rest or "@" in rest.partition("/")[0]:
            raise UserError(
                f"{shown(uri)} must read {kind}://bucket/path, without credentials in it", code="uri-invalid"
            )
        return (_s3(rest.partition("/")[0], attempts) if kind == "s3" else _gs(attempts)), rest
    if re.match(r"[^/@]*:[^/]*@", rest):
        # The run would write it to recipe, manifests and lists of images.
        raise UserError(
            f"{shown(uri)} must not hold a password: set FSSPEC_{kind.upper()}_USERNAME and "
            f"FSSPEC_{kind.upper()}_PASSWORD instead",
            code="uri-password",
        )
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise UserError(f"can't open {shown(uri)}: {error}", code="uri-invalid") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def _cached(key: tuple[Any, ...], make: Any) -> Any:
    with _lock:
        if key not in _filesystems:
            _filesystems[key] = make()
        return _filesystems[key]


def _gs(attempts: int) -> Any:
    limit = timedelta(seconds=60 if attempts == _ATTEMPTS else 5)
    return _cached(("gs", attempts), lambda: pafs.GcsFileSystem(retry_time_limit=limit))


class _S3Access:
    """Credentials (which botocore renews), region and endpoint from boto3. Its `repr` shows no secret."""

    def __init__(self) -> None:
        import boto3
        import botocore.exceptions

        try:
            session = boto3.Session()
            # Only a client knows the endpoint from environment, profile and service section together.
            client = session.client("s3")
            self._credentials = session.get_credentials()
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise UserError(f"the AWS configuration can't be used: {error}", code="credentials-invalid") from None
        self.region: str | None = client.meta.region_name
        endpoint = str(client.meta.endpoint_url)
        host = urlsplit(endpoint).hostname or ""
        self.endpoint = "" if re.search(r"(^|\.)amazonaws\.com(\.cn)?$", host) else endpoint

    def keys(self) -> tuple[str, str, str | None]:
        """Return access key, secret key and session token, valid now."""
        import botocore.exceptions

        if self._credentials is None:
            raise UserError(
                "no AWS credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
                code="credentials-missing",
            )
        try:
            frozen = self._credentials.get_frozen_credentials()
        except botocore.exceptions.BotoCoreError as error:
            raise UserError(f"the AWS credentials can't be used: {error}", code="credentials-invalid") from None
        return frozen.access_key, frozen.secret_key, frozen.token


def _s3_access() -> _S3Access:
    # Created again if the environment has changed, as in a notebook or a test.
    key = tuple(sorted((n, v) for n, v in os.environ.items() if n.startswith("AWS_") and "CHECKSUM" not in n))
    with _lock:
        if key not in _accesses:
            _accesses[key] = _S3Access()
        return _accesses[key]


def _s3(bucket: str, attempts: int) -> Any:
    access = _s3_access()
    access_key, secret_key, token = access.keys()
    where: dict[str, Any] = {"region": access.region}
    if access.endpoint:
        parts = urlsplit(access.endpoint)
        where = {
            "region": access.region or "us-east-1",
            "scheme": parts.scheme,
            "endpoint_override": parts.netloc + parts.path.rstrip("/"),
        }
        # Many S3 servers do not support the checksum trailers that the AWS SDK adds by default.
        for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
            os.environ.setdefault(name, "when_required")
    key = ("s3", access_key, secret_key, token, attempts, tuple(where.items()), "" if access.endpoint else bucket)

    def make() -> Any:
        if not access.endpoint:
            # boto3 follows a bucket to its region; pyarrow must be told.
            with contextlib.suppress(OSError):
                where["region"] = pafs.resolve_s3_region(bucket)
        return pafs.S3FileSystem(
            access_key=access_key,
            secret_key=secret_key,
            session_token=token,
            # The "standard" strategy has one budget for all requests of a process: many at once would soon use it up.
            retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=attempts),
            allow_delayed_open=True,  # small objects take one request, not a multipart upload
            connect_timeout=s3_get.CONNECT_SECONDS,
            request_timeout=s3_get.SILENT_SECONDS if attempts == _ATTEMPTS else _CHECK_SILENT_SECONDS,
            **where,
        )

    return _cached(key, make)


_CODES = {
    "ACCESS_DENIED": "access is denied: check the key's permissions for this bucket",
    "INVALID_ACCESS_KEY_ID": "the access key is not known there: check AWS_ACCESS_KEY_ID, or the profile",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key does not fit: check AWS_SECRET_ACCESS_KEY, or the profile",
    "EXPIRED_TOKEN": "the credentials have expired: fetch new ones",
    "INVALID_TOKEN": "the session token is not valid: fetch new credentials",
    "NO_SUCH_BUCKET": "there is no such bucket: check the name, or create the bucket",
    "NETWORK_CONNECTION": "the endpoint does not answer: check AWS_ENDPOINT_URL_S3 and the network",
    "SLOW_DOWN": "the endpoint still throttles requests: run again with fewer actors",
}

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
}

_BUSY = "AWS Error SLOW_DOWN|HTTP status 503"  # the latter for requests without an answer's body


def _told(uri: str, verb: str) -> contextlib.AbstractContextManager[None]:
    """Tell the user if the block, which uses a remote file, takes long."""
    if is_local(uri) or not waits.are_told():
        return contextlib.nullcontext()
    return waits.waiting(f"to {verb} {shown(uri)}{_where(uri)}")


@contextlib.contextmanager
def _one_line(uri: str, verb: str, *, told: bool = True) -> Iterator[None]:
    """Turn errors of a file system into a UserError that names `uri` and the remedy, without secrets.

    Args:
        uri: URI of the file or folder.
        verb: the action on it.
        told: tell the user if it takes long.
    """
    try:
        with _told(uri, verb) if told else contextlib.nullcontext():
            yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and verb == "read":
            raise UserError(f"there is no file {shown(uri)}: check the path", code="file-missing") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"can't {verb} {shown(uri)}: {_reason(error)}", code="disk-full") from None
        raise UserError(f"can't {verb} {shown(uri)}{_where(uri)}: {_reason(error)}", code="storage-failed") from None
    except (pa.ArrowException, UnicodeError, ValueError) as error:  # for names such as a key with // or a zero byte
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"can't {verb} {shown(uri)}: {shown(reason)}; give it another name", code="storage-failed"
        ) from None


def _reason(error: OSError) -> str:
    text = str(error)
    if re.search(_BUSY, text):
        return _CODES["SLOW_DOWN"]
    for code, meaning in _CODES.items():
        if f"AWS Error {code}" in text:
            return meaning
    if "HTTP status 403" in text or "403" in re.findall(r"HTTP response code: (\d+)", text):
        return _CODES["ACCESS_DENIED"]
    if isinstance(error, PermissionError):
        return "permission denied: check who owns it"
    if error.errno and not text.startswith("When "):
        remedy = _REMEDIES.get(error.errno)
        return os.strerror(error.errno) + (f": {remedy}" if remedy else "")
    return shown(text)
