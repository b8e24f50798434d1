"""What the operations inside a ``with`` made: how large the largest tensor was, and how much was widened."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MadeTensors(TorchDispatchMode):
    """``numel`` and ``nbytes`` of the largest tensor that was returned; ``widened``, entries taken from bf16 to fp32."""

    def __init__(self):
        super().__init__()
        self.numel = self.nbytes = self.widened = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        self.nbytes = max([self.nbytes, *(x.nbytes for x in tensors)])
        if function is torch.ops.aten._to_copy.default and (args[0].dtype, out.dtype) == (torch.bfloat16, torch.float32):
            self.widened += out.numel()
        return out
