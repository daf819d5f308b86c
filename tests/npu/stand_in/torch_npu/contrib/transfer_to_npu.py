"""torch.cuda.* becomes torch.npu.*, and the backend nccl becomes hccl; types' names and private functions stay."""

import functools
import types

import torch
import torch.distributed

from torch_npu import npu

for _name, _value in vars(npu).items():
    if not _name.startswith("_") and not isinstance(_value, types.ModuleType | dict):
        setattr(torch.cuda, _name, _value)

torch.Tensor.cuda = torch.Tensor.npu
torch.nn.Module.cuda = lambda self, *_args, **_options: self

_init_process_group = torch.distributed.init_process_group


@functools.wraps(_init_process_group)
def _hccl(*args, **options):
    args = tuple("hccl" if value == "nccl" else value for value in args)
    options = {name: "hccl" if value == "nccl" else value for name, value in options.items()}
    return _init_process_group(*args, **options)


torch.distributed.init_process_group = _hccl
