"""Read an S3 object, or a range of it, by one GET request.

Arrow's S3 file system asks for an object's size before it reads, with every file: twice the requests, and a second
round trip for each image.
"""

import os
import random
import threading
import time
from typing import Any

ATTEMPTS = 11  # the pauses double from 50 ms, as Arrow's do: most of a minute before an endpoint is given up
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


def get(bucket: str, key: str, span: tuple[int, int] | None = None) -> bytes | None:
    """Return an object's bytes, or None where there is no such object.

    Args:
        bucket: its name.
        key: of the object.
        span: offset and number of the bytes that are wanted; None: all.

    Raises:
        OSError: the object can't be read; the text names the cause as Arrow does (`AWS Error ACCESS_DENIED`).
    """
    import botocore.exceptions

    wanted = {} if span is None else {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"}
    client = _client()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            data: bytes = client.get_object(Bucket=bucket, Key=key, **wanted)["Body"].read()
            return data
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if code in ("NoSuchKey", "NoSuchBucket", "404"):
                return None
            failed = OSError(f"AWS Error {_NAMES.get(code, code)}: HTTP status {status}")
            if attempt == ATTEMPTS or not (status >= 500 or status == 429 or code in _PASSING):
                raise failed from None
        # Dropped connections, also while the answer comes in.
        except (botocore.exceptions.HTTPClientError, botocore.exceptions.IncompleteReadError) as error:
            if attempt == ATTEMPTS:
                raise OSError(f"AWS Error NETWORK_CONNECTION: {error}") from None
        except botocore.exceptions.BotoCoreError as error:
            raise OSError(str(error)) from None
        time.sleep(_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


def _client() -> Any:
    """Return this process's client, made anew where the environment has changed."""
    import boto3
    import botocore.config

    key = tuple(sorted((n, v) for n, v in os.environ.items() if n.startswith("AWS_")))
    with _lock:
        if key not in _clients:
            config = botocore.config.Config(
                retries={"total_max_attempts": 1},  # botocore would not repeat what fails while the answer comes in
                max_pool_connections=_CONNECTIONS,
                connect_timeout=5,
                read_timeout=60,
            )
            _clients[key] = boto3.Session().client("s3", config=config)
        return _clients[key]
