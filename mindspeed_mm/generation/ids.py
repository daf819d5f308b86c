"""Continue prompts that are ids already, as transformers' generate does."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.beam import BeamJob
from mindspeed_mm.generation.decode import Decoder
from mindspeed_mm.generation.images import FoundImage, ImageFeatures
from mindspeed_mm.generation.jobs import SampleJob
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.generation.prompts import prompt_positions, with_image_ids
from mindspeed_mm.generation.rules import PrefixAllowedTokens, bound, check_ids
from mindspeed_mm.generation.scheduler import Entry, Scheduler
from mindspeed_mm.generation.text import TextStream


def continue_ids(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    images: Sequence[FoundImage],
    options: GenerationOptions,
    *,
    image_features: ImageFeatures,
    stop_ids: Sequence[int],
    tokenizer: Tokenizer | None = None,
    image_token_id: int | None = None,
    batch_size: int | None = None,
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Args:
        prompts: B id lists of any lengths, IMAGE_TOKEN_INDEX at every image position (expanded).
        images: of all prompts, in reading order, as `ImageFeatures.find` gives them.
        tokenizer: needed for stop strings only.
        image_token_id: stands for image positions in the rules that look back at the prompt.
        batch_size: sequences that run together; None: all.
        prefix_allowed_tokens_fn: gives the tokens that may follow the ids of prompt number i, as transformers' does.

    Returns:
        B * num_return_sequences lists of new ids, each ending with its stop id when one was generated.

    Raises:
        ConfigError: an empty prompt, one that exceeds the model's context with max_new_tokens, or stop strings
            without a tokenizer.
        DataError: an image cannot be used, or the options leave no token.
    """
    if options.stops and tokenizer is None:
        raise ConfigError(
            "stop_strings need a tokenizer, and the model came with none: give --tokenizer FOLDER (tokenizer=)"
        )
    check_ids(options, decoder.vlm.spec.text_decoder.language_vocab_size)
    for prompt in prompts:
        decoder.check_length(len(prompt), options.max_new_tokens)
    count = options.num_return_sequences
    scheduler = Scheduler(decoder, image_features, batch_size or len(prompts) * max(count, options.num_beams))
    following = list(images)
    entries, errors = [], []
    for index, prompt in enumerate(prompts):
        history, allowed = with_image_ids(prompt, image_token_id), bound(prefix_allowed_tokens_fn, index)
        own = take_images(prompt, following)
        streams = [TextStream(tokenizer, options.stops) for _ in range(count)] if options.stops else None
        if options.num_beams > 1:
            job = BeamJob(history, options, stop_ids, streams[0] if streams else None, allowed)
        else:
            job = SampleJob(history, options, stop_ids, streams, allowed=allowed)
        length = len(prompt) + options.max_new_tokens
        positions = prompt_positions(decoder.vlm.spec, prompt, [image.plan for image in own])
        entries.append(Entry(job, prompt, length, own, errors.append, positions=positions))
        scheduler.submit(entries[-1])
    while scheduler.busy:
        scheduler.step()
        _raise_first(errors)
    return [list(sequence.token_ids) for entry in entries for sequence in entry.job.sequences]


def take_images(prompt: Sequence[int], following: list[FoundImage]) -> list[FoundImage]:
    """Take the images of an expanded prompt off the front of those that follow. Raises ConfigError where an image is
    cut in two."""
    left, own = list(prompt).count(IMAGE_TOKEN_INDEX), []
    while left and following:
        own.append(following.pop(0))
        left -= own[-1].plan.count
    if left:
        raise ConfigError(
            "input_ids hold another number of image positions than their images have features: expand each image by "
            "its own number"
        )
    return own


def _raise_first(errors: Sequence[DataError | None]) -> None:
    error = next((error for error in errors if error is not None), None)
    if error is not None:
        raise error
