"""Requests that are not answered: errors in the protocol's form, with the field, and the server goes on."""

import contextlib
import json
import struct
import zlib
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mindspeed_mm as mm
from tests.helpers.loopback import asking, data_url, png, serving

GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
LONG = GOOD | {"max_tokens": 60, "min_new_tokens": 60, "stream": True}


def image_at(url: str) -> dict:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}


def bomb() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = png(1, 1)[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + png(1, 1)[33:]


WRONG = [
    ({"model": "other"}, 404, "model", "the model 'other' does not exist"),
    ({"messages": []}, 400, "messages", "at least 1 item"),
    ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0].role", "'system', 'developer'"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages[0].role", "expected 'user'"),
    ({"messages": GOOD["messages"] * 2}, 400, "messages[1].role", "take turns"),
    (
        {"messages": [*GOOD["messages"], {"role": "assistant", "content": "a"}]},
        400,
        "messages",
        "last message must be the user's",
    ),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "messages[0].content", "the prompt is empty"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "a text or a list of parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "pdf"}]}]},
        400,
        "messages[0].content[0]",
        'type "text" or "im',
    ),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, 400, "messages[0].content[0]", 'type "text" or "im'),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
        400,
        "messages[0].content[0].image_url",
        'expected an object {"url"',
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        400,
        "messages[0].content[0].text",
        "valid string",
    ),
    ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "messages[0].content", "parts of the type image_url"),
    (
        {"messages": [{"role": "system", **asking("a", png(1, 1))[0] | {"role": "system"}}]},
        400,
        "messages[0]",
        "images in",
    ),
    ({"messages": GOOD["messages"] * 600}, 400, "messages", "at most 512"),
    ({"messages": asking("a", *[png(1, 1)] * 100)}, 400, "messages", "found 100 images; this server takes at most 16"),
    (image_at("https://example.com/a.png"), 400, "messages[0].content", "this server fetches nothing"),
    (image_at("file:///etc/passwd"), 400, "messages[0].content", "reads no files"),
    (image_at("data:text/plain;base64,YQ=="), 400, "messages[0].content", "found a data URL that begins 'data:text"),
    (image_at("data:image/png;base64,@@"), 400, "messages[0].content", "is no base64"),
    (image_at(data_url(b"no image")), 400, "messages[0].content", "its bytes begin as no known format does"),
    (image_at(data_url(png(40, 40)[:-40])), 400, "messages", "image in messages"),
    (image_at(data_url(bomb())), 400, "messages[0].content", "3600000000 pixels"),
    (image_at(data_url(png(300, 300))), 400, "messages[0].content", "at most 50000: scale it down"),
    ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, 400, "temperature", "valid number"),
    ({"top_p": 0}, 400, "top_p", "greater than 0"),
    ({"max_tokens": 100_000}, 400, "max_tokens", "at most 500"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens", "give one of them"),
    ({"n": 9, "temperature": 1}, 400, "n", "at most 2 sequences"),
    ({"n": 2}, 400, "n", "n 2 of greedy decoding would be equal: set temperature above 0"),
    ({"top_k": -1, "temperature": 1}, 400, "top_k", "top_k: found -1"),
    ({"min_new_tokens": 9}, 400, "min_new_tokens", "min_new_tokens 9 exceeds max_tokens 2"),
    ({"num_beams": 9}, 400, "num_beams", "at most 2 sequences"),
    ({"num_beams": 2, "logprobs": True}, 400, "logprobs", "do not go together"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ({"stream_options": {}}, 400, "stream_options", "needs stream"),
    ({"stop": [""]}, 400, "stop", "stop: found an empty text"),
    ({"stop": 3}, 400, "stop", "a text or a list of texts"),
    ({"stop": ["a", 3]}, 400, "stop[1]", "valid string"),
    ({"stop": ["a"] * 17}, 400, "stop", "at most 16"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        400,
        "response_format",
        "'json_schema' is not supp",
    ),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias", "found the key 'a'; expected ids of tokens"),
    ({"logit_bias": {"05": 1}}, 400, "logit_bias", "found the key '05'"),
    ({"logit_bias": {"5": 101}}, 400, None, "less than or equal to 100"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "found token 99999; the model has 0 to"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "found 1025 tokens; at most 1024"),
    ({"logit_bias": {"5": 1}, "sequence_bias": [[[5], 1.0]]}, 400, "logit_bias", "do not go together"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "tools is not supported"),
    ({"do_sample": True}, 400, "do_sample", "no field of a chat completion"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages", "exceed the model's context"),
]


@pytest.fixture(scope="module")
def vlm(golden):
    return mm.load(golden / "models" / "llava_hf", device="cpu")


@contextlib.contextmanager
def client_of(vlm, service=None, app=(), **limits):
    """A client of a server of the model with these limits."""
    from mindspeed_mm.serving.lanes import ModelLanes
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.service import ChatService

    limits = ServingLimits(**{"batch_size": 2, "pixels": 50_000, "new_tokens": 500} | limits)
    service = service or ChatService(ModelLanes("tiny", lambda: vlm.engine(batch_size=limits.batch_size)), limits)
    with serving(service, **dict(app)) as server:
        with httpx.Client(base_url=server.address, timeout=60) as found:
            yield found


@pytest.fixture(scope="module")
def client(vlm):
    with client_of(vlm, body_bytes=1_000_000) as found:
        yield found


def ask(client, body, **more):
    return client.post("/v1/chat/completions", json=body, **more)


def refused(response, status, message, param=None):
    """The error of a response, which has the protocol's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.status_code == status and message in error["message"], error
    assert param is None or error["param"] == param, error
    return error


@pytest.mark.parametrize(("changes", "status", "param", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_told_with_its_field(client, changes, status, param, message):
    refused(ask(client, GOOD | changes), status, message, param)
    streamed = GOOD | {"stream": True} | changes
    if "stream_options" not in changes:
        refused(ask(client, streamed), status, message, param)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"model": NaN}', b"[" * 100_000, b'"\\ud800"'])
def test_a_body_that_is_no_request(client, body):
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_addresses_kinds_and_sizes(client):
    refused(client.get("/v1/nothing"), 404, "Not Found")
    refused(client.get("/v1/chat/completions"), 405, "Method Not Allowed")
    refused(client.post("/v1/chat/completions", content=b"{}"), 415, "expected application/json")
    refused(ask(client, GOOD | {"user": "a" * 1_000_001}), 413, "more than 1000000 bytes")
    refused(client.get("/health", headers={"Host": "evil.example:80"}), 403, "listens on loopback")
    refused(client.get("/nothing.js"), 404, "Not Found")  # only files of the page are sent
    assert client.get("/health", headers={"Host": "[::1]:80"}).json()["status"] == "ok"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["model", "messages", "n", "stop", "seed", "logprobs", "top_logprobs", "stream", "stream_options", "tools", "top_p"]
    + ["response_format", "temperature", "max_tokens", "top_k", "num_beams", "eos_token_id", "logit_bias", "surprise"]
)
SMALL = {"max_tokens": 1}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
def test_fuzzed_requests_are_answered_or_refused(client, changes):
    body = json.dumps(GOOD | SMALL | changes)
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500, (body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    assert client.get("/health").json()["in_flight"] == 0


PART = st.sampled_from(
    [
        {"type": "text", "text": "Hi"},
        {"type": "text"},
        {"type": "image_url", "image_url": {"url": data_url(png(1, 1))}},
        {"type": "image_url", "image_url": {"url": data_url(png(1, 700))}},
        {"type": "image_url", "image_url": {"url": data_url(png(40, 40)[:60])}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
        {"type": "image_url", "image_url": "none"},
        {"type": "audio"},
    ]
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": st.lists(PART, max_size=4)}
)
SIZES = {
    "model": st.sampled_from(["tiny", "tiny ", "../tiny", "other", ""]),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(-1, 25),
    "stop": st.lists(st.sampled_from(["", "a", "<image>", "\n", "\ud7ff", "x" * 300]), max_size=6),
    "n": st.integers(-1, 4),
    "temperature": st.sampled_from([0, 1e-9, 0.7, 2, 1e30, -1]),
    "max_tokens": st.sampled_from([0, 1, 3, 2**31, 2**63]),
    "seed": st.sampled_from([0, -1, 2**63 - 1, 2**64]),
    "stream": st.booleans(),
    "messages": st.lists(MESSAGE, min_size=1, max_size=3),
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.fixed_dictionaries({}, optional=SIZES))
def test_fuzzed_values_of_known_fields(client, changes):
    body = json.dumps(GOOD | SMALL | changes)
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500, (body, response.text)
    if response.status_code == 200 and changes.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n"), (body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.text(max_size=12), body=st.binary(max_size=8))
def test_fuzzed_names_of_adapters(client, name, body):
    address = f"/v1/models/{quote(name, safe='')}/reload"
    response = client.post(address, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500 and response.json()["error"]["message"], (name, response.text)


def test_the_server_goes_on(client):
    assert ask(client, GOOD).json()["choices"][0]["finish_reason"] in ("stop", "length")
    told = client.get("/metrics").text
    assert 'mindspeed_mm_requests_total{status="400"}' in told and 'requests_total{status="200"}' in told


def test_the_token_is_asked_for(vlm):
    with client_of(vlm, app={"token": "secret"}) as client:
        for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
            error = refused(ask(client, GOOD, headers=headers), 401, "bearer token is missing or wrong")
            assert error["code"] == "invalid_api_key"
        assert client.get("/metrics").status_code == 401 and client.get("/health").status_code == 200
        assert ask(client, GOOD, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_files_below_the_media_root_alone(vlm, tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    (root / "a b.png").write_bytes(png(9, 9))
    (tmp_path / "out.png").write_bytes(png(9, 9))
    (root / "link.png").symlink_to(tmp_path / "out.png")
    with client_of(vlm, media_root=root) as client:
        assert ask(client, GOOD | image_at(f"file://{root}/a%20b.png")).status_code == 200
        names = ("../out.png", "link.png", "none.png", "", "%00")
        for url in [*(f"file://{root}/{name}" for name in names), f"file://elsewhere{root}/a%20b.png"]:
            refused(ask(client, GOOD | image_at(url)), 400, "no image file below", "messages[0].content")


def test_the_page_is_served_with_a_strict_policy(vlm, tmp_path):
    for name in ("index.html", "page.js", "page.css", "secret.txt"):
        (tmp_path / name).write_text(name)
    with client_of(vlm, app={"page": tmp_path}) as client:
        for address, text in {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}.items():
            response = client.get(address)
            assert response.text == text and "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert client.get("/secret.txt").status_code == 404
