"""The bodies of OpenAI's chat completions, and the engine's options that they ask for."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.options import SAMPLING, GenerationOptions, generation_options
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.refusal import UNION_TAG, RequestRefused, refusal_of_options

OURS = (
    *("do_sample", "stop_strings", "num_return_sequences", "max_new_tokens", "bos_token_id", "pad_token_id"),
    "prefix_allowed_tokens_fn",
)
"""Options of the engine that have another name in the protocol, or none."""

EXTRA = frozenset(GenerationOptions.model_fields) - frozenset(OURS)
"""Options of the engine that a request may carry besides the protocol's own."""

NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity")
"""Fields about the account of the caller, not about the answer."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
"""Fields that are refused, with the values that ask for nothing (null always does)."""

MAX_SEED = 2**63 - 1

MAX_BIASES = 1024
"""Tokens whose logits one request may change."""


class ProtocolModel(pydantic.BaseModel):
    """A part of a request: no unknown keys, no coercion, finite numbers."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(ProtocolModel):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class ImageAddress(ProtocolModel):
    """Where an image is: a data URL with its bytes, or file:// below the server's media root."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    """Taken, without an effect: the model decides how it sees an image."""


class ImagePart(ProtocolModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageAddress

    @pydantic.field_validator("image_url", mode="before")
    @classmethod
    def _is_an_object(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError('found a text; expected an object {"url": "data:image/png;base64,..."}')
        return value


Bias = Annotated[float, pydantic.Field(ge=-100, le=100)]


def _kind_of_part(value: Any) -> str | None:
    """The tag of a part; None for one of another type."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"text": f"{UNION_TAG}text", "image_url": f"{UNION_TAG}image"}.get(kind) if isinstance(kind, str) else None


def _kind_of_texts(value: Any) -> str | None:
    """The tag of what may be a text or a list."""
    return f"{UNION_TAG}text" if isinstance(value, str) else f"{UNION_TAG}list" if isinstance(value, list) else None


def _text_or(kind: Any, expected: str) -> Any:
    """A text, or a list of this type: what is wrong with one of them is told, and nothing of the other."""
    union = Annotated[str, pydantic.Tag(f"{UNION_TAG}text")] | Annotated[kind, pydantic.Tag(f"{UNION_TAG}list")]
    wrong = {"custom_error_type": "text_or_list", "custom_error_message": expected}
    return Annotated[union, pydantic.Discriminator(_kind_of_texts, **wrong)]


MessagePart = Annotated[
    Annotated[TextPart, pydantic.Tag(f"{UNION_TAG}text")] | Annotated[ImagePart, pydantic.Tag(f"{UNION_TAG}image")],
    pydantic.Discriminator(
        _kind_of_part,
        custom_error_type="part_type",
        custom_error_message='Parts have the type "text" or "image_url"',
    ),
]


class ChatMessage(ProtocolModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _text_or(list[MessagePart], "Content is a text or a list of parts")
    name: str | None = None
    refusal: None = None

    @pydantic.model_validator(mode="after")
    def _images_are_the_users(self) -> ChatMessage:
        if self.role != "user" and self.images:
            raise ValueError(f"a message of the role {self.role} holds an image; expected images in those of user")
        return self

    @property
    def images(self) -> list[ImagePart]:
        """Its images in order."""
        parts = () if isinstance(self.content, str) else self.content
        return [part for part in parts if isinstance(part, ImagePart)]


class StreamOptions(ProtocolModel):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Taken, without an effect."""


class ResponseFormat(ProtocolModel):
    """The form of the answer; only text is built."""

    type: str
    json_schema: dict[str, Any] | None = None

    @pydantic.model_validator(mode="after")
    def _is_text(self) -> ResponseFormat:
        if self.type != "text":
            raise ValueError(f"response_format {self.type!r} is not supported: leave it out, or use the type 'text'")
        return self


class ChatRequest(pydantic.BaseModel):
    """The body of POST /v1/chat/completions."""

    model_config = pydantic.ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    model: str
    messages: Annotated[list[ChatMessage], pydantic.Field(min_length=1)]
    max_tokens: Annotated[int, pydantic.Field(gt=0)] | None = None
    max_completion_tokens: Annotated[int, pydantic.Field(gt=0)] | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] | None = None
    """Where the request does not say: the model file's, else 1, as in the protocol; 0 is greedy."""
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    n: Annotated[int, pydantic.Field(gt=0, le=128)] | None = None
    stop: _text_or(Annotated[list[str], pydantic.Field(max_length=16)], "Expected a text or a list of texts") | None = (
        None
    )
    logit_bias: dict[str, Bias] | None = None
    """What is added to the logits of tokens, by their ids."""
    seed: Annotated[int, pydantic.Field(ge=-(2**63), le=MAX_SEED)] | None = None
    """None: another one each time."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @pydantic.field_validator("logit_bias")
    @classmethod
    def _has_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdecimal() and key == str(int(key[:20]))):
                raise ValueError(f'found the key {key[:40]!r}; expected ids of tokens, such as "50256"')
        if len(value or ()) > MAX_BIASES:
            raise ValueError(f"found {len(value)} tokens; at most {MAX_BIASES} are taken")
        return value

    @pydantic.model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestRefused("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise RequestRefused("stream_options needs stream: true", param="stream_options")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            text = "max_tokens and max_completion_tokens differ: give one of them"
            raise RequestRefused(text, param="max_tokens")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens of the answer that the request asks for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def extra_options(self) -> dict[str, Any]:
        """The engine's options among the fields that the protocol does not have. RequestRefused for any other."""
        found = {}
        for name, value in (self.model_extra or {}).items():
            if name in EXTRA:
                found[name] = value
            elif name in UNSUPPORTED:
                if value is not None and value not in UNSUPPORTED[name]:
                    raise RequestRefused(f"{name} is not supported: leave it out", param=name)
            elif name not in NO_EFFECT:
                raise RequestRefused(f"{name} is no field of a chat completion: leave it out", param=name[:100])
        return found


def options_of(
    request: ChatRequest, limits: ServingLimits, *, vocabulary: int, usual_temperature: float = 1.0
) -> dict[str, Any]:
    """The engine's options of a request, checked; max_new_tokens, temperature and top_p only where they are decided
    here. What is left out is the engine's default, which the model's own file may give. `vocabulary`: the model's
    ids are 0 to one less. `usual_temperature` decides whether a request that says nothing draws.

    Raises:
        RequestRefused: a limit is exceeded, or options do not go together.
    """
    options = request.extra_options()
    temperature = float(usual_temperature if request.temperature is None else request.temperature)
    sampling = temperature > 0 and options.get("num_beams", 1) == 1
    chosen: dict[str, Any] = {
        "do_sample": sampling,
        **({"temperature": temperature} if sampling else {}),
        **({"top_p": float(request.top_p)} if sampling and request.top_p is not None else {}),
        "num_beams": options.get("num_beams", 1),
        "num_return_sequences": request.n or 1,
        "seed": secrets.randbelow(MAX_SEED) if request.seed is None else request.seed % MAX_SEED,
    }
    if not sampling:  # they change nothing where nothing is drawn
        options = {name: value for name, value in options.items() if name not in SAMPLING}
    if request.stop is not None:
        chosen["stop_strings"] = [request.stop] if isinstance(request.stop, str) else list(request.stop)
    if request.logit_bias:
        chosen["sequence_bias"] = _biases(request.logit_bias, vocabulary)
        if options.get("sequence_bias"):
            raise RequestRefused("logit_bias and sequence_bias do not go together: use one", param="logit_bias")
    if request.logprobs:
        chosen["logprobs"] = request.top_logprobs or 0
        if options.get("num_beams", 1) != 1:
            raise RequestRefused("logprobs and num_beams do not go together: use one of them", param="logprobs")
    if request.max_new_tokens is not None:
        if request.max_new_tokens > limits.new_tokens:
            raise RequestRefused(
                f"max_tokens is {request.max_new_tokens}; this server gives at most {limits.new_tokens}",
                param="max_tokens",
            )
        chosen["max_new_tokens"] = request.max_new_tokens
    _check_options(options | chosen, limits)
    return options | chosen


def _biases(logit_bias: Mapping[str, float], vocabulary: int) -> list[Any]:
    """The biases as the engine's sequence_bias: sequences of one token."""
    found = {int(key): bias for key, bias in logit_bias.items()}
    if max(found) >= vocabulary:
        raise RequestRefused(
            f"logit_bias: found token {max(found)}; the model has 0 to {vocabulary - 1}", param="logit_bias"
        )
    return [[[token], bias] for token, bias in found.items()]


def _check_options(options: dict[str, Any], limits: ServingLimits) -> None:
    try:
        checked = generation_options(options)
    except ConfigError as error:
        raise refusal_of_options(error, GenerationOptions.model_fields) from error
    for name, param in (("num_return_sequences", "n"), ("num_beams", "num_beams")):
        if getattr(checked, name) > limits.batch_size:
            raise RequestRefused(
                f"{param} is {getattr(checked, name)}; this server runs at most {limits.batch_size} sequences",
                param=param,
            )
