"""Which part reads a config.json, by the model_type that Hugging Face gave it."""

import difflib
import functools

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.part import Part
from mindspeed_mm.registry import available, find


@functools.lru_cache
def model_types(kind: str) -> dict[str, Part]:
    """The parts of one kind (text_decoder, vision_encoder) by each model_type that they read.

    Raises ConfigError where two parts claim one.
    """
    package, found = f"mindspeed_mm.models.{kind}", {}
    for name in available(package):
        part = find(package, name, "PART")
        for model_type in part.model_types:
            if model_type in found:
                raise ConfigError(
                    f'{kind}: both {found[model_type].name} and {name} read model_type "{model_type}"; keep it in one'
                )
            found[model_type] = part
    return found


def part_for_model_type(kind: str, model_type: str) -> Part:
    """The part that reads configs of a model_type. Raises ConfigError for one that no part reads, with the nearest."""
    known = model_types(kind)
    if model_type in known:
        return known[model_type]
    close = difflib.get_close_matches(model_type, known, n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(close)}" if close else f"known are {', '.join(sorted(known))}"
    raise ConfigError(
        f'no {kind} here reads model_type "{model_type}"; {hint}. Use weights of one of these; a {kind} of another '
        f"architecture would be a new file of mindspeed_mm/models/{kind}"
    )
