"""ECA-Net of its authors.

Code: https://github.com/BangguWu/ECANet @b332f6b (MIT)
"""

from .base import Source, padded

SOURCE = Source(
    name='ecanet',
    marks={'eca': r'\.eca\.conv\.weight$'},
    rules=((r'^(layer\d\.\d+)\.eca\.', r'\1.se.'),),
    values=((r'\.eca\.conv\.weight$', padded),),
)
