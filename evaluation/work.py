"""In which order questions are asked, and which copy of the model asks which.

Questions on one image stand next to each other, so that an engine computes the image once; long ones come first, so
that memory trouble shows early and a batch holds similar lengths. Answers do not depend on any of it.
"""

import heapq
from collections.abc import Mapping, Sequence

from evaluation.prompts import Prompt
from evaluation.tsv import Row

IMAGE_COST = 2000
"""Characters of text that take about as long as an image of 576 tokens."""

PARTS = 8
"""Questions on one image are divided into parts of at most 1/8 of a replica's share, so that one image with many
questions does not leave the other replicas idle."""


def split_work(rows: Sequence[Row], prompts: Mapping[int | str, Prompt], replicas: int) -> list[list[Row]]:
    """The rows that each replica asks, in the order of asking; the costliest groups are dealt out first."""
    limit = len(rows) if replicas == 1 else max(1, len(rows) // (PARTS * replicas))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.image, []).append(row)
    parts = []
    for group in groups.values():
        group.sort(key=lambda row: _length(prompts[row.index]), reverse=True)
        parts += [group[start : start + limit] for start in range(0, len(group), limit)]
    parts.sort(key=lambda part: (part[0].image_count, _length(prompts[part[0].index])), reverse=True)
    shares: list[list[Row]] = [[] for _ in range(replicas)]
    if replicas == 1:
        shares[0] = [row for part in parts for row in part]
        return shares
    costs = [_cost(part, prompts) for part in parts]
    loads = [(0, replica) for replica in range(replicas)]
    owners: dict[int, int] = {}
    for number in sorted(range(len(parts)), key=costs.__getitem__, reverse=True):
        load, replica = heapq.heappop(loads)
        owners[number] = replica
        heapq.heappush(loads, (load + costs[number], replica))
    for number, part in enumerate(parts):
        shares[owners[number]] += part
    return shares


def _length(prompt: Prompt) -> int:
    return len(prompt.text or "") if prompt.turns is None else sum(len(question) for question, _ in prompt.turns)


def _cost(part: Sequence[Row], prompts: Mapping[int | str, Prompt]) -> int:
    """Images once and texts each, in characters."""
    return IMAGE_COST * part[0].image_count + sum(_length(prompts[row.index]) for row in part)
