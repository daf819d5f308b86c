"""A loaded model as the engine of an evaluation, and what identifies its answers."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from evaluation.engine import GenerationRequest
from mindspeed_mm.generation import engine as generation
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.loaded import LoadedVLM

PROBE = "A chat. USER:  <x>\nWhat is 12.50 + 007? \u732b \u00e9 (A) B. ASSISTANT: None</s>"
"""Text whose ids tell tokenizers apart: spaces, digits, letters outside ASCII, special tokens."""

DIGEST_CHUNK = 2**24
"""Values hashed at a time, to bound the memory for their 64-bit copies."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ModelEngine:
    """An evaluation.engine.Engine that asks a LoadedVLM; one batch of the runner is one batch of the model."""

    def __init__(self, vlm: LoadedVLM, options: GenerationOptions, template: str | None = None):
        self._engine, self._options = vlm.engine(template), options
        self._facts = {
            "weights": weights_digest(vlm.model),
            "dtype": str(next(vlm.model.parameters()).dtype).removeprefix("torch."),
            "tokenizer": _digest(vlm.tokenizer.encode(PROBE)),
            "image_processor": vlm.image_processor.model_dump(mode="json"),
            "pad_to_square": vlm.pad,
            "template": template or vlm.template,
            "decoding": options.model_dump(mode="json") | {"method": "greedy" if options.greedy else "sampling"},
        }

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int | str, str]]:
        """Answer one batch: (id, text) in the order of the requests. Raises DataError for pictures it cannot use."""
        asked = [
            generation.GenerationRequest(str(request.id), request.turns or (), request.text, request.images)
            for request in requests
        ]
        results = self._engine.generate(asked, self._options, batch_size=len(asked))
        for request, result in zip(requests, results, strict=True):
            yield request.id, result.text

    def describe(self) -> dict[str, Any]:
        """Weights by their contents (not their path), tokenizer, preprocessing, template and decoding."""
        return self._facts


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
