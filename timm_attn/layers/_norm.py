"""A GroupNorm that takes any map and any tracer."""

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """torch's, without its check that a group has more than one value, which `torch.jit.trace` cannot follow.

    A single value is normalised to 0, so that the bias comes out.
    """

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
