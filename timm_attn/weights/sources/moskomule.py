"""SE-ResNets without biases in the squeeze.

Code: https://github.com/moskomule/senet.pytorch @8cb2669 (MIT)
"""

from .base import HostedFile, Source, reshaped

HOME = 'https://github.com/moskomule/senet.pytorch'

SOURCE = Source(
    name='moskomule',
    marks={'se': r'\.se\.fc\.0\.weight$'},
    home=HOME,
    licence='mit',
    rules=(
        (r'^(layer\d\.\d+)\.se\.fc\.0\.', r'\1.se.fc1.'),
        (r'^(layer\d\.\d+)\.se\.fc\.2\.', r'\1.se.fc2.'),
    ),
    values=((r'\.se\.fc\.[02]\.weight$', reshaped),),
    zeros=r'\.se\.fc[12]\.bias$',
    files=(
        HostedFile(
            'moskomule_se_resnet50',
            'se_resnet50',
            f'{HOME}/releases/download/archive/seresnet50-60a8950a85b2b.pkl',
            77.06,
        ),
    ),
)
