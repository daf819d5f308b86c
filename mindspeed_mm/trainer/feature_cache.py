"""--feature-cache of `train`: finds room, names the cache after the vision encoder, and swaps in the step that uses
it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron.driver.collectives import gather
from megatron.driver.initialize import is_rank_0
from megatron.driver.state import TrainState
from mindspeed_mm.data.feature_cache import FeatureCache, used_bytes
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.vlm import VLM
from mindspeed_mm.platform.base import local_rank
from mindspeed_mm.trainer.caching_step import CachingStep, check_cachable, vision_encoder_fingerprint
from mindspeed_mm.trainer.inputs import RunInputs

logger = logging.getLogger(__name__)

DEFAULT_BYTES = 50e9


class CacheOptions(NamedTuple):
    """What the command line says."""

    folder: Path
    limit: float
    """Bytes of all files in the folder."""


def options_of(namespace: argparse.Namespace) -> CacheOptions | None:
    """From the flags. Raises ConfigError for a size without a folder, or a folder that is a file."""
    if namespace.feature_cache is None:
        if namespace.feature_cache_size is not None:
            raise ConfigError("--feature-cache-size is given without --feature-cache: name the folder too")
        return None
    folder = Path(namespace.feature_cache)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--feature-cache {folder} is not a folder: name one, or a path that does not exist yet")
    limit = DEFAULT_BYTES if namespace.feature_cache_size is None else namespace.feature_cache_size
    return CacheOptions(folder, limit)


@contextlib.contextmanager
def forward_steps(inputs: RunInputs, state: TrainState, options: CacheOptions | None) -> Iterator[Callable]:
    """The forward step of a run, with the cache where one is asked for. Collective.

    Raises:
        ConfigError: the model or the layout goes with no cache.
    """
    if options is None:
        yield inputs.objective.forward_step
        return
    if inputs.objective.reference:
        raise ConfigError(
            f"--feature-cache does not go with the objective {inputs.objective.name}, whose passes share the features "
            "of a step already: leave it out"
        )
    check_cachable(inputs.spec, inputs.runtime, inputs.media)
    used = {host: size for host, size in gather((socket.gethostname(), _used(options.folder))) if size is not None}
    room = max(0.0, options.limit - max(used.values()))
    if is_rank_0():
        logger.info(
            "feature cache %s: %.2f GB of %.2f GB used", options.folder, max(used.values()) / 1e9, options.limit / 1e9
        )
    vision_encoders = [
        module for module in state.modules if isinstance(module, VLM) and module.image_encoder is not None
    ]
    if not vision_encoders:  # a later pipeline stage: it needs no images
        yield inputs.objective.forward_step
        return
    dtype = inputs.runtime.params_dtype
    name = vision_encoder_fingerprint(vision_encoders[0], inputs.media, platform=inputs.platform, dtype=dtype)
    shape = (inputs.media.fixed.count, inputs.spec.vision_encoder.feature_size)
    cache = FeatureCache(options.folder, name, shape, dtype, room / state.data_parallel_size)
    inputs.dataset.feature_cache = cache
    with contextlib.closing(CachingStep(cache, inputs.platform.device(), inputs.objective)) as step:
        yield step


def _used(folder: Path) -> int | None:
    """Bytes in the folder, asked by one rank of each host."""
    return used_bytes(folder) if local_rank() == 0 else None
