"""Triplet attention of its authors, in all the spellings that their files have.

Code: https://github.com/landskape-ai/triplet-attention @2cf02fb (MIT); its issues 9 and 12 name the spellings
"""

from .base import HostedFile, Source

_K3 = {'attn_args': {'kernel_size': 3}}

SOURCE = Source(
    name='triplet',
    marks={'triplet': r'\.(?:triplet_attention|pcam|triplet)\.'},
    home='https://github.com/landskape-ai/triplet-attention',
    licence='mit',
    rules=(
        (r'^(layer\d\.\d+)\.(?:triplet_attention|pcam|triplet)\.', r'\1.se.'),
        # The one named H is applied after H and C have changed places, so its plane is (C, W).
        (r'\.se\.ChannelGateH\.', '.se.cw.'),
        (r'\.se\.ChannelGateW\.', '.se.hc.'),
        (r'\.se\.SpatialGate\.', '.se.hw.'),
        (r'\.se\.(cw|hc|hw)\.(?:spatial|conv)\.(conv|bn)\.', r'.se.\1.\2.'),
    ),
    # The first is suspected to hold another net (issue 16 there), which the conversion would refuse.
    files=(
        HostedFile('triplet_resnet18_k3', 'triplet_resnet18', '1p3_s2kA5NFWqCtp4zvZdc91_2kEQhbGD', 70.33, _K3),
        HostedFile('triplet_resnet18_k7', 'triplet_resnet18', '1jIDfA0Psce10L06hU0Rtz8t7s2U1oqLH', 71.09),
        HostedFile('triplet_resnet50_k3', 'triplet_resnet50', '1W6aDE6wVNY9NwgcM7WMx_vRhG2-ZiMur', 76.12, _K3),
        HostedFile('triplet_resnet50_k7', 'triplet_resnet50', '1ptKswHzVmULGbE3DuX6vMCjEbqwUvGiG', 77.48),
    ),
)
