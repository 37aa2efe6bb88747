"""Read an S3 object, or a range of it, with one GET request.

Arrow's S3 file system requests an object's size before it reads each file: twice the requests, and a second round trip
per image.
"""

import os
import random
import threading
import time
from typing import Any

ATTEMPTS = 11  # the pauses double from 50 ms, as in Arrow: almost a minute in total
CONNECT_SECONDS = 5
SILENT_SECONDS = 20  # after which a request without any byte fails
_LOWEST_SPEED = 1024  # bytes per second, on average since the start of an answer
_PAUSE = 0.05  # seconds
_CONNECTIONS = 64

_lock = threading.Lock()
_clients: dict[tuple[Any, ...], Any] = {}

_NAMES = {
    "AccessDenied": "ACCESS_DENIED",
    "InvalidAccessKeyId": "INVALID_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "SIGNATURE_DOES_NOT_MATCH",
    "ExpiredToken": "EXPIRED_TOKEN",
    "InvalidToken": "INVALID_TOKEN",
    "SlowDown": "SLOW_DOWN",
}
_PASSING = ("SlowDown", "InternalError", "RequestTimeout", "Throttling", "ThrottlingException", "ServiceUnavailable")


def get(
    bucket: str,
    key: str,
    span: tuple[int, int] | None = None,
    *,
    attempts: int = ATTEMPTS,
    deadline_seconds: float = 180.0,
    slow_seconds: float = 20.0,
) -> bytes | None:
    """Return an object's bytes, or None if there is no such object.

    Args:
        bucket: its name.
        key: key of the object.
        span: offset and number of the requested bytes, of which those beyond the end are left out; None: all.
        attempts: maximum number of requests.
        deadline_seconds: time after which no request is repeated.
        slow_seconds: time after which an answer of less than 1 KiB per second is given up, and requested again.

    Raises:
        OSError: the object can't be read; the text names the cause as Arrow does (`AWS Error ACCESS_DENIED`).
    """
    import botocore.exceptions
    import urllib3.exceptions

    begun = time.monotonic()
    wanted = {} if span is None else {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"}
    client = _client()
    for attempt in range(1, attempts + 1):
        try:
            return _body(client.get_object(Bucket=bucket, Key=key, **wanted), slow_seconds)
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if code in ("NoSuchKey", "NoSuchBucket", "404"):
                return None
            if code == "InvalidRange":  # it begins at or after the end, as in an empty object
                return b""
            failed = OSError(f"AWS Error {_NAMES.get(code, code)}: HTTP status {status}")
            last = attempt == attempts or time.monotonic() - begun > deadline_seconds
            if last or not (status >= 500 or status == 429 or code in _PASSING):
                raise failed from None
        # Dropped connections, also in the middle of an answer.
        except (botocore.exceptions.HTTPClientError, urllib3.exceptions.HTTPError, _BadBodyError) as error:
            if attempt == attempts or time.monotonic() - begun > deadline_seconds:
                raise OSError(f"AWS Error NETWORK_CONNECTION: {error}") from None
        except botocore.exceptions.BotoCoreError as error:
            raise OSError(str(error)) from None
        time.sleep(_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


class _BadBodyError(Exception):
    """An answer's body ended too early, or arrived too slowly."""


def _body(answer: dict[str, Any], slow_seconds: float) -> bytes:
    """Return the whole body of an answer.

    botocore's own `read` waits for the last byte, however slowly bytes arrive.

    Raises:
        _BadBodyError: it is shorter than announced, or after `slow_seconds` slower than `_LOWEST_SPEED`.
        urllib3.exceptions.HTTPError: the connection broke.
    """
    stream, begun = answer["Body"]._raw_stream, time.monotonic()
    pieces, length = [], 0
    try:
        while piece := stream.read1(1 << 20):
            pieces.append(piece)
            length += len(piece)
            spent = time.monotonic() - begun
            if spent > slow_seconds and length < _LOWEST_SPEED * spent:
                raise _BadBodyError(f"{length} bytes in {spent:.0f} s")
        if length != answer["ContentLength"]:
            raise _BadBodyError(f"{length} of {answer['ContentLength']} bytes")
    except BaseException:
        answer["Body"].close()  # its connection can't be used again
        raise
    return b"".join(pieces)


def _client() -> Any:
    """Return this process's client, created again if the environment has changed."""
    import boto3
    import botocore.config

    key = tuple(sorted((n, v) for n, v in os.environ.items() if n.startswith("AWS_")))
    with _lock:
        if key not in _clients:
            config = botocore.config.Config(
                retries={"total_max_attempts": 1},  # botocore does not repeat requests that fail during the answer
                max_pool_connections=_CONNECTIONS,
                connect_timeout=CONNECT_SECONDS,
                read_timeout=SILENT_SECONDS,
            )
            _clients[key] = boto3.Session().client("s3", config=config)
        return _clients[key]
