"""PytorchInsight's SE, SGE and SK-ResNet*; its CBAM and BAM have the keys of their authors' code.

Code: https://github.com/implus/PytorchInsight @2864528 (no licence)
"""

from .base import HostedFile, Source, check_form, reshaped

HOME = 'https://github.com/implus/PytorchInsight'

SOURCE = Source(
    name='insight',
    marks={'se': r'\.se\.fc\.0\.bias$'},
    home=HOME,
    rules=(
        (r'^(layer\d\.\d+)\.se\.fc\.0\.', r'\1.se.fc1.'),
        (r'^(layer\d\.\d+)\.se\.fc\.2\.', r'\1.se.fc2.'),
    ),
    values=((r'\.se\.fc\.[02]\.weight$', reshaped),),
    files=(
        HostedFile('insight_se_resnet101', 'se_resnet101', '1MOGkkqs6v_LCgO6baGDmcFYbuOkwZjK9', 78.468),
        HostedFile('insight_cbam_resnet50', 'cbam_resnet50', '1Q5gIKPARrZzDbCPZHpuj9tqXs06c2YZN', 77.626),
        HostedFile('insight_cbam_resnet101', 'cbam_resnet101', '1UHLt3C59M1fRta6i9iLsj-RvIbKusgQN', 78.354),
        HostedFile('insight_bam_resnet50', 'bam_resnet50', '1K5iAUAIF_yRyC2pIiA65F8Ig0x4NzOqk', 76.898),
        HostedFile('insight_bam_resnet101', 'bam_resnet101', '15EUQ6aAoXzPm1YeAH4ZqnF3orEr0dB8f', 78.218),
    ),
)

# Plain nets and SE nets of this source have a conv2 and bn2 too, which stay where they are.
SK_SOURCE = Source(
    name='insight',
    marks={'sk': r'\.conv2g\.weight$'},
    home=HOME,
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
    files=(
        HostedFile('insight_sk_resnet50', 'sk_resnet50', '1DGYWPeKc7dyJ9i-zPJcPPa2engExPOnJ', 77.538),
        HostedFile('insight_sk_resnet101', 'sk_resnet101', '1WB7HXx-cvUIxFRe-M61XZIzUN0a3nsbF', 78.792),
    ),
)

SGE_SOURCE = Source(
    name='insight',
    marks={'sge': r'\.sge\.weight$'},
    rules=((r'^(layer\d\.\d+)\.sge\.', r'\1.se.'),),
    home=HOME,
    files=(HostedFile('insight_sge_resnet50', 'sge_resnet50', '13HPCjrEle6aFbiCo8Afkr2jJssdNwdRn', 77.584),),
)
