"""The object store: what an address is, and how its object is fetched.

Where the store is and who asks comes from the environment alone: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL (Ceph's
gateway and others), AWS_REGION or AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_mm.errors import ConfigError, DataError

SCHEME = "s3://"
ATTEMPTS = 5
"""Of a request that a busy or unreachable store does not answer; the pause between them grows."""

CONNECT_SECONDS, READ_SECONDS = 10, 60
FORM = re.compile(r"s3://[a-z0-9][a-z0-9.\-]+(/.*)?", re.DOTALL)
"""Of an address: a bucket's name, and a key behind a slash."""

EXAMPLE = "s3://bucket/folder/file"


class ObjectFacts(NamedTuple):
    """What the store says of an object."""

    size: int
    version: str
    """Changes with the content (the ETag)."""
    changed: float | None
    """Seconds since 1970."""


def is_address(path: Any) -> bool:
    """Whether a path is an address of the object store."""
    return isinstance(path, str) and path.startswith(SCHEME)


def checked_address(address: str) -> str:
    """The address without slashes at its end. Raises ConfigError for one without a bucket."""
    if FORM.fullmatch(address) is None:
        raise ConfigError(f"found the address {address!r:.120}; expected {EXAMPLE}, the bucket in lower case")
    return address.rstrip("/")


def facts_of(address: str) -> ObjectFacts:
    """Size and version of an object. Raises FileNotFoundError, DataError and ConfigError as `content_of`."""
    with _told(address) as store:
        found = store.info(address)
    if found.get("type") != "file":
        raise FileNotFoundError(f"{address} is no object, but a folder of some")
    changed = found.get("LastModified")
    return ObjectFacts(
        int(found["size"]), str(found.get("ETag", "")).strip('"'), changed.timestamp() if changed else None
    )


def content_of(address: str) -> bytes:
    """The bytes of an object.

    Raises:
        FileNotFoundError: there is no such object or bucket.
        DataError: the store refuses it, or does not answer.
        ConfigError: the environment's values do not fit, or the extra "storage" is not installed.
    """
    with _told(address) as store:
        return store.cat_file(address, max_concurrency=1)  # one request for a whole object


def download(address: str, target: Path, told: Callable[[int], None]) -> None:
    """Write an object to a file, piece by piece; `told` gets the bytes of each. Raises as `content_of`."""
    with _told(address) as store:
        from fsspec.callbacks import Callback

        before = 0

        def hook(size: int | None, value: int, **_: Any) -> None:
            nonlocal before
            told(value - before)
            before = value

        store.get_file(address, str(target), callback=Callback(hooks={"advance": hook}))


def addresses_like(pattern: str) -> list[str]:
    """Addresses of the objects that a pattern with * and [0-9] names, sorted. Raises as `content_of`."""
    with _told(pattern) as store:
        return sorted(SCHEME + key for key in store.glob(pattern))


def endpoint_of(environment: Mapping[str, str]) -> str | None:
    """The store's own address; None: Amazon's."""
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or None


def _options(environment: Mapping[str, str]) -> dict[str, Any]:
    """What s3fs is made with. Raises ConfigError for values that do not fit together."""
    key, secret = environment.get("AWS_ACCESS_KEY_ID") or None, environment.get("AWS_SECRET_ACCESS_KEY") or None
    if (key is None) != (secret is None):
        there, missing = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")[:: 1 if secret is None else -1]
        raise ConfigError(f"{there} is set and {missing} is not; expected both, or none for a public bucket")
    endpoint = endpoint_of(environment)
    if endpoint is not None and re.fullmatch(r"https?://[^/\s@]+(/\S*)?", endpoint) is None:
        raise ConfigError("AWS_ENDPOINT_URL is no address of a store; expected https://HOST or http://HOST:PORT")
    config: dict[str, Any] = {
        "retries": {"max_attempts": ATTEMPTS, "mode": "standard"},
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "response_checksum_validation": "when_required",  # older gateways know no others
    }
    if endpoint is not None:
        config["s3"] = {"addressing_style": "path"}  # a gateway's buckets have no host names of their own
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    return {
        "anon": key is None,
        "key": key,
        "secret": secret,
        "token": environment.get("AWS_SESSION_TOKEN") or None,
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": region} if region else {},
        "config_kwargs": config,
        "use_listings_cache": False,
    }


def _store() -> Any:
    """The store of the environment; fsspec keeps one for each process and set of options."""
    try:
        import fsspec

        return fsspec.filesystem("s3", **_options(os.environ))
    except ImportError as error:
        raise ConfigError(
            f'addresses that begin with {SCHEME} need the extra "storage" ({error}): '
            'pip install "mindspeed-mm[storage]"'
        ) from error


@contextmanager
def _told(address: str) -> Iterator[Any]:
    """The store, whose errors are told as ours."""
    store = _store()
    from botocore.exceptions import BotoCoreError

    try:
        yield store
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{address}: there is no such object, or no such bucket") from error
    except PermissionError as error:
        who = "requests without keys, and AWS_ACCESS_KEY_ID is not set" if store.anon else "the keys of the environment"
        raise DataError(
            f"{address} may not be read: the store refuses {who} ({error}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY of a user with rights on the bucket"
        ) from error
    except (OSError, BotoCoreError) as error:
        where = store.endpoint_url or "Amazon's store; AWS_ENDPOINT_URL names another one"
        raise DataError(
            f"{address} could not be read in {ATTEMPTS} attempts ({where}): {error}. Is the store there, and "
            "the address right?"
        ) from error
