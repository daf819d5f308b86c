"""The memory arithmetic of docs/parallelism.md, against the bytes that a rank really holds."""

import pytest
import torch

from tests.helpers.golden_training import GoldenLayout, description, driver_arguments

BF16 = "--bf16"
SHARED = "--bf16 --use-distributed-optimizer"
LAYOUTS = {
    "one rank": GoldenLayout(flags=BF16, trained="c"),
    "TP2": GoldenLayout(tensor=2, flags=BF16, trained="c"),
    "PP2": GoldenLayout(pipeline=2, flags=BF16, trained="c"),
    "PP2 VPP2": GoldenLayout(pipeline=2, virtual=2, flags=BF16, trained="c"),
    "CP2": GoldenLayout(context=2, flags=BF16, trained="c"),
    "DP2 distributed": GoldenLayout(data=2, flags=SHARED, trained="c"),
    "CP2 distributed": GoldenLayout(context=2, flags=SHARED, trained="c"),
    "stage 1": GoldenLayout(flags=BF16, trained="a"),
}


def held(golden, layout):
    """(parameters of this rank, trained ones among them, bytes that this rank holds) before the first step."""
    from mindspeed_mm.platform import get_platform

    platform = get_platform("cpu")
    from megatron.driver import initialize, setup
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec

    args = driver_arguments(layout, "", 5)
    runtime = Runtime(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        context_parallel_size=layout.context,
        params_dtype=torch.bfloat16,
    )
    spec = load_model_spec(description(golden, layout))
    initialize.initialize(args, platform)

    def provide(pre_process, post_process, vp_stage=None):
        stage = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
        return build_vlm(spec, runtime, torch.device("cpu"), **stage)[0]

    state = setup.setup(args, provide, platform)
    parameters = [parameter for module in state.modules for parameter in module.parameters()]
    total = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    for buffer in (buffer for chunk in state.model for buffer in chunk.buffers):
        total += buffer.grad_data.numel() * buffer.grad_data.element_size()
    inner = state.optimizer.optimizer
    for group in inner.param_groups:
        total += sum(master.numel() * master.element_size() for master in group["params"])
    for values in inner.state.values():
        total += sum(value.numel() * value.element_size() for name, value in values.items() if name != "step")
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() for parameter in parameters), trained, total


def predicted(parameters: int, trained: int, ranks_that_share: int) -> float:
    """2 bytes a parameter (bf16); of what is trained 4 (gradient) and 12 (float32 copy, two moments), shared or not."""
    return 2 * parameters + 4 * trained + 12 * trained / ranks_that_share


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_of_parameters_gradients_and_optimizer(ranks, golden, name):
    layout = LAYOUTS[name]
    shared = layout.data * layout.context if "distributed" in layout.flags else 1
    results = ranks(layout.ranks).run(held, golden, layout)
    whole = ranks(1).run(held, golden, GoldenLayout(flags=BF16, trained=layout.trained))[0]
    for parameters, trained, total in results:
        assert total == pytest.approx(predicted(parameters, trained, shared), rel=0.01)
    copies = layout.data * layout.context
    if layout.tensor == 1:
        assert sum(parameters for parameters, _, _ in results) == whole[0] * copies
