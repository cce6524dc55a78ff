"""Run a script on a processor that has no bf16 arithmetic: bf16 products, made in float32.

    python -m experiments.cost.bf16_products train.py --mixed_precision bf16 ...

Where a processor has no instructions for bf16 (AVX512-BF16, AMX), torch's matrix products in bf16
run at a billion operations a second, some hundred times slower than its float32 ones. Here bf16
operands are converted to float32, multiplied there, and the result is rounded to bf16. That is
what the instructions compute, too: exact products, float32 sums, one rounding. All else is torch's.
"""

import runpy
import sys

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
PRODUCTS = {  # the second argument of each is a factor
    aten.linear,  # this one and the next three are seen in inference mode only
    aten.matmul,
    aten.conv2d,
    aten.scaled_dot_product_attention,
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.convolution,
    aten.convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


class Bf16Products(TorchDispatchMode):
    """Products of bf16 tensors are made in float32, and rounded to bf16. It holds for the thread
    that enters it, where a CPU's backward runs, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket not in PRODUCTS or args[1].dtype != torch.bfloat16:
            return function(*args, **kwargs)
        wide = lambda x: x.float() if x.dtype == torch.bfloat16 else x  # noqa: E731
        args, kwargs = tree_map_only(Tensor, wide, (args, kwargs))
        result = function(*args, **kwargs)
        if function.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
            output, logsumexp = result  # the latter is float32 in any case
            return output.bfloat16(), logsumexp
        return tree_map_only(Tensor, Tensor.bfloat16, result)


if __name__ == "__main__":
    del sys.argv[0]
    with Bf16Products():
        runpy.run_path(sys.argv[0], run_name="__main__")
