"""Triplet attention of its authors, in all the spellings that their files have.

Code: https://github.com/landskape-ai/triplet-attention @2cf02fb (MIT); its issues 9 and 12 name the spellings
"""

from .base import Source

SOURCE = Source(
    name='triplet',
    marks={'triplet': r'\.(?:triplet_attention|pcam|triplet)\.'},
    rules=(
        (r'^(layer\d\.\d+)\.(?:triplet_attention|pcam|triplet)\.', r'\1.se.'),
        # The one named H is applied after H and C have changed places, so its plane is (C, W).
        (r'\.se\.ChannelGateH\.', '.se.cw.'),
        (r'\.se\.ChannelGateW\.', '.se.hc.'),
        (r'\.se\.SpatialGate\.', '.se.hw.'),
        (r'\.se\.(cw|hc|hw)\.(?:spatial|conv)\.(conv|bn)\.', r'.se.\1.\2.'),
    ),
)
