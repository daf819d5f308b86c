"""Rotary position embedding (RoPE, Su et al. 2021) with the scalings of Hugging Face's configs.

Legend: B batch, S sequence, R rotated channels of a head.
"""

from __future__ import annotations

import math

import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.platform.segments import BranchedSegments, Segments


def inverse_frequencies(channels: int, base: float, scaling: dict | None) -> torch.Tensor:
    """Rotation speed of each pair of channels, for scalings that do not depend on the length of a sequence.

    Args:
        channels: R, even.
        base: rope_theta.
        scaling: the config's rope_scaling (see decoder_spec.RopeScaling), or None. "linear" divides positions by
            `factor`; "llama3" (Llama 3.1) slows long wavelengths down by `factor`, with a smooth transition; "yarn"
            (Peng et al. 2023) does so by the number of rotations; "longrope" (Ding et al. 2024) has a factor for each
            pair, here the short ones; "dynamic" changes nothing up to the model's own length.

    Returns:
        [R/2] float32.
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    frequencies = 1.0 / base**exponents
    kind = None if scaling is None else scaling["rope_type"]
    if kind in (None, "dynamic"):
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    if kind == "yarn":
        return _yarn_frequencies(frequencies, base, scaling)
    if kind == "longrope":
        return 1.0 / (torch.tensor(scaling["short_factor"], dtype=torch.float32) * base**exponents)
    raise ValueError(f"rope_scaling type {kind!r} is not supported: expected dynamic, linear, llama3, longrope or yarn")


def _llama3_frequencies(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original_length = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original_length / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies


def _yarn_frequencies(frequencies: torch.Tensor, base: float, scaling: dict) -> torch.Tensor:
    """Pairs that rotate often stay, those that rotate rarely are slowed down, a ramp between."""
    pairs, length = len(frequencies), scaling["original_max_position_embeddings"]

    def pair_of(rotations: float) -> float:
        """The pair (a fraction) that makes so many rotations over the original length."""
        return pairs * math.log(length / (rotations * 2 * math.pi)) / math.log(base)

    low, high = pair_of(scaling.get("beta_fast") or 32.0), pair_of(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True) is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    span = high - low or 0.001
    slowed = ((torch.arange(pairs, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / scaling["factor"] * slowed + frequencies * (1 - slowed)


def attention_factor(scaling: dict | None, max_positions: int) -> float:
    """Factor on cosines and sines: that of the config, else the one that the method's paper proposes."""
    if scaling is None or scaling["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    given, original = scaling.get("attention_factor"), scaling["original_max_position_embeddings"]
    if given is not None:
        return given
    factor = scaling.get("factor") or max_positions / original
    if scaling["rope_type"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scale, scale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if scale and scale_all:
        return _yarn_scale(factor, scale) / _yarn_scale(factor, scale_all)
    return _yarn_scale(factor, 1.0)


def _yarn_scale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


class RotaryEmbedding:
    """Cosines and sines of explicit positions. No parameters, no buffers: casting a model never rounds it."""

    def __init__(
        self,
        channels: int,
        base: float,
        scaling: dict | None,
        *,
        max_positions: int,
        sections: tuple[int, ...] | None = None,
    ) -> None:
        """`channels` is R. `sections` are the pairs of channels that turn by time, height and width (Qwen2-VL's
        mrope_section), R/2 together; None: positions have one number each."""
        self._scaling, self._max_positions = scaling, max_positions
        self._frequencies = inverse_frequencies(channels, base, scaling)
        self._long = None
        if scaling is not None and scaling["rope_type"] == "longrope":
            self._long = inverse_frequencies(channels, base, scaling | {"short_factor": scaling["long_factor"]})
        self._factor = attention_factor(scaling, max_positions)
        self._sections = sections
        self._axes = None
        if sections is not None:
            self._axes = torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections))

    @property
    def longest(self) -> int | None:
        """Positions of a sequence up to which its rotation does not depend on its length; None: any number. Beyond, a
        key in a cache would have to be rotated anew as its sequence grows."""
        if self._long is not None:
            return self._scaling["original_max_position_embeddings"]
        return self._max_positions if self._scaling and self._scaling["rope_type"] == "dynamic" else None

    def long_positions(self, length: int, segments: Segments | None) -> torch.Tensor | bool:
        """Which positions of a row of `length` belong to a sequence of more than `longest`: all or none, or bool [S]
        for segments.

        Raises DataError where the scaling is "dynamic": transformers' numbers depend on what came before then.
        """
        limit = self.longest
        if limit is None or (length if segments is None else segments.longest) <= limit:
            return False
        if self._long is None:
            raise DataError(
                f"a sequence has more than {limit} positions, from where on the model's rope_scaling dynamic would "
                "change the rotation with every token: shorten it to max_position_embeddings, or use rope_scaling "
                "linear or yarn"
            )
        if segments is None:
            return True
        if isinstance(segments, BranchedSegments):
            raise DataError(
                f"a pair has an answer that ends beyond position {limit}, from where on the model's rope_scaling "
                "longrope rotates the shared prompt in another way than before: shorten its answers or its prompt"
            )
        ends = (0, *segments.ends)
        lengths = [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]
        return torch.tensor([size > limit for size in lengths]).repeat_interleave(torch.tensor(lengths))

    def cos_sin(
        self, position_ids: torch.Tensor, dtype: torch.dtype, long: torch.Tensor | bool = False
    ) -> torch.Tensor:
        """What `Platform.rotate_qk` rotates by, computed once for all layers.

        Args:
            position_ids: [B, S] int64; B may be 1 where all rows have the same positions; [3, B, S] for time, height
                and width.
            long: what `long_positions` said of these positions.

        Returns:
            [2, S, B, 1, 1, R / 2]: cosines and sines, computed in float32 and cast to `dtype`.
        """
        frequencies = self._frequencies_on(position_ids.device)
        if long is not False:
            frequencies = self._chosen(long, position_ids.device)
        if position_ids.dim() == 3:
            turns = position_ids.float()[self._axes.to(position_ids.device)].permute(2, 1, 0)[:, :, None, None]
        else:
            turns = position_ids.t().float()[:, :, None, None, None]
        angles = turns * frequencies
        tables = torch.stack((angles.cos(), angles.sin()))
        return (tables if self._factor == 1.0 else tables * self._factor).to(dtype)

    def _chosen(self, long: torch.Tensor | bool, device: torch.device) -> torch.Tensor:
        """The frequencies of long sequences, or for each position one set or the other, [S, 1, 1, 1, R/2]."""
        slow = self._long.to(device)
        if long is True:
            return slow
        return torch.where(long.to(device)[:, None, None, None, None], slow, self._frequencies_on(device))

    def _frequencies_on(self, device: torch.device) -> torch.Tensor:
        if self._frequencies.device != device:
            self._frequencies = self._frequencies.to(device)
        return self._frequencies
