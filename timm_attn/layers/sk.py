"""Selective Kernel convolution.

Paper: Selective Kernel Networks (CVPR 2019), https://arxiv.org/abs/1903.06586
Code:  https://github.com/implus/PytorchInsight @2864528 (`form='sk_resnet'`, the author's SK-ResNet50*),
       https://github.com/implus/SKNet @17dd708 (`form='sknet'`) (no licence in either: written from the equations)

The two are different networks. SK-ResNet* chooses between a dense and a grouped 3x3 convolution; SKNet, the paper's,
between two grouped ones, of which the second is dilated ("5x5"), and squeezes to at least 32 channels.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ._base import Attention, Gate, check_choice, reduced_channels
from ._gate import gated, mean
from ._registry import register_attn

# form: groups and dilation of the two branches, least width of the squeeze
_FORMS = {
    'sk_resnet': ((1, 1), (32, 1), 1),
    'sknet': ((32, 1), (32, 2), 32),
}


@register_attn(
    'sk',
    placement='conv',
    equation='y = softmax over two convolutions u0, u1 of F2 relu(BN(F1 mean(u0 + u1)))',
    title='Selective Kernel Networks',
    authors='Li, Xiang and Wang, Wenhai and Hu, Xiaolin and Yang, Jian',
    year=2019,
    venue='CVPR',
    paper='https://arxiv.org/abs/1903.06586',
    code='https://github.com/implus/PytorchInsight',
    licence='none stated',
)
class SelectiveKernel(Attention):
    """Mixes two 3x3 convolutions by a softmax over the branches, channel by channel; replaces conv, BN and ReLU.

    In training the BatchNorm of its squeeze needs a batch of at least 2.

    Args:
        channels: Channels D of input and output.
        rd_ratio: Width d of the squeeze over D.
        form: 'sk_resnet' (dense 3x3 and 3x3 with 32 groups) or 'sknet' (3x3 and dilated 3x3, both with 32 groups).
        stride: Stride of both branches.
        dilation: Factor on the dilation of both branches.

    Raises:
        ValueError: `rd_ratio` leaves no hidden channel, 32 does not divide the channels, or an unknown form.
    """

    kinds: ClassVar[Mapping[str, Gate]] = {'branch': Gate('BC', 'branches', entries=('3x3', 'wide'))}
    recomputable = True
    no_warm_start = (
        'SK has no warm start: it replaces each 3x3 convolution by two others, whose mixture a plain ResNet does not '
        'contain.'
    )

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        form: str = 'sk_resnet',
        stride: int = 1,
        dilation: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        # It has no neutral gate: zero logits give the mean of the branches, which is no multiple of its input.
        super().__init__(neutral_gate=1.0)
        check_choice('form', form, tuple(_FORMS))
        (groups0, dil0), (groups1, dil1), least = _FORMS[form]
        for groups in (groups0, groups1):
            if channels % groups:
                raise ValueError(f"channels (={channels}) must be divisible by the {groups} groups of form '{form}'.")
        dil0, dil1 = dil0 * dilation, dil1 * dilation
        hidden = max(reduced_channels(channels, rd_ratio), least)
        self.conv1 = nn.Conv2d(
            channels, channels, 3, stride, padding=dil0, dilation=dil0, groups=groups0, bias=False, **dd
        )
        self.bn1 = nn.BatchNorm2d(channels, **dd)
        self.conv2 = nn.Conv2d(
            channels, channels, 3, stride, padding=dil1, dilation=dil1, groups=groups1, bias=False, **dd
        )
        self.bn2 = nn.BatchNorm2d(channels, **dd)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False, **dd)
        self.bn = nn.BatchNorm2d(hidden, **dd)
        self.fc2 = nn.Conv2d(hidden, 2 * channels, 1, bias=False, **dd)
        for conv in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore()
    def init_neutral(self) -> None:
        """Gives both branches the weight 1/2 everywhere."""
        nn.init.zeros_(self.fc2.weight)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the two convolutions give: (N, D, H, W) both."""
        return self.bn1(self.conv1(x)).relu(), self.bn2(self.conv2(x)).relu()  # (N, D, H, W) both

    def choice(self, u: Tensor) -> Tensor:
        """How much each output channel takes of either branch: (N, 2, D, 1, 1), which sum to 1."""
        z = mean(u, [2, 3])[:, :, None, None]  # (N, D, 1, 1)
        z = self.bn(self.fc1(z)).relu()  # (N, d, 1, 1)
        return self.fc2(z).unflatten(1, (2, -1)).softmax(1)  # (N, 2, D, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        u0, u1 = self.branches(x)
        a = self.choice(u0 + u1).to(u0.dtype)
        return gated(u0, [a[:, 0]]) + gated(u1, [a[:, 1]])

    @torch.jit.ignore()
    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """'branch' (N, 2, D), the softmax over the two branches."""
        u0, u1 = self.branches(x)
        return {'branch': self.choice(u0 + u1).flatten(2)}
