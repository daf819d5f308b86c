"""Tables and JSON of `mindspeed-mm plan`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from mindspeed_mm.planning.communication import stage_traffic
from mindspeed_mm.planning.memory import checkpoint_bytes, host_memory, rank_memory
from mindspeed_mm.planning.planner import PlanResult
from mindspeed_mm.planning.search import REFERENCE, Plan

GB = 1e9
SHOWN_REASONS = 5
MOST_STAGES = 8
SENT = {
    "tensor": "tensor and sequence parallelism",
    "pipeline": "pipeline",
    "context": "context parallelism",
    "gradients": "gradients",
    "parameters": "updated parameters",
}


def show(result: PlanResult, top: int) -> None:
    """Print the layouts, and the first one in detail, on stderr."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    plans = result.fitting or result.others
    console.print(_layouts(result, plans[:top]))
    console.print(_details(plans[0]))
    for line in _sentences(result, plans[0]):
        console.print(line, highlight=False)


def _layouts(result: PlanResult, plans: list[Plan]) -> Table:
    fits = f"fit into {result.limit / GB:.1f} GB" if result.fitting else f"DO NOT fit into {result.limit / GB:.1f} GB"
    table = Table(title=f"layouts that {fits} a device, best first ({len(result.fitting)} fit)")
    for name in ("TP", "PP", "CP", "DP", "MBS", "recompute", "GB", "of it activations", "sent, GB", "s/step", "MFU %"):
        table.add_column(name, justify="right")
    for plan in plans:
        job, time = plan.job, plan.time
        table.add_row(
            *(str(number) for number in (job.tensor, job.pipeline, job.context, job.data_parallel_size)),
            str(job.micro_batch_size),
            plan.strategy.recompute,
            f"{plan.memory.peak / GB:.1f}",
            f"{plan.memory.activations / GB:.1f}",
            f"{plan.traffic.total / GB:.2f}",
            "-" if time is None else f"{time.total:.3g}",
            "-" if time is None else f"{100 * mfu(plan, result):.0f}",
        )
    return table


def mfu(plan: Plan, result: PlanResult) -> float:
    """Model operations over what the devices could do at their peak."""
    return plan.time.model_flops / plan.time.total / plan.job.world_size / result.hardware.peak_flops


def _details(plan: Plan) -> Table:
    """Memory and traffic of each pipeline stage; of many stages only the first, the second and the last."""
    stages = list(range(plan.job.pipeline))
    stages = stages if len(stages) <= MOST_STAGES else [0, 1, stages[-1]]
    memory = [rank_memory(plan.job, stage) for stage in stages]
    traffic = [stage_traffic(plan.job, stage) for stage in stages]
    table = Table("GB on a rank of stage", *map(str, stages), title="the first one in detail")
    for name in ("parameters", "gradients", "optimizer", "activations", "temporaries", "batch", "peak"):
        table.add_row(name, *(f"{getattr(rank, name) / GB:.2f}" for rank in memory), end_section=name == "peak")
    for name, title in SENT.items():
        table.add_row(f"sent in a step: {title}", *(f"{getattr(rank, name) / GB:.2f}" for rank in traffic))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _sentences(result: PlanResult, plan: Plan) -> list[str]:
    job, hardware = plan.job, result.hardware
    checkpoint, host = checkpoint_bytes(job), host_memory(job)
    lines = [
        f"checkpoint: {checkpoint.each / GB:.2f} GB a save, {checkpoint.once / GB:.2f} GB of frozen parameters once; "
        f"host memory: {host.total / GB:.1f} GB a rank",
        f"flags of train: {flags(plan)}",
    ]
    if plan.strategy.recompute != "model":
        lines.append(f"recomputation is set in the model config: {recompute_keys(plan)}")
    if plan.time is None:
        lines.append(
            f"no times: {hardware.name} has no rates; give --peak-tflops and --memory-bandwidth, --measured or "
            f"--calibrate. The order is that of an {REFERENCE}"
        )
    else:
        time = plan.time
        lines.append(
            f"step {time.total:.3g} s = matrix products {time.matrix:.3g} + element-wise {time.elementwise:.3g} + "
            f"communication {time.communication:.3g} + pipeline bubble {time.bubble:.3g} + optimizer "
            f"{time.optimizer:.3g}; {job.global_batch_size / time.total:.3g} samples/s"
        )
        if result.samples is not None:
            lines.append(f"epoch of {result.samples:,} samples: {epoch_seconds(plan, result) / 3600:.2f} h")
        if hardware.efficiency == 1.0 and not (hardware.measured or hardware.calibrated):
            lines.append("times are a lower bound: they assume the peak rate (--efficiency, --measured or --calibrate)")
        if hardware.interconnect is None and job.world_size > 1:
            lines.append("communication is taken as free: give --interconnect")
    lines += [f"not possible: {reason.splitlines()[-1].strip()}" for reason in result.refused[:SHOWN_REASONS]]
    return lines


def epoch_seconds(plan: Plan, result: PlanResult) -> float:
    """Predicted seconds of an epoch of whole global batches."""
    return result.samples / plan.job.global_batch_size * plan.time.total


def flags(plan: Plan) -> str:
    """Flags of train that make this layout."""
    job = plan.job
    parts = [
        f"--tensor-model-parallel-size {job.tensor}",
        f"--pipeline-model-parallel-size {job.pipeline}",
        f"--context-parallel-size {job.context}",
        f"--micro-batch-size {job.micro_batch_size}",
        f"--global-batch-size {job.global_batch_size}",
    ]
    parts += ["--sequence-parallel"] if job.runtime.sequence_parallel else []
    parts += ["--use-distributed-optimizer"] if job.use_distributed_optimizer else []
    return " ".join(parts)


def recompute_keys(plan: Plan) -> str:
    """Keys of a part's block that make this layout's recomputation."""
    text = plan.job.spec.text_decoder
    keys = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    return ", ".join(f'"{key}": {_json(getattr(text, key))}' for key in keys)


def _json(value: object) -> str:
    return "null" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


def as_json(result: PlanResult, top: int) -> dict[str, Any]:
    """The result for --json: bytes, seconds, FLOP/s."""
    return {
        "hardware": asdict(result.hardware),
        "limit": result.limit,
        "fitting": len(result.fitting),
        "layouts": [_plan_json(plan, result) for plan in (result.fitting or result.others)[:top]],
        "not_possible": result.refused,
    }


def _plan_json(plan: Plan, result: PlanResult) -> dict[str, Any]:
    job = plan.job
    stages = [
        rank_memory(job, stage).as_dict() | {"sent": asdict(stage_traffic(job, stage))} for stage in range(job.pipeline)
    ]
    report: dict[str, Any] = {
        "tensor": job.tensor,
        "pipeline": job.pipeline,
        "context": job.context,
        "data": job.data_parallel_size,
        "micro_batch_size": job.micro_batch_size,
        "global_batch_size": job.global_batch_size,
        "recompute": plan.strategy.recompute,
        "flags": flags(plan),
        "fits": plan.memory.peak <= result.limit,
        "peak": plan.memory.peak,
        "stages": stages,
        "checkpoint": asdict(checkpoint_bytes(job)),
        "host": asdict(host_memory(job)),
        "time": None,
    }
    if plan.time is not None:
        report["time"] = asdict(plan.time) | {"step": plan.time.total, "mfu": mfu(plan, result)}
        report["time"]["epoch"] = None if result.samples is None else epoch_seconds(plan, result)
    return report
