"""The object store: what the environment says, the extra, rights, keys, a busy store and one that is not there."""

import contextlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mindspeed_mm.data.storage import service
from mindspeed_mm.data.storage.objects import StoredImage, local_file
from mindspeed_mm.errors import ConfigError, DataError

POLICY = """{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"],
"Resource": ["arn:aws:s3:::open", "arn:aws:s3:::open/*"]}]}"""


def test_nothing_of_the_extra_is_imported_for_files():
    code = (
        "import sys, mindspeed_mm.data.build, mindspeed_mm.data.datasets.rec, evaluation.questions\n"
        "import mindspeed_mm.data.storage.objects as o; o.local_file('a.json'); o.in_folder('b', 'c')\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('fsspec', 's3fs', 'botocore', 'aiohttp')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_told(monkeypatch, storage_cache):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r'begin with s3:// need the extra "storage" .*pip install "mindspeed-mm\[st'):
        local_file("s3://bucket/a.json")


def test_what_the_environment_says():
    keys = {"AWS_ACCESS_KEY_ID": "K", "AWS_SECRET_ACCESS_KEY": "S"}
    amazon = service._options(keys | {"AWS_REGION": "eu-1"})
    assert (amazon["key"], amazon["secret"], amazon["anon"], amazon["endpoint_url"]) == ("K", "S", False, None)
    assert amazon["client_kwargs"] == {"region_name": "eu-1"} and "s3" not in amazon["config_kwargs"]
    ceph = service._options({"AWS_ENDPOINT_URL": "http://a:1", "AWS_ENDPOINT_URL_S3": "https://ceph.lan:7480"})
    assert ceph["anon"] and ceph["endpoint_url"] == "https://ceph.lan:7480"
    assert ceph["config_kwargs"]["s3"] == {"addressing_style": "path"}


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"AWS_ACCESS_KEY_ID": "K"},
            "AWS_ACCESS_KEY_ID is set and AWS_SECRET_ACCESS_KEY is not; expected both, or none",
        ),
        ({"AWS_SECRET_ACCESS_KEY": "S"}, "AWS_SECRET_ACCESS_KEY is set and AWS_ACCESS_KEY_ID is not; expected both"),
        ({"AWS_ENDPOINT_URL": "ceph.lan:7480"}, "AWS_ENDPOINT_URL is no address of a store; expected https://HOST"),
        ({"AWS_ENDPOINT_URL": "http://user:word@ceph.lan"}, "AWS_ENDPOINT_URL is no address of a store"),
    ],
)
def test_values_that_do_not_fit(environment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        service._options(environment)
    assert "word" not in str(caught.value)


@pytest.mark.parametrize("address", ["s3://", "s3:///a", "s3://Upper/a", "s3://a b/c"])
def test_addresses_without_a_bucket(address):
    with pytest.raises(ConfigError, match="found the address 's3://.*; expected s3://bucket/folder/file"):
        service.checked_address(address)


def refused(address):
    with pytest.raises(DataError, match=f"{address} may not be read: the store refuses") as caught:
        StoredImage(address).read()
    return str(caught.value)


def test_a_bucket_without_rights(moto_store, monkeypatch):
    import requests

    moto_store.put("s3://open/a.png", b"1")
    moto_store.put("s3://closed/a.png", b"2")
    moto_store.identities.create_user(UserName="reader")
    moto_store.identities.put_user_policy(UserName="reader", PolicyName="open", PolicyDocument=POLICY)
    made = moto_store.identities.create_access_key(UserName="reader")["AccessKey"]
    requests.post(f"{moto_store.endpoint}/moto-api/reset-auth", data=b"0", timeout=30)  # from here on rights count
    try:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", made["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made["SecretAccessKey"])
        assert StoredImage("s3://open/a.png").read() == b"1"
        told = refused("s3://closed/a.png")
        assert "the keys of the environment" in told and made["SecretAccessKey"] not in told
        with pytest.raises(
            DataError, match="s3://closed/a.png may not be read: the store refuses the keys of the envi"
        ):
            local_file("s3://closed/a.png")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert "wrong" not in refused("s3://open/b.png")
    finally:
        requests.post(f"{moto_store.endpoint}/moto-api/reset-auth", data=b"inf", timeout=30)


def test_a_public_bucket_needs_no_keys(moto_store, monkeypatch):
    moto_store.put("s3://open/a.png", b"1")
    moto_store.client.put_bucket_acl(Bucket="open", ACL="public-read")
    moto_store.client.put_object_acl(Bucket="open", Key="a.png", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert StoredImage("s3://open/a.png").read() == b"1"


def test_what_is_not_there(moto_store):
    moto_store.put("s3://open/folder/a.png", b"1")
    for address in ("s3://open/b.png", "s3://none/a.png"):
        with pytest.raises(FileNotFoundError, match=f"{address}: there is no such object, or no such bucket"):
            StoredImage(address).read()
    with pytest.raises(DataError, match="cannot read the data file s3://open/folder is no object, but a folder"):
        local_file("s3://open/folder")
    assert not StoredImage("s3://open/b.png").is_there() and StoredImage("s3://open/folder/a.png").is_there()


def test_a_refused_request_without_keys(s3_packages, storage_cache, monkeypatch):
    with answering(ClosedStore, monkeypatch):
        assert "requests without keys, and AWS_ACCESS_KEY_ID is not set" in refused("s3://closed/b.png")


@contextlib.contextmanager
def answering(handler, monkeypatch):
    """A store on loopback, named by the environment."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)


class ClosedStore(BaseHTTPRequestHandler):
    """Refuses everything."""

    def do_GET(self):
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")

    def log_message(self, *_):
        pass


class BusyStore(BaseHTTPRequestHandler):
    """Says "slow down" twice, then cuts an answer, then gives the object."""

    asked: list[str] = []
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.asked.append(self.path)
        busy = len(self.asked) <= 2
        body = b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>" if busy else b"pixels"
        self.send_response(503 if busy else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if len(self.asked) == 3:
            self.wfile.write(body[:2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_busy_store_is_asked_again(s3_packages, storage_cache, monkeypatch):
    monkeypatch.setattr("random.random", lambda: 0.01)  # the pauses between the attempts
    with answering(BusyStore, monkeypatch):
        assert StoredImage("s3://open/a.png").read() == b"pixels"
        assert BusyStore.asked == ["/open/a.png"] * 4
        assert StoredImage("s3://open/a.png").read() == b"pixels" and len(BusyStore.asked) == 4


def test_a_store_that_is_not_there(s3_packages, storage_cache, monkeypatch):
    monkeypatch.setattr("random.random", lambda: 0.01)
    monkeypatch.setattr(service, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        DataError, match=r"could not be read in 2 attempts \(http://127.0.0.1:9\): .*Is the store there"
    ):
        StoredImage("s3://open/a.png").read()


def test_a_large_file_comes_whole(moto_store, storage_cache):
    content = bytes(range(256)) * 2**15
    moto_store.put("s3://open/large.bin", content)
    found = Path(local_file("s3://open/large.bin"))
    assert found.read_bytes() == content and found.is_relative_to(storage_cache / "files")
