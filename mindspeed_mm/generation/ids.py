"""Continue prompts that are ids already, as transformers' generate does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.beam import BeamJob
from mindspeed_mm.generation.decode import Decoder
from mindspeed_mm.generation.images import ImageFeatures
from mindspeed_mm.generation.jobs import SampleJob
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.generation.scheduler import Entry, Scheduler
from mindspeed_mm.generation.text import TextStream


def continue_ids(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Any],
    options: GenerationOptions,
    *,
    image_features: ImageFeatures,
    stop_ids: Sequence[int],
    tokenizer: Tokenizer | None = None,
    image_token_id: int | None = None,
    batch_size: int | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Args:
        prompts: B id lists of any lengths, IMAGE_TOKEN_INDEX at every image position (expanded).
        images: of all prompts, in reading order.
        tokenizer: needed for stop strings only.
        image_token_id: stands for image positions in the rules that look back at the prompt.
        batch_size: sequences that run together; None: all.

    Returns:
        B * num_return_sequences lists of new ids, each ending with its stop id when one was generated.

    Raises:
        ConfigError: an empty prompt, one that exceeds the model's context with max_new_tokens, or stop strings
            without a tokenizer.
        DataError: an image cannot be used.
    """
    if options.stops and tokenizer is None:
        raise ConfigError("stop_strings need a tokenizer, and the model came with none: load it with tokenizer=FOLDER")
    for prompt in prompts:
        decoder.check_length(len(prompt), options.max_new_tokens)
    count = options.num_return_sequences
    scheduler = Scheduler(decoder, image_features, batch_size or len(prompts) * max(count, options.num_beams))
    size, first = decoder.tokens_per_image, 0
    entries, errors = [], []
    for prompt in prompts:
        history = [image_token_id if token == IMAGE_TOKEN_INDEX else token for token in prompt]
        history = [token for token in history if token is not None]
        own = images[first : first + list(prompt).count(IMAGE_TOKEN_INDEX) // size]
        first += len(own)
        streams = [TextStream(tokenizer, options.stops) for _ in range(count)] if options.stops else None
        if options.num_beams > 1:
            job = BeamJob(history, options, stop_ids, streams[0] if streams else None)
        else:
            job = SampleJob(history, options, stop_ids, streams)
        length = len(prompt) + options.max_new_tokens
        entries.append(Entry(job, prompt, length, own, errors.append))
        scheduler.submit(entries[-1])
    while scheduler.busy:
        scheduler.step()
        _raise_first(errors)
    return [list(sequence.token_ids) for entry in entries for sequence in entry.job.sequences]


def _raise_first(errors: Sequence[DataError | None]) -> None:
    error = next((error for error in errors if error is not None), None)
    if error is not None:
        raise error
