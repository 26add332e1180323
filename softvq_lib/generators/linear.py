"""A linear layer with the fastest kernel of the CPU where no gradient is wanted."""

import torch
from torch import Tensor, nn

# torch gives products in fp32 to MKL, which takes half the speed on CPUs of other makers than its own; oneDNN, which
# torch carries too, does not. Sums are in another order, so results differ in the last digit.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class Linear(nn.Linear):
    """nn.Linear, computed by oneDNN in fp32 on a CPU without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        fits = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if _ONEDNN is None or not fits or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return _ONEDNN(x, self.weight, self.bias, "none", [], "")
