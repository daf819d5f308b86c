"""The CPU's AdamW: bit for bit torch's fused one, with its hooks, groups and state."""

import torch

from mindspeed_mm.platform.host_adamw import HostAdamW


def trained(kind, **options):
    """(values, state, what the hook saw) after two steps of two groups, the second added later."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((3, 5), (7,)))
    optimizer, seen = kind([first], lr=0.1, weight_decay=0.1, **options), []
    optimizer.add_param_group({"params": [second], "weight_decay": 0.0})
    optimizer.register_step_post_hook(lambda *_: seen.append(torch.is_grad_enabled()))

    def loss():
        optimizer.zero_grad()
        value = (first.square().sum() + second.exp().sum()) / 3
        value.backward()
        return value

    losses = [optimizer.step(loss) for _ in range(2)]
    return [*losses, first, second], optimizer.state_dict(), seen


def test_it_is_torchs_fused_adamw():
    (ours, state, seen), (theirs, wanted, theirs_seen) = trained(HostAdamW), trained(torch.optim.AdamW, fused=True)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert seen == theirs_seen == [True, True]
    assert state["param_groups"] == wanted["param_groups"]
    for number, values in wanted["state"].items():
        assert all(torch.equal(state["state"][number][name], value) for name, value in values.items())
