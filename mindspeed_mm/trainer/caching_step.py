"""The training step with a feature cache: features from disk where they are, from the vision encoder where not, then
stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from mindspeed_mm.data.feature_cache import FeatureCache, fingerprint
from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.platform import Platform
from mindspeed_mm.trainer.step import LossFunction, forward_batch

WAITING_BATCHES = 4
"""Batches of features that may wait for the disk; then the training step waits, too."""
NOT_FEATURES = {"freeze", "ckpt_path", "fresh"}
"""Keys of the vision encoder's spec on which features do not depend; its weights are looked at themselves."""


def check_cachable(spec: ModelSpec, runtime: Runtime) -> None:
    """Raises ConfigError where features change from step to step, or ranks encode an image together."""
    if not spec.vision_encoder.freeze:
        raise ConfigError(
            "--feature-cache needs a vision encoder that is not trained: set vision_encoder.freeze to true"
        )
    if runtime.tensor_model_parallel_size > 1 or runtime.context_parallel_size > 1:
        raise ConfigError(
            f"--feature-cache works with data and pipeline parallelism; found tensor "
            f"{runtime.tensor_model_parallel_size} x context {runtime.context_parallel_size}, whose ranks encode "
            "images together: leave it out, or make both 1"
        )


def vision_encoder_fingerprint(
    vlm: VLM, processor: ImageProcessor, *, pad: bool, fast_resize: bool, platform: Platform, dtype: torch.dtype
) -> str:
    """Of the vision encoder that this rank holds, and of how its pixels are made. Reads all its weights."""
    spec = vlm.spec.vision_encoder.model_dump(mode="json", exclude=NOT_FEATURES)
    settings = {
        "tower": spec,  # the key under which existing caches were hashed
        "processor": processor.model_dump(mode="json"),
        "pad": pad,
        "fast_resize": fast_resize,
        "dtype": str(dtype),
        "device": platform.name,
    }
    return fingerprint(settings, vlm.image_encoder.encoder.named_parameters())


class CachingStep:
    """`training.step.forward_step` with a feature cache. Close it at the end: features may wait for the disk."""

    def __init__(self, cache: FeatureCache, device: torch.device) -> None:
        self._cache, self._device = cache, device
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feature cache")
        self._waiting: deque[Future[None]] = deque()

    def __call__(self, data_iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        """One micro-batch through the model; see training.step.forward_step."""
        batch = next(data_iterator)
        vlm: Any = model
        while hasattr(vlm, "module"):
            vlm = vlm.module
        features = self._features(batch, vlm) if vlm.pre_process and batch.cached is not None else None
        return forward_batch(batch, model, features)

    def _features(self, batch: Batch, vlm: VLM) -> torch.Tensor:
        """[N, P, Hv] of all images of a batch."""
        cached = batch.cached
        assert cached is not None
        stored = cached.features.to(self._device, non_blocking=True)
        if all(cached.known):
            return stored
        made = vlm.image_encoder.features(batch.pixel_values.to(self._device, non_blocking=True))
        self._store([key for key, known in zip(cached.keys, cached.known, strict=True) if not known], made)
        if not any(cached.known):
            return made
        # Images in reading order: each comes from the next row of one of the two.
        known = torch.tensor(cached.known)
        order = torch.where(known, known.cumsum(0) - 1, len(stored) + (~known).cumsum(0) - 1)
        return torch.cat((stored, made))[order.to(self._device, non_blocking=True)]

    def _store(self, keys: list[str], features: torch.Tensor) -> None:
        while self._waiting and (self._waiting[0].done() or len(self._waiting) == WAITING_BATCHES):
            self._waiting.popleft().result()
        self._waiting.append(self._writer.submit(self._write, keys, features.detach()))

    def _write(self, keys: list[str], features: torch.Tensor) -> None:
        """In the writer's thread: to the host and to the disk, beside the training step. A disk that takes no more is
        the cache's affair; anything else that goes wrong is raised where the step looks at it next."""
        for key, made in zip(keys, features.cpu(), strict=True):
            self._cache.write(key, made)

    def close(self) -> None:
        """Wait until everything is on the disk. Raises what the writer met."""
        self._writer.shutdown()
        while self._waiting:
            self._waiting.popleft().result()
