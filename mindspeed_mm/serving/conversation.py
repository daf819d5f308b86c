"""Messages of the protocol to a request of the engine."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.image import ImageError, image_size
from mindspeed_mm.data.sample import ImageBytes
from mindspeed_mm.generation.prompts import GenerationRequest
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.protocol import ChatMessage, ImagePart
from mindspeed_mm.serving.refusal import RequestRefused

DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+(;[a-z0-9-]+=[^;,]*)*;base64,", re.IGNORECASE)

MAX_FILE_BYTES = 2**28


def generation_request(
    request_id: str, messages: Sequence[ChatMessage], limits: ServingLimits, *, after_image: str
) -> GenerationRequest:
    """A conversation with its images, whose headers have been read.

    Parts stand in the order of the message: `after_image` (what the family has behind an image) between an image and
    its neighbours, a new line between two texts.

    Raises:
        RequestRefused: wrong roles, too many messages or images, or an image that cannot be used.
    """
    if len(messages) > limits.messages:
        raise RequestRefused(
            f"found {len(messages)} messages; this server takes at most {limits.messages}", param="messages"
        )
    count = sum(len(message.images) for message in messages)
    if count > limits.images:
        raise RequestRefused(f"found {count} images; this server takes at most {limits.images}", param="messages")
    first = 1 if messages[0].role in ("system", "developer") else 0
    system = _text(messages[0], 0, after_image) if first else None
    images: list[ImageBytes] = []
    texts: list[str] = []
    for index, message in enumerate(messages[first:], start=first):
        expected = "assistant" if (index - first) % 2 else "user"
        if message.role != expected:
            raise RequestRefused(
                f"messages[{index}].role is {message.role!r}; expected {expected!r}: one system message may come "
                "first, then user and assistant take turns",
                param=f"messages[{index}].role",
            )
        texts.append(_text(message, index, after_image))
        images += [_image(part, f"messages[{index}]", limits) for part in message.images]
    if len(texts) % 2 == 0:
        raise RequestRefused("the last message must be the user's: there is nothing to answer", param="messages")
    if not texts[-1].strip():
        param = f"messages[{len(messages) - 1}].content"
        raise RequestRefused(f"{param}: the prompt is empty; give it a text or an image", param=param)
    answers: list[str | None] = [*texts[1::2], None]
    turns = tuple(zip(texts[::2], answers, strict=True))
    return GenerationRequest(request_id, turns=turns, images=tuple(images), system=system)


def _text(message: ChatMessage, index: int, after_image: str) -> str:
    """The text of a message, IMAGE_TOKEN at each image."""
    parts = [message.content] if isinstance(message.content, str) else message.content
    text, before = "", None
    for part in parts:
        is_image = isinstance(part, ImagePart)
        own = IMAGE_TOKEN if is_image else part if isinstance(part, str) else part.text
        if not is_image and IMAGE_TOKEN in own:
            raise RequestRefused(
                f"messages[{index}].content holds the text {IMAGE_TOKEN}, which stands for an image inside: give "
                "images as parts of the type image_url",
                param=f"messages[{index}].content",
            )
        if before is not None:
            text += after_image if is_image or before else "\n"
        text, before = text + own, is_image
    return text


def _image(part: ImagePart, where: str, limits: ServingLimits) -> ImageBytes:
    url, param = part.image_url.url, f"{where}.content"
    if match := DATA_URL.match(url):
        try:
            data = base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestRefused(f"{param}: the data URL is no base64 ({error})", param=param) from error
    elif url[:7].lower() == "file://":
        data = _file(url, param, limits.media_root)
    elif url[:5].lower() == "data:":
        raise RequestRefused(
            f"{param}: found a data URL that begins {url[:40]!r}; expected data:image/png;base64,... (or another kind "
            "of image)",
            param=param,
        )
    else:
        raise RequestRefused(
            f"{param}: the image is at {url[:40]!r}; expected a data URL (data:image/png;base64,...): this server "
            "fetches nothing",
            param=param,
        )
    image = ImageBytes(f"in {where}", data)
    try:
        height, width = image_size(image)
    except ImageError as error:
        raise RequestRefused(f"{param}: {error}", param=param, code="invalid_image") from error
    if height * width > limits.pixels:
        raise RequestRefused(
            f"{param}: an image is {width} x {height} pixels; this server takes at most {limits.pixels}: scale it down",
            param=param,
            code="image_too_large",
        )
    return image


def _file(url: str, param: str, root: Path | None) -> bytes:
    """The bytes of a file below the media root. What lies outside is refused alike, whether it is there or not."""
    if root is None:
        raise RequestRefused(f"{param}: this server reads no files: send the image as a data URL", param=param)
    refused = RequestRefused(f"{param}: {url[:100]!r} is no image file below the server's media root", param=param)
    try:
        address = urlsplit(url)
        path = Path(unquote(address.path)).resolve()
        if address.netloc not in ("", "localhost") or not path.is_relative_to(root.resolve()) or not path.is_file():
            raise refused
        if path.stat().st_size > MAX_FILE_BYTES:
            raise refused
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise refused from error
