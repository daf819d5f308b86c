"""Do the weights fit the model config? Told from their headers, before anything is built. Needs no megatron.core."""

from __future__ import annotations

from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.weights.loading import check_part
from mindspeed_mm.weights.sources import Source


def check_weights(spec: ModelSpec) -> None:
    """Compare the weights that each part's ckpt_path names with its spec: names, shapes, types, the config beside them.

    No value is read, so that this takes a second or so for models of any size.

    Raises:
        WeightError: as models/build.build_vlm, but for what only values show.
    """
    opened: dict[str, Source] = {}
    for kind, part in spec.parts().items():
        path = spec.part(kind).ckpt_path
        if path is not None and path not in opened:
            opened[path] = open_source(path, adapters=spec.adapter_files)
        check_part(part, spec.part(kind), None if path is None else opened[path])
