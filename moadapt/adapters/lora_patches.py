"""LoRA at a two-dimensional convolution such as a patch embedding.

`down` is a convolution of the module's own kernel, stride, padding and dilation to R channels, `up` one of kernel 1,
as in Hu et al.'s released code. Axes: N images, C channels in, F channels out, h w patches.
"""

from torch import Tensor, nn
from torch.nn import functional

from moadapt.adapters.blending import refuse_blending
from moadapt.adapters.lora_bank import LoRABank
from moadapt.adapters.weighing import all_weights
from moadapt.call import Call
from moadapt.routing import Routing


class LoRAPatches(LoRABank):
    """All LoRAs of a convolution."""

    def add_to(self, y: Tensor, x: Tensor, routing: Routing | None, call: Call | None = None) -> Tensor:
        """Add the delta of images `x` (N, C, H, W) to the patches `y` (N, F, h, w)."""
        if not self.names:
            return y
        refuse_blending(self, self.site, routing)
        x = functional.dropout(x.to(y.dtype), self.dropout, self.training)
        return y + self.change(x, y, all_weights(routing, y), call).mT.reshape(y.shape)

    def shrink(self, x: Tensor, down: Tensor) -> Tensor:
        """Convolve to the stacked ranks, (N, h w, R)."""
        module = self._module[0]
        assert isinstance(module, nn.Conv2d), "a convolution site"
        kernels = down.view(-1, module.in_channels, *module.kernel_size)
        shrunk: Tensor = module._conv_forward(x.to(down.dtype), kernels, None)
        return shrunk.flatten(2).mT
