"""Which kernel multiplies matrices, and attends, on this processor: measured once, kept in the user's cache folder.

No kernel is the fastest everywhere. MKL leaves AVX-512 unused on processors of AMD, where oneDNN takes half the time;
without AVX-512 oneDNN is the slower one; and processors without instructions for bfloat16 multiply it many times slower
than they convert it to float32 and back (docs/performance.md). So each kernel is timed on a few small products of every
form and size, which takes a third of a second the first time, and a kernel other than torch's own is taken only where
it is clearly faster. Trained attention in half precision is timed likewise: where sequences or heads are short its
backward pass can take many times as long as in float32, even on processors that multiply bfloat16 fastest.

A table holds for one data type and one number of threads. Ranks of a run share the table of rank 0 (`settle`), so that
they compute alike.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform as host
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

FORMAT = 2
FORMS = ("forward", "input gradient", "weight gradient")
PLAIN, ONEDNN, SINGLE = KERNELS = ("torch", "onednn", "float32")
"""torch's own product; oneDNN's by the operator behind torch.compile's linear layers; torch's in float32, rounded."""
SIZES = {"few rows": (4, 1024), "tiny": (16, 128), "small": (32, 256), "medium": (64, 512), "large": (256, 512)}
"""Rows, and both other sizes, of the product that stands for a class."""
LIMITS = ((1_000_000, "tiny"), (4_000_000, "small"), (32_000_000, "medium"))
"""Multiply-adds below which a product belongs to the class; what is larger is "large"."""
FEW_ROWS = 8
ATTENTION = "attention"
ATTENTION_HEADS = 4
ATTENTION_SIZES = {"tiny": (48, 32), "small": (128, 64), "medium": (160, 128), "large": (512, 128)}
"""Length of the sequence, and channels of a head, of the attention that stands for a class."""
ATTENTION_LIMITS = ((4_000, "tiny"), (12_000, "small"), (32_000, "medium"))
"""Keys times channels below which attention belongs to the class; what is larger is "large"."""
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
GAIN = 1.15
"""Times faster that a kernel must be than torch's own: less may be chance on a busy machine."""
HOPELESS = 3.0
"""Times slower than the best so far from which a kernel is not tried again."""
ROUNDS = 6
LARGEST_FILE = 2**16
"""Bytes; a table takes a fiftieth of it."""

Table = dict[str, str]
"""Class ("form, size") -> kernel."""

_tables: dict[tuple[torch.dtype, int], Table] = {}


def run(kernel: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias by the kernel of this name: [..., K], [N, K], [N] or None -> [..., N]."""
    if kernel == ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if kernel == SINGLE:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def choose(form: str, dtype: torch.dtype, rows: int, inner: int, outer: int) -> str:
    """The kernel for a product of a form in FORMS: `rows` tokens, a weight of `inner` x `outer`."""
    if dtype not in DTYPES:
        return PLAIN
    return table(dtype)[_class(form, rows, rows * inner * outer)]


def choose_attention(dtype: torch.dtype, length: int, channels: int) -> str:
    """SINGLE or PLAIN for trained attention over `length` keys with heads of `channels`."""
    if dtype not in HALVES:
        return PLAIN
    size = next((size for limit, size in ATTENTION_LIMITS if length * channels < limit), "large")
    return table(dtype)[f"{ATTENTION}, {size}"]


def _class(form: str, rows: int, work: int) -> str:
    if rows < FEW_ROWS:
        return f"{form}, few rows"
    return f"{form}, {next((size for limit, size in LIMITS if work < limit), 'large')}"


def table(dtype: torch.dtype) -> Table:
    """The choices for `dtype` at the present number of threads.

    A process alone measures what is not known. One of several whose choices were not settled goes by what the
    processor can do, since it might measure other values than its neighbours.
    """
    key = dtype, torch.get_num_threads()
    if key not in _tables:
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        _tables[key] = _known_or_measured(dtype) if alone else by_capability(dtype)
    return _tables[key]


def settle() -> None:
    """Give all ranks of the process group the choices of rank 0. Collective."""
    names = classes()
    values = torch.zeros(len(DTYPES), len(names), dtype=torch.int64)
    if torch.distributed.get_rank() == 0:
        tables = [_known_or_measured(dtype) for dtype in DTYPES]
        values = torch.tensor([[KERNELS.index(own[name]) for name in names] for own in tables])
    torch.distributed.broadcast(values, 0)
    for dtype, row in zip(DTYPES, values.tolist(), strict=True):
        _tables[dtype, torch.get_num_threads()] = dict(zip(names, (KERNELS[index] for index in row), strict=True))


def classes() -> list[str]:
    """The names of all classes."""
    attention = [f"{ATTENTION}, {size}" for size in ATTENTION_SIZES]
    return [f"{form}, {size}" for form in FORMS for size in SIZES] + attention


def kernels(dtype: torch.dtype) -> list[str]:
    """The kernels that this build of torch has for a data type; the processor may still refuse one."""
    found = [PLAIN] if dtype is torch.float32 else [SINGLE, PLAIN]
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return [*found, ONEDNN] if has_onednn else found


def by_capability(dtype: torch.dtype) -> Table:
    """Choices without a measurement: float32 for half precision where the processor has no instructions for it."""
    slow = dtype in HALVES and not has_half_products(dtype)
    return dict.fromkeys(classes(), SINGLE if slow else PLAIN)


def has_half_products(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions to multiply bfloat16 or float16."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype is torch.bfloat16 else 'fp16'}_supported", None)
    return supported is not None and supported()


def measure(dtype: torch.dtype) -> Table:
    """Time the kernels on every class: the fastest, where it beats torch's own by GAIN."""
    found = {}
    for form in FORMS:
        for size, (rows, width) in SIZES.items():
            x, weight = operands(form, rows, width, width, dtype)
            seconds = fastest({kernel: lambda k=kernel: run(k, x, weight) for kernel in kernels(dtype)})  # noqa: B023
            found[f"{form}, {size}"] = _clearly_best(seconds)
    return found | _measure_attention(dtype)


def _measure_attention(dtype: torch.dtype) -> Table:
    """Time the forward and backward passes of every class of attention."""
    if dtype not in HALVES or not has_half_products(dtype):
        return {name: kernel for name, kernel in by_capability(dtype).items() if name.startswith(ATTENTION)}
    found = {}
    # What is measured when it is first asked for may be asked for by an inference without autograd.
    with torch.inference_mode(False), torch.enable_grad():
        for size, (length, channels) in ATTENTION_SIZES.items():
            rows = [torch.ones(1, ATTENTION_HEADS, length, channels, dtype=dtype, requires_grad=True) for _ in range(3)]

            def attend(inner: torch.dtype, rows: list[torch.Tensor] = rows) -> None:
                output = F.scaled_dot_product_attention(*(row.to(inner) for row in rows), is_causal=True)
                torch.autograd.grad(output.to(dtype).sum(), rows)

            calls = {SINGLE: lambda call=attend: call(torch.float32), PLAIN: lambda call=attend: call(dtype)}
            found[f"{ATTENTION}, {size}"] = _clearly_best(fastest(calls))
    return found


def _clearly_best(seconds: dict[str, float]) -> str:
    """The kernel of the least time, where it beats torch's own by GAIN; else that."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] * GAIN <= seconds[PLAIN] else PLAIN


def operands(form: str, rows: int, inner: int, outer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What `run` multiplies in a linear layer: with its weight [outer, inner] and `rows` tokens."""
    x, grad = torch.ones(rows, inner, dtype=dtype), torch.ones(rows, outer, dtype=dtype)
    weight = torch.ones(outer, inner, dtype=dtype)
    return {"forward": (x, weight), "input gradient": (grad, weight.t()), "weight gradient": (grad.t(), x.t())}[form]


def fastest(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The shortest of a few calls of each, in seconds; taken in turn, so that all see the same load of the machine.

    One that the processor refuses is left out.
    """
    seconds: dict[str, float] = {}
    for name, call in candidates.items():
        try:
            call()  # sets things up
        except RuntimeError:
            continue
        seconds[name] = _seconds(call)
    for _ in range(ROUNDS - 1):
        limit = HOPELESS * min(seconds.values())
        for name in [name for name, least in seconds.items() if least <= limit]:
            seconds[name] = min(seconds[name], _seconds(candidates[name]))
    return seconds


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _known_or_measured(dtype: torch.dtype) -> Table:
    facts = machine(dtype)
    path = cache_file(facts)
    found = _read(path, facts, dtype)
    if found is None:
        found = measure(dtype)
        _write(path, {"machine": facts, "kernels": found})
    return found


def machine(dtype: torch.dtype) -> dict[str, str | int]:
    """What a table depends on: a home folder may be shared by unlike machines."""
    limits = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
    return {
        "format": FORMAT,
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **{name: os.environ.get(name, "") for name in limits},
    }


def _processor() -> str:
    """Maker, family and model as Linux tells them; elsewhere what Python knows."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return f"{host.machine()} {host.processor()}"
    lines = (line.partition(":") for line in text.splitlines())
    return ", ".join(value.strip() for key, _, value in lines if key.strip() in wanted) or host.machine()


def cache_file(facts: dict[str, str | int]) -> Path | None:
    """In $XDG_CACHE_HOME or ~/.cache; None for a user without a home. A file each, so that writers never meet."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "mindspeed-mm" / f"products-{digest}.json"


def _read(path: Path | None, facts: dict[str, str | int], dtype: torch.dtype) -> Table | None:
    """A table that was kept; None where there is none, or one that cannot be used, which is then written anew."""
    if path is None:
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < LARGEST_FILE else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.info("%s cannot be read (%s): products are measured again", path, error)
        return None
    if not isinstance(kept, dict) or kept.get("machine") != facts or not isinstance(kept.get("kernels"), dict):
        return None
    table = kept["kernels"]
    right = list(table) == classes() and all(kernel in kernels(dtype) for kernel in table.values())
    return table if right else None


def _write(path: Path | None, content: dict) -> None:
    """Beside, then renamed: other processes see a whole file or none. A folder that takes no file costs time only."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("%s cannot be written (%s): products will be measured again by the next process", path, error)


def describe() -> str:
    """The choices made so far in this process, a line for each data type, number of threads and kernel."""
    lines = []
    for (dtype, threads), own in _tables.items():
        name = str(dtype).removeprefix("torch.")
        products = {key: kernel for key, kernel in own.items() if not key.startswith(ATTENTION)}
        for kernel in dict.fromkeys(products.values()):
            names = {form: [size for size in SIZES if own[f"{form}, {size}"] == kernel] for form in FORMS}
            parts = [f"{form} ({', '.join(sizes)})" for form, sizes in names.items() if sizes]
            which = "all" if len(set(products.values())) == 1 else "; ".join(parts)
            lines.append(f"products in {name}, {threads} thread(s), by {kernel}: {which}")
        single = [size for size in ATTENTION_SIZES if own[f"{ATTENTION}, {size}"] == SINGLE]
        if single:
            lines.append(f"trained attention in {name}, {threads} thread(s), by {SINGLE}: {', '.join(single)}")
    return "\n".join(lines)
