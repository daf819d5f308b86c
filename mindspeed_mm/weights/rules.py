"""Weight rules: one declaration per tensor of ours gives both directions of a conversion and the parallel split.

A rule names one of OUR tensors and the source tensors that it is made of. `{}` in a name is the layer number,
`{layer+1}` the next one, `{2*layer}` twice the number. `axis` is the axis of our tensor that tensor parallelism splits;
None means replicated.
Functions here are pure and know nothing of files or of process groups.

Letters in shapes: G query groups, R = heads / G query heads per group, D channels per head, H hidden size, F MLP size.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.rule_names import fill, is_layered, mismatch


@dataclass(frozen=True)
class Geometry:
    """What the rules need to know of a part.

    `num_layers` counts the layers that exist on our side; layers from there up to `source_layers` may be in a source
    and are known to be unused (a CLIP vision encoder whose features are taken before its last layer).
    """

    num_layers: int
    num_attention_heads: int = 1
    num_query_groups: int = 1
    kv_channels: int = 1
    vocab_size: int | None = None
    source_layers: int | None = None
    qkv_bias: bool = False
    linear_bias: bool = True
    tied: bool = False
    image_newline: bool = False
    cross_stride: tuple[int, int] | None = None

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_query_groups

    def local(self, tp_size: int) -> "Geometry":
        """The heads and groups that one of `tp_size` tensor-parallel ranks holds (they divide)."""
        heads, groups = self.num_attention_heads // tp_size, self.num_query_groups // tp_size
        return replace(self, num_attention_heads=heads, num_query_groups=groups)


@dataclass(frozen=True)
class Rule:
    """Our tensor is the one source tensor, unchanged.

    `needs` names a boolean of Geometry without which neither side has the tensor. `unused` marks a tensor that public
    layouts hold and our module never builds: loading drops it, conversions carry it; `shape_like` names a tensor of
    ours with its shape, for an export of a source that has none. `layer_stride` (first, step), or the name of a
    field of Geometry that holds it, says which layers a rule with a layer number describes.
    """

    target: str
    sources: tuple[str, ...]
    axis: int | None = None
    needs: str | None = None
    unused: bool = False
    shape_like: str | None = None
    layer_stride: tuple[int, int] | str = (0, 1)

    def to_ours(self, tensors: list[Tensor], geometry: Geometry) -> Tensor:
        """Merge the source tensors (in the order of `sources`) into ours."""
        return tensors[0]

    def to_theirs(self, tensor: Tensor, geometry: Geometry) -> list[Tensor]:
        """Split our tensor into the source tensors (in the order of `sources`)."""
        return [tensor]

    def blocks(self, geometry: Geometry) -> int:
        """Number of equal blocks along `axis` that are each split over the tensor-parallel ranks."""
        return 1

    def units(self, geometry: Geometry) -> int | None:
        """Number of indivisible units along `axis`, or None where every row is one."""
        return None

    def source_blocks(self, size: int, geometry: Geometry) -> list[int]:
        """Sizes of the blocks along `axis` of a source tensor of `size` that are each split over the ranks.

        What `to_ours` makes of a rank's shares, with the geometry local to a rank, is the rank's slice of our tensor.
        """
        return [size]

    @property
    def padded(self) -> bool:
        """Whether rows of zeros may follow the real ones, so that the ranks get equal shares."""
        return False


@dataclass(frozen=True)
class Vocab(Rule):
    """One row per token. Under tensor parallelism the rows are padded with zeros to a multiple of the ranks."""

    @property
    def padded(self) -> bool:
        return True


@dataclass(frozen=True)
class Own(Rule):
    """Our own tensor under its own name, split over the ranks as `like` says."""

    like: Rule | None = None

    def blocks(self, geometry: Geometry) -> int:
        return self.like.blocks(geometry)

    def units(self, geometry: Geometry) -> int | None:
        return self.like.units(geometry)

    def source_blocks(self, size: int, geometry: Geometry) -> list[int]:
        count = self.blocks(geometry)
        return [size // count] * count

    @property
    def padded(self) -> bool:
        return self.like.padded

    def regroup(self, tensor: Tensor, stored: Geometry, geometry: Geometry) -> Tensor:
        """Our tensor that was merged for the heads of `stored`, merged for those of `geometry` instead."""
        if isinstance(self.like, QKV):
            return self.like.to_ours(self.like.to_theirs(tensor, stored), geometry)
        return tensor


@dataclass(frozen=True)
class QKV(Rule):
    """Q [G*R*D, ...], K [G*D, ...], V [G*D, ...] merged group by group: the group's Q rows, its K rows, its V rows.

    Megatron-core's order of `linear_qkv`. Works on weights and biases.
    """

    def to_ours(self, tensors: list[Tensor], geometry: Geometry) -> Tensor:
        rows = self._rows(geometry)
        for name, tensor, count in zip(("query", "key", "value"), tensors, rows, strict=True):
            _check_rows(self.target, name, tensor, geometry.num_query_groups * count, geometry)
        grouped = [
            tensor.reshape(geometry.num_query_groups, count, *tensor.shape[1:])
            for tensor, count in zip(tensors, rows, strict=True)
        ]
        return _cat(self.target, grouped, dim=1).flatten(0, 1)

    def to_theirs(self, tensor: Tensor, geometry: Geometry) -> list[Tensor]:
        rows = self._rows(geometry)
        _check_rows(self.target, "merged", tensor, geometry.num_query_groups * sum(rows), geometry)
        grouped = tensor.reshape(geometry.num_query_groups, sum(rows), *tensor.shape[1:])
        return [piece.flatten(0, 1) for piece in grouped.split(rows, dim=1)]

    def units(self, geometry: Geometry) -> int:
        return geometry.num_query_groups

    @staticmethod
    def _rows(geometry: Geometry) -> list[int]:
        """Rows of Q, K and V in one query group."""
        channels = geometry.kv_channels
        return [geometry.heads_per_group * channels, channels, channels]


@dataclass(frozen=True)
class PackedQKV(QKV):
    """One source tensor with all Q, then all K, then all V rows (torch's MultiheadAttention `in_proj`)."""

    def to_ours(self, tensors: list[Tensor], geometry: Geometry) -> Tensor:
        rows = [geometry.num_query_groups * count for count in self._rows(geometry)]
        _check_rows(self.target, "packed", tensors[0], sum(rows), geometry)
        return super().to_ours(list(tensors[0].split(rows)), geometry)

    def to_theirs(self, tensor: Tensor, geometry: Geometry) -> list[Tensor]:
        return [_cat(self.target, super().to_theirs(tensor, geometry))]

    def source_blocks(self, size: int, geometry: Geometry) -> list[int]:
        return [geometry.num_query_groups * count for count in self._rows(geometry)]


@dataclass(frozen=True)
class GateUp(Rule):
    """Gate [F, H] then up [F, H] stacked on rows; each tensor-parallel rank holds its share of both, gate first."""

    def to_ours(self, tensors: list[Tensor], geometry: Geometry) -> Tensor:
        gate, up = tensors
        if gate.shape != up.shape:
            raise WeightError(
                f"{self.target}: the gate has shape {list(gate.shape)} and the up projection {list(up.shape)}; "
                "expected equal shapes. The source is damaged or is not a gated MLP."
            )
        return _cat(self.target, [gate, up])

    def to_theirs(self, tensor: Tensor, geometry: Geometry) -> list[Tensor]:
        return list(tensor.chunk(2))

    def blocks(self, geometry: Geometry) -> int:
        return 2


@dataclass(frozen=True)
class Halves(Rule):
    """One source tensor of two halves of rows (gate and up, keys and values), as ours is; the ranks share out both."""

    def blocks(self, geometry: Geometry) -> int:
        return 2

    def source_blocks(self, size: int, geometry: Geometry) -> list[int]:
        return [size // 2] * 2


@dataclass(frozen=True)
class Reshape(Rule):
    """The same values in another shape; -1 in `ours` or `theirs` stands for the size that fits."""

    ours: tuple[int, ...] = ()
    theirs: tuple[int, ...] = ()

    def to_ours(self, tensors: list[Tensor], geometry: Geometry) -> Tensor:
        return tensors[0].reshape(self.ours)

    def to_theirs(self, tensor: Tensor, geometry: Geometry) -> list[Tensor]:
        return [tensor.reshape(self.theirs)]


@dataclass(frozen=True)
class Drop:
    """A source tensor that is known and holds nothing we use. `*` matches anything, `{}` a layer number."""

    pattern: str

    def matches(self, name: str) -> bool:
        parts = re.split(r"(\{\}|\*)", self.pattern)
        regex = "".join({"{}": "[0-9]+", "*": ".*"}.get(part, re.escape(part)) for part in parts)
        return re.fullmatch(regex, name) is not None


@dataclass(frozen=True)
class Step:
    """One tensor to make: our full name, the source names it needs, and the rule that joins them."""

    target: str
    sources: tuple[str, ...]
    rule: Rule
    unused: bool


@dataclass(frozen=True)
class Match:
    """The source names that a geometry uses, each exactly once, and those that are known and dropped."""

    steps: tuple[Step, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class RuleSet:
    """All rules of one part for one dialect.

    `tied` = (the tensor that is absent when tied, the tensor it repeats), in our names.
    """

    rules: tuple[Rule | Drop, ...]
    tied: tuple[str, str] | None = None

    def own(self) -> "RuleSet":
        """The rules of the dialect "ours": each of our tensors under its own name, split as here."""
        rules = [rule for rule in self.rules if isinstance(rule, Rule) and not rule.unused]
        return RuleSet(
            tuple(
                Own(rule.target, (rule.target,), rule.axis, rule.needs, layer_stride=rule.layer_stride, like=rule)
                for rule in rules
            ),
            self.tied,
        )

    def steps(self, geometry: Geometry) -> list[Step]:
        """Every step of the geometry in declaration order, the unused layers and tensors included and marked."""
        source_layers = max(geometry.num_layers, geometry.source_layers or 0)
        steps = []
        for rule in self._active(geometry):
            stride = rule.layer_stride
            first, step = getattr(geometry, stride) if isinstance(stride, str) else stride
            for layer in range(first, source_layers, step) if is_layered(rule.target) else (None,):
                unused = rule.unused or (layer is not None and layer >= geometry.num_layers)
                steps.append(Step(fill(rule.target, layer), tuple(fill(n, layer) for n in rule.sources), rule, unused))
        return steps

    def expected(self, geometry: Geometry) -> list[str]:
        """Names of all our tensors, without the unused ones."""
        return [step.target for step in self.steps(geometry) if not step.unused]

    def match(self, names: Iterable[str], geometry: Geometry, *, where: str = "source") -> Match:
        """Assign every source name to exactly one step or drop.

        Unused tensors may be absent. Raises WeightError that lists missing names and unknown names with the nearest
        missing one.
        """
        names = set(names)
        steps = self.steps(geometry)
        used, missing, taken = [], [], set()
        for step in steps:
            absent = [name for name in step.sources if name not in names]
            if not absent:
                used.append(step)
            elif not step.unused or len(absent) < len(step.sources):
                missing += absent
            taken.update(step.sources)
        drops = [rule for rule in self.rules if isinstance(rule, Drop)] + self._tied_drops(geometry)
        left = sorted(names - taken)
        dropped = [name for name in left if any(drop.matches(name) for drop in drops)]
        unknown = [name for name in left if name not in set(dropped)]
        if missing or unknown:
            raise WeightError(mismatch(where, missing, unknown, self._hints(missing, unknown)))
        return Match(tuple(used), tuple(dropped))

    def import_(self, names: Iterable[str], get: Callable[[str], Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """Read a whole part in our names. Unused tensors that the source has are carried along."""
        steps = self.match(names, geometry).steps
        return {step.target: step.rule.to_ours([get(name) for name in step.sources], geometry) for step in steps}

    def export(self, state: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """Write a whole part in the dialect's names. Unused tensors are written where `state` has them."""
        steps = self.steps(geometry)
        missing = [step.target for step in steps if step.target not in state and not step.unused]
        unknown = sorted(set(state) - {step.target for step in steps})
        if missing or unknown:
            raise WeightError(mismatch("state to export", missing, unknown))
        result: dict[str, Tensor] = {}
        for step in steps:
            if step.target in state:
                tensors = step.rule.to_theirs(state[step.target], geometry)
                result.update(zip(step.sources, tensors, strict=True))
        return result

    def step_of(self, target: str, geometry: Geometry) -> Step | None:
        """The step that makes our tensor `target`, or None."""
        return next((step for step in self.steps(geometry) if step.target == target), None)

    def _active(self, geometry: Geometry) -> list[Rule]:
        rules = [rule for rule in self.rules if isinstance(rule, Rule)]
        if geometry.tied and self.tied:
            rules = [rule for rule in rules if rule.target != self.tied[0]]
        return [rule for rule in rules if rule.needs is None or getattr(geometry, rule.needs)]

    def tied_sources(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """Source names of the two tied tensors: (the repeated one, the one it repeats)."""
        if self.tied is None:
            return None
        by_target = {rule.target: rule.sources for rule in self.rules if isinstance(rule, Rule)}
        return by_target[self.tied[0]], by_target[self.tied[1]]

    def _tied_drops(self, geometry: Geometry) -> list[Drop]:
        """A tied source may still store the repeated tensor."""
        sources = self.tied_sources()
        return [Drop(name) for name in sources[0]] if geometry.tied and sources else []

    def _hints(self, missing: list[str], unknown: list[str]) -> list[str]:
        hints = []
        sources = self.tied_sources()
        if sources and set(missing) == set(sources[0]) and not unknown:
            hints.append(
                f"The source has no {sources[0][0]}, so its head is tied: "
                'set "tie_word_embeddings": true in its config.json, or, where a model.json describes the model, '
                '"share_embeddings_and_output_weights": true there.'
            )
        if any("lora_" in name for name in unknown):
            hints.append("The source holds LoRA adapters; merge them into the full weights first.")
        return hints


def _cat(target: str, tensors: list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat. Shapes alone (meta tensors) are joined here: torch would import its compiler, which takes seconds."""
    others = {(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}
    if len(others) > 1:
        raise WeightError(
            f"{target}: its sources have shapes {', '.join(str(list(tensor.shape)) for tensor in tensors)}; expected "
            "equal ones but for the joined axis. The source is damaged."
        )
    if not tensors[0].is_meta:
        return torch.cat(tensors, dim=dim)
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.empty(shape, dtype=tensors[0].dtype, device="meta")


def _check_rows(target: str, what: str, tensor: Tensor, rows: int, geometry: Geometry) -> None:
    if tensor.dim() == 0 or tensor.shape[0] != rows:
        raise WeightError(
            f"{target}: the {what} tensor has shape {list(tensor.shape)}; expected {rows} rows for "
            f"{geometry.num_attention_heads} heads in {geometry.num_query_groups} query groups of "
            f"{geometry.kv_channels} channels. Correct num_attention_heads, num_query_groups or kv_channels in "
            "model.json (num_key_value_heads and head_dim in a config.json)."
        )
