"""SE-ResNets without biases in the squeeze.

Code: https://github.com/moskomule/senet.pytorch @8cb2669 (MIT)
"""

from .base import Source, reshaped

SOURCE = Source(
    name='moskomule',
    marks={'se': r'\.se\.fc\.0\.weight$'},
    rules=(
        (r'^(layer\d\.\d+)\.se\.fc\.0\.', r'\1.se.fc1.'),
        (r'^(layer\d\.\d+)\.se\.fc\.2\.', r'\1.se.fc2.'),
    ),
    values=((r'\.se\.fc\.[02]\.weight$', reshaped),),
    zeros=r'\.se\.fc[12]\.bias$',
)
