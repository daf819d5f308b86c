"""The bodies of OpenAI's chat completions, and the engine's options that they ask for."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.options import SAMPLING, GenerationOptions, generation_options
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.refusal import RequestRefused

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
    "logit_bias": ({},),
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


MessagePart = Annotated[TextPart | ImagePart, pydantic.Field(discriminator="type")]


class ChatMessage(ProtocolModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[MessagePart]
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
    """1 where the request does not say, as in the protocol; 0 is greedy."""
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    n: Annotated[int, pydantic.Field(gt=0, le=128)] | None = None
    stop: str | Annotated[list[str], pydantic.Field(max_length=16)] | None = None
    seed: Annotated[int, pydantic.Field(ge=-(2**63), le=MAX_SEED)] | None = None
    """None: another one each time."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
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


def options_of(request: ChatRequest, limits: ServingLimits) -> dict[str, Any]:
    """The engine's options of a request, checked; max_new_tokens only where the request gives it.

    Raises:
        RequestRefused: a limit is exceeded, or options do not go together.
    """
    options = request.extra_options()
    temperature = 1.0 if request.temperature is None else float(request.temperature)
    sampling = temperature > 0 and options.get("num_beams", 1) == 1
    chosen: dict[str, Any] = {
        "do_sample": sampling,
        "temperature": temperature if sampling else None,
        "top_p": None if request.top_p is None or not sampling else float(request.top_p),
        "num_return_sequences": request.n or 1,
        "stop_strings": [request.stop] if isinstance(request.stop, str) else list(request.stop or ()),
        "seed": secrets.randbelow(MAX_SEED) if request.seed is None else request.seed % MAX_SEED,
    }
    if not sampling:  # they change nothing where nothing is drawn
        options = {name: value for name, value in options.items() if name not in SAMPLING}
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


def _check_options(options: dict[str, Any], limits: ServingLimits) -> None:
    try:
        checked = generation_options(options)
    except ConfigError as error:
        raise RequestRefused(str(error)) from error
    for name, param in (("num_return_sequences", "n"), ("num_beams", "num_beams")):
        if getattr(checked, name) > limits.batch_size:
            raise RequestRefused(
                f"{param} is {getattr(checked, name)}; this server runs at most {limits.batch_size} sequences",
                param=param,
            )
