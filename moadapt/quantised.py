"""Linear layers whose frozen weight is kept quantised: told apart, and read as plain numbers.

torchao leaves the layer a plain `nn.Linear` and makes its weight a tensor of its own; bitsandbytes has linear layers of
its own, whose weight is packed. Either way the weight is no matrix to compute with, and is never written to.
"""

from typing import Any

import torch
from torch import Tensor, nn

_PACKED = ("Params4bit", "Int8Params")


def is_quantised(module: nn.Module) -> bool:
    """Tell whether a module keeps its weight quantised by torchao or bitsandbytes.

    Args:
        module: Any module of a base.
    """
    kind = type(getattr(module, "weight", None))
    return kind.__name__ in _PACKED or kind.__module__.partition(".")[0] == "torchao"


def dequantised(module: nn.Module) -> Tensor:
    """Return the weight that a quantised linear layer stands for, (F, D), in the type that its library reads it in.

    Args:
        module: A layer that `is_quantised`.

    Raises:
        ValueError: bitsandbytes has repacked the weight for a processor's own kernel.
    """
    layer: Any = module
    weight = layer.weight
    if type(weight).__name__ == "Int8Params":
        scale: Tensor = weight.SCB if weight.SCB is not None else layer.state.SCB  # the first call moves it
        codes: Tensor = weight.data
        return codes.float() * (scale.float().to(codes.device) / 127).unsqueeze(1)
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked a weight for this processor, from which it cannot be read; load the base "
                "with moadapt.bases.load_base, which keeps weights as they are"
            )
        unpacked: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return unpacked
    plain: Tensor = weight.detach().dequantize()
    return plain


def plain_linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Return a linear layer of plain numbers that does what a quantised one does.

    Args:
        module: A layer that `is_quantised`; it stays as it is.
        dtype: Number type of the new weight and bias.
    """
    weight, bias = dequantised(module), module.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype))
    if isinstance(bias, Tensor):
        linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
    return linear.train(module.training)


def departure(module: nn.Module, dtype: torch.dtype, rows: int = 64) -> float:
    """Measure how far a quantised layer's outputs are from those of its dequantised weight.

    Rounding alone gives less than 0.004 in any number type; layers that quantise their inputs too give more.

    Args:
        module: A layer that `is_quantised`.
        dtype: Of its inputs.
        rows: How many inputs to try, each of standard normal numbers.

    Returns:
        Root mean square of the difference over that of the output.
    """
    weight = dequantised(module).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator).to(weight.device, dtype)
    bias: Any = module.bias
    wanted = nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    with torch.no_grad():
        found = module(x).double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float64).tiny))
