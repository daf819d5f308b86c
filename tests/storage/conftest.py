"""An object store for tests: in memory, and moto's server on loopback where the extra "storage-test" is installed."""

from __future__ import annotations

import pytest

from mindspeed_mm.data.storage import cache, service
from mindspeed_mm.data.storage.service import ObjectFacts

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


class ShelfStore:
    """Objects by their addresses; counts what is asked."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.read: list[str] = []

    def put(self, address: str, content: bytes) -> None:
        self.objects[address] = content

    def content_of(self, address: str) -> bytes:
        if address not in self.objects:
            raise FileNotFoundError(f"{address}: there is no such object, or no such bucket")
        self.read.append(address)
        return self.objects[address]

    def facts_of(self, address: str) -> ObjectFacts:
        content = self.content_of(address)
        self.read.pop()
        return ObjectFacts(len(content), str(hash(content)), 1.0e9)

    def download(self, address: str, target, told) -> None:
        target.write_bytes(self.content_of(address))
        told(len(self.objects[address]))

    def addresses_like(self, pattern: str) -> list[str]:
        before = pattern.partition("*")[0]
        return sorted(address for address in self.objects if address.startswith(before))


class MotoStore:
    """The same over moto's server."""

    def __init__(self, endpoint: str) -> None:
        import boto3

        self.endpoint = endpoint
        names = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=endpoint, **names)
        self.identities = boto3.client("iam", endpoint_url=endpoint, **names)

    def put(self, address: str, content: bytes) -> None:
        bucket, _, key = address.removeprefix("s3://").partition("/")
        self.client.create_bucket(Bucket=bucket)
        self.client.put_object(Bucket=bucket, Key=key, Body=content)


@pytest.fixture(scope="session")
def tokenizer(golden):
    from mindspeed_mm.data.tokenizer import load_tokenizer

    return load_tokenizer(golden / "tokenizer")


@pytest.fixture(scope="session")
def s3_packages():
    """The packages of the extra "storage-test" (docs/storage.md)."""
    for name in ("s3fs", "moto.server"):
        pytest.importorskip(name, reason="the extra storage-test")


@pytest.fixture(scope="session")
def moto_server(s3_packages):
    """Its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def moto_store(moto_server, storage_cache, monkeypatch):
    """An empty store on loopback, named by the environment."""
    import requests

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_server)
    requests.post(f"{moto_server}/moto-api/reset", timeout=30)
    return MotoStore(moto_server)


@pytest.fixture
def storage_cache(tmp_path, monkeypatch):
    """The folder of an empty cache."""
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        cache.SIZE_VARIABLE,
        *KEYS,
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "storage"))
    return tmp_path / "storage"


@pytest.fixture
def memory_store(storage_cache, monkeypatch):
    """An empty store in memory, in place of the service."""
    store = ShelfStore()
    for name in ("content_of", "facts_of", "download", "addresses_like"):
        monkeypatch.setattr(service, name, getattr(store, name))
    return store


@pytest.fixture(params=["memory", "moto"])
def store(request):
    """Each of them."""
    return request.getfixturevalue(f"{request.param}_store")
