"""A loaded model as the engine of an evaluation, and what identifies its answers."""

import hashlib
import logging
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from evaluation.engine import EvaluationRequest
from evaluation.prompts import SHORT_INSTRUCTION
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.image import image_size
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.template_choice import template_fact
from mindspeed_mm.errors import ContextError, DataError
from mindspeed_mm.generation import engine as generation
from mindspeed_mm.generation.images import DIGEST_BYTES, FoundImage
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.inference.loaded import LoadedVLM
from mindspeed_mm.models.adapters.spec import LoraSpec

logger = logging.getLogger(__name__)

PROBE = "A chat. USER:  <x>\nWhat is 12.50 + 007? \u732b \u00e9 (A) B. ASSISTANT: None</s>"
"""Text whose ids tell tokenizers apart: spaces, digits, letters outside ASCII, special tokens."""

IN_FLIGHT = 4
"""Requests per row of the batch that the generation engine can choose from, to run equal lengths and beginnings
together."""

DIGEST_CHUNK = 2**24
"""Values hashed at a time, to bound the memory for their 64-bit copies."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ModelEngine:
    """An evaluation.engine.Engine that asks a LoadedVLM. The next images are decoded and preprocessed by a thread
    while the model answers."""

    def __init__(
        self, vlm: LoadedVLM, options: GenerationOptions, template: str | None = None, *, as_written: bool = False
    ):
        """`as_written`: texts go to the template as they are, as in training; else what a family's models know behind
        an image takes the place of LLaVA's line feed."""
        self._as_written = as_written
        self._vlm, self._template, self._options = vlm, template, options
        self._asks_for_short_answers = get_template(template or vlm.template, vlm.tokenizer).asks_for_short_answers
        self._facts = {
            **_weights(vlm),
            **_adapters(vlm),
            "dtype": str(next(vlm.model.parameters()).dtype).removeprefix("torch."),
            "tokenizer": _digest(vlm.tokenizer.encode(PROBE)),
            "media": vlm.media.settings,
            "template": template_fact(template or vlm.template, vlm.tokenizer),
            "decoding": options.model_dump(mode="json") | {"method": "greedy" if options.greedy else "sampling"},
        }

    def generate(self, requests: Sequence[EvaluationRequest], batch_size: int) -> Iterator[tuple[int | str, str]]:
        """(id, text) as answers come. Raises DataError for the first request that cannot be answered."""
        engine = self._vlm.engine(self._template, batch_size=batch_size)
        ended: deque[tuple[EvaluationRequest, generation.GenerationHandle]] = deque()
        open_requests = 0
        for request, images in self._with_images(requests, ahead=batch_size):
            turns = request.turns or ()
            if not self._as_written:
                turns = placed(turns, self._vlm.spec.family.after_image)
                turns = without_instruction(turns) if self._asks_for_short_answers else turns
            asked = generation.GenerationRequest(str(request.id), turns, request.text, images)
            engine.submit(asked, self._options, on_end=lambda handle, request=request: ended.append((request, handle)))
            open_requests += 1
            while open_requests - len(ended) >= IN_FLIGHT * batch_size:
                engine.step()
            open_requests -= len(ended)
            yield from _texts(ended)
        while open_requests:
            engine.step()
            open_requests -= len(ended)
            yield from _texts(ended)

    def _with_images(
        self, requests: Sequence[EvaluationRequest], ahead: int
    ) -> Iterator[tuple[EvaluationRequest, tuple[FoundImage, ...]]]:
        """Requests with their preprocessed images, which a thread makes for up to `ahead` requests that come next."""
        queue: deque[tuple[EvaluationRequest, Future[tuple[FoundImage, ...]]]] = deque()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")
        try:
            for request in requests:
                is_known = queue and queue[-1][0].image == request.image
                queue.append((request, queue[-1][1] if is_known else pool.submit(self._images, request)))
                if len(queue) > ahead:
                    first, images = queue.popleft()
                    yield first, images.result()
            for first, images in queue:
                yield first, images.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _images(self, request: EvaluationRequest) -> tuple[FoundImage, ...]:
        media, found = self._vlm.media, []
        for number, image in enumerate(request.images()):
            key = hashlib.blake2b(f"{request.image}/{number}".encode(), digest_size=DIGEST_BYTES).digest()
            found.append(FoundImage(key, media.item(image), media.fixed or media.plan(*image_size(image))))
        return tuple(found)

    def describe(self) -> dict[str, Any]:
        """Weights by their contents (not their path), tokenizer, preprocessing, template and decoding."""
        return self._facts


def placed(turns: Iterable[tuple[str, str | None]], after_image: str) -> tuple[tuple[str, str | None], ...]:
    """Turns in which what a family's models know behind an image takes the place of LLaVA's line feed."""
    return tuple((text.replace(f"{IMAGE_TOKEN}\n", IMAGE_TOKEN + after_image), answer) for text, answer in turns)


def without_instruction(turns: Iterable[tuple[str, str | None]]) -> tuple[tuple[str, str | None], ...]:
    """Turns without LLaVA's words for a short answer, for templates that ask for one themselves."""
    return tuple((text.removesuffix(f"\n{SHORT_INSTRUCTION}"), answer) for text, answer in turns)


def _texts(ended: deque[tuple[EvaluationRequest, generation.GenerationHandle]]) -> Iterator[tuple[int | str, str]]:
    """Take the requests that have ended: (id, text). One that does not fit into the model's context (seven images of
    MMMU) has no answer, "", and is told. Raises DataError for one that failed otherwise."""
    while ended:
        request, handle = ended.popleft()
        if isinstance(handle.error, ContextError):
            logger.warning("question %s has no answer and counts as wrong: %s", request.id, handle.error)
            yield request.id, ""
            continue
        if handle.error is not None:
            raise DataError(f"question {request.id} cannot be answered: {handle.error}") from handle.error
        yield request.id, handle.result.text


def _adapters(vlm: LoadedVLM) -> dict[str, Any]:
    """What the weights of adapters do not show of them; empty without any."""
    blocks = {slot: part.lora for slot, part in vlm.spec.part_specs().items() if part.lora is not None}
    shown: dict[str, Any] = {}
    for slot, lora in blocks.items():
        patterns = {"rank_pattern": lora.rank_pattern, "alpha_pattern": lora.alpha_pattern}
        own = {"r": lora.r, "scale": LoraSpec(r=lora.r, alpha=lora.alpha, use_rslora=lora.use_rslora).scale_of("")}
        shown[slot] = own | {key: pattern for key, pattern in patterns.items() if pattern}
    return {"adapters": shown} if shown else {}


def _weights(vlm: LoadedVLM) -> dict[str, Any]:
    """Digest of the weights; of a model that is spread over ranks, of all its pieces, and how it is spread: sums are
    rounded otherwise there, so such answers are not mixed with others."""
    from megatron.core import parallel_state

    own = weights_digest(vlm.model)
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    if tensor * pipeline == 1:
        return {"weights": own}
    group = parallel_state.get_model_parallel_group()
    pieces = [None] * (tensor * pipeline)
    torch.distributed.all_gather_object(pieces, own, group=group)
    return {
        "weights": hashlib.sha256("".join(pieces).encode()).hexdigest(),
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
    }


def weights_digest(model: torch.nn.Module) -> str:
    """Name of the values of all parameters: equal values give equal names on every device and from every layout.

    Exact integer sums over the bit patterns (values, and values weighted by their position, modulo 2**64) stand for a
    tensor, because they can be formed on the device in any order; a full hash would copy the model to the host.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()]).flatten()
        plain = weighted = 0
        for start in range(0, bits.numel(), DIGEST_CHUNK):
            chunk = bits[start : start + DIGEST_CHUNK].to(torch.int64)
            positions = torch.arange(start + 1, start + 1 + chunk.numel(), device=chunk.device)
            plain += int(chunk.sum())
            weighted += int((chunk * positions).sum())
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(struct.pack("<QQ", plain % 2**64, weighted % 2**64))
    return digest.hexdigest()


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()
