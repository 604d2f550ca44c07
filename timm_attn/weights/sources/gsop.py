"""GSoP-Net1 of its authors.

Code: https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks @662a699 (MIT)
"""

from .base import Source

SOURCE = Source(
    name='gsop',
    marks={'gsop': r'\.conv_for_DR\.'},
    home='https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks',
    licence='mit',
    rules=(
        (r'^(layer\d\.\d+)\.conv_for_DR\.', r'\1.se.conv_reduce.'),
        (r'^(layer\d\.\d+)\.bn_for_DR\.', r'\1.se.bn_reduce.'),
        (r'^(layer\d\.\d+)\.row_bn\.', r'\1.se.bn_row.'),
        (r'^(layer\d\.\d+)\.row_conv_group\.', r'\1.se.conv_row.'),
        (r'^(layer\d\.\d+)\.fc_adapt_channels\.', r'\1.se.conv_expand.'),
    ),
)
