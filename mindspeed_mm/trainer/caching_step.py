"""The training step with a feature cache: features from disk where they are, from the vision encoder where not, then
stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from mindspeed_mm.data.feature_cache import FeatureCache, fingerprint
from mindspeed_mm.data.media import MediaProcessor
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.media import Features, Media
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.objectives import LossFunction, Objective
from mindspeed_mm.platform import Platform

WAITING_BATCHES = 4
"""Batches of features that may wait for the disk; then the training step waits, too."""
NOT_FEATURES = {"freeze", "lora", "ckpt_path", "fresh"}
"""Keys of the vision encoder's spec on which features do not depend; its weights are looked at themselves."""


def check_cachable(spec: ModelSpec, runtime: Runtime, media: MediaProcessor) -> None:
    """Raises ConfigError where features change from step to step or differ in number, or ranks encode an image
    together."""
    if media.fixed is None:
        raise ConfigError(
            f"--feature-cache works with images that all have the same number of features; those of model_id "
            f"{spec.model_id} depend on their size: leave it out"
        )
    if media.reads_instructions:
        raise ConfigError(
            f"--feature-cache does not know the question about an image, which the projector of model_id "
            f"{spec.model_id} reads: leave it out"
        )
    if spec.vision_encoder.trains:  # nor has it adapters, which go with a part that is not frozen
        raise ConfigError(
            "--feature-cache needs a vision encoder that is not trained: set vision_encoder.freeze to true"
        )
    if runtime.tensor_model_parallel_size > 1 or runtime.context_parallel_size > 1:
        raise ConfigError(
            f"--feature-cache works with data and pipeline parallelism; found tensor "
            f"{runtime.tensor_model_parallel_size} x context {runtime.context_parallel_size}, whose ranks encode "
            "images together: leave it out, or make both 1"
        )


def vision_encoder_fingerprint(vlm: VLM, media: MediaProcessor, *, platform: Platform, dtype: torch.dtype) -> str:
    """Of the vision encoder that this rank holds, and of how its pixels are made. Reads all its weights."""
    spec = vlm.spec.vision_encoder.model_dump(mode="json", exclude=NOT_FEATURES)
    settings = {"vision_encoder": spec, "media": media.settings, "dtype": str(dtype), "device": platform.name}
    return fingerprint(settings, vlm.image_encoder.encoder.named_parameters())


class CachingStep:
    """An objective's `forward_step` with a feature cache. Close it at the end: features may wait for the disk."""

    def __init__(self, cache: FeatureCache, device: torch.device, objective: Objective) -> None:
        self._cache, self._device, self._objective = cache, device, objective
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feature cache")
        self._waiting: deque[Future[None]] = deque()

    def __call__(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        """One micro-batch through the model; see Objective.forward_step."""
        batch = next(data_iterator)
        vlm: Any = model
        while hasattr(vlm, "module"):
            vlm = vlm.module
        features = self._features(batch, vlm) if vlm.pre_process and batch.cached is not None else None
        return self._objective.forward(batch, model, features)

    def _features(self, batch: Batch, vlm: VLM) -> Features:
        """Of all images of a batch; each has the same number of them."""
        cached = batch.cached
        assert cached is not None
        images = len(cached.keys)
        stored = cached.features.to(self._device, non_blocking=True)
        if batch.media is not None:
            made = vlm.image_encoder.features(batch.media.to(self._device))
            per_image = made.counts[0]
            self._store([key for key, known in zip(cached.keys, cached.known, strict=True) if not known], made)
            stored = _in_reading_order(stored, made.values, torch.tensor(cached.known), per_image)
        counts = (len(stored) // images,) * images
        return Features(stored, counts, Media.of_images(stored.new_empty(images, 0)))

    def _store(self, keys: list[str], features: Features) -> None:
        while self._waiting and (self._waiting[0].done() or len(self._waiting) == WAITING_BATCHES):
            self._waiting.popleft().result()
        values = features.values.detach().split(features.counts)
        self._waiting.append(self._writer.submit(self._write, keys, values))

    def _write(self, keys: list[str], features: Sequence[torch.Tensor]) -> None:
        """In the writer's thread: to the host and to the disk, beside the training step. A disk that takes no more is
        the cache's affair; anything else that goes wrong is raised where the step looks at it next."""
        for key, made in zip(keys, features, strict=True):
            self._cache.write(key, made.cpu())

    def close(self) -> None:
        """Wait until everything is on the disk. Raises what the writer met."""
        self._writer.shutdown()
        while self._waiting:
            self._waiting.popleft().result()


def _in_reading_order(stored: torch.Tensor, made: torch.Tensor, known: torch.Tensor, per_image: int) -> torch.Tensor:
    """[F, Hv] of all images: each comes from the next `per_image` features of one of the two."""
    if not len(stored):
        return made
    first = torch.where(known, known.cumsum(0) - 1, len(stored) // per_image + (~known).cumsum(0) - 1)
    order = (first[:, None] * per_image + torch.arange(per_image)).flatten()
    return torch.cat((stored, made))[order.to(made.device, non_blocking=True)]
