"""PytorchInsight's SE and SK-ResNet*; its CBAM and BAM have the keys of their authors' code.

Code: https://github.com/implus/PytorchInsight @2864528 (no licence)
"""

from .base import Source, check_form, reshaped

SOURCE = Source(
    name='insight',
    marks={'se': r'\.se\.fc\.0\.bias$'},
    rules=(
        (r'^(layer\d\.\d+)\.se\.fc\.0\.', r'\1.se.fc1.'),
        (r'^(layer\d\.\d+)\.se\.fc\.2\.', r'\1.se.fc2.'),
    ),
    values=((r'\.se\.fc\.[02]\.weight$', reshaped),),
)

# Plain nets and SE nets of this source have a conv2 and bn2 too, which stay where they are.
SK_SOURCE = Source(
    name='insight',
    marks={'sk': r'\.conv2g\.weight$'},
    rules=(
        (r'^(layer\d\.\d+)\.conv2\.weight$', r'\1.conv2.conv1.weight'),
        (r'^(layer\d\.\d+)\.bn2\.', r'\1.conv2.bn1.'),
        (r'^(layer\d\.\d+)\.conv2g\.', r'\1.conv2.conv2.'),
        (r'^(layer\d\.\d+)\.bn2g\.', r'\1.conv2.bn2.'),
        (r'^(layer\d\.\d+)\.conv_fc1\.', r'\1.conv2.fc1.'),
        (r'^(layer\d\.\d+)\.bn_fc1\.', r'\1.conv2.bn.'),
        (r'^(layer\d\.\d+)\.conv_fc2\.', r'\1.conv2.fc2.'),
    ),
    checks=(check_form('sk_resnet'),),
)
