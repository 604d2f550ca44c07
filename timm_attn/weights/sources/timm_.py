"""timm's own SE, SK, ECA and CBAM nets, and the plain ResNets of timm and torchvision.

Code: https://github.com/huggingface/pytorch-image-models (Apache-2.0)
"""

import re
from collections.abc import Mapping

from torch import Tensor

from .base import PLAIN, Source, Target, check_form, flipped, padded, reshaped


def check_width(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
    """Refuses SE nets whose hidden widths timm has rounded to a multiple of 8.

    Raises:
        ValueError: A squeeze of 64 channels to 8.
    """
    weight = keys.get('layer1.0.se.fc1.weight')
    if target.attn == 'se' and weight is not None and tuple(weight.shape[:2]) == (8, 64):
        raise ValueError(
            "This SE net has timm's widths, rounded to a multiple of 8 (64 -> 8, timm seresnet18 and seresnet34); "
            f'{target.name} has C // 16 (64 -> 4), as released. Use timm.create_model of that net for these weights.'
        )


def check_whole_input(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
    """Refuses timm's selective kernels that give each branch a part of the channels.

    Raises:
        ValueError: A net such as timm's skresnet18, 34 or 50.
    """
    for key, weight in keys.items():
        if re.search(r'\.paths\.0\.conv\.weight$', key) and weight.shape[0] != 32 * weight.shape[1]:
            raise ValueError(
                f"'{key}' is {tuple(weight.shape)}: timm's skresnet18, 34 and 50 split the input channels between the "
                f'branches (split_input), so they are no net of the paper and do not fit {target.name}. The one that '
                'does is skresnext50_32x4d, for sk_resnext50_32x4d.'
            )


def check_form_of_ported(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
    """Refuses timm's SKNet in SK-ResNet*; checkpoints under our own names have no such mark and may be either.

    Raises:
        ValueError: timm's keys, and a model of the other form.
    """
    if any('.paths.' in key for key in keys):
        check_form('sknet')(keys, target, name)


SOURCE = Source(
    name='timm',
    marks={
        'sk': r'\.conv[12]\.paths\.[01]\.',
        'cbam': r'\.se\.channel\.fc1\.',
        PLAIN: r'^layer1\.0\.conv1\.weight$',
    },
    home='https://github.com/huggingface/pytorch-image-models',
    licence='apache-2.0',
    own_names=('se', 'eca'),
    rules=(
        # Its SK blocks keep a convolution and its BatchNorm in one module.
        (r'^(layer\d\.\d+)\.conv([13])\.(conv|bn)\.', r'\1.\3\2.'),
        (r'\.conv2\.paths\.0\.(conv|bn)\.', r'.conv2.\g<1>1.'),
        (r'\.conv2\.paths\.1\.(conv|bn)\.', r'.conv2.\g<1>2.'),
        (r'\.conv2\.attn\.fc_reduce\.', '.conv2.fc1.'),
        (r'\.conv2\.attn\.bn\.', '.conv2.bn.'),
        (r'\.conv2\.attn\.fc_select\.', '.conv2.fc2.'),
        (r'\.se\.channel\.fc([12])\.', r'.se.fc\1.'),
        (r'\.se\.spatial\.conv\.(conv|bn)\.', r'.se.\1.'),
    ),
    values=(
        (r'\.se\.spatial\.conv\.conv\.weight$', flipped),
        (r'\.se\.(?:channel\.)?fc[12]\.weight$', reshaped),
        (r'\.se\.conv\.weight$', padded),
    ),
    zeros=r'\.se\.fc[12]\.bias$',
    checks=(check_width, check_whole_input, check_form_of_ported),
    alias={PLAIN: ('torchvision',)},
)
