"""pytorchcv's SE, CBAM, BAM and SK nets.

Code: https://github.com/osmr/pytorchcv @7f31dc8 (MIT)
"""

import re
from collections.abc import Mapping

from torch import Tensor

from .base import PLAIN, Source, Target, check_form, check_product

KNOWN_SHA1 = {
    '459e6871e944d1c7102ee9c055ea428b8d9a168c': 'seresnet50b',
    'b83a20fd2ad9a32e0fe5cb3daef45aac03ea3194': 'seresnet101b',
    '004bfde422c860c4f11b1e1190bb5a8db477d939': 'seresnet50',
    '37851448605dae67bbf83ff8e7f7e7cc367e1746': 'seresnet101',
    '7a6b02ac25caccb0420eea542c625f9b0bfb3e03': 'seresnet152',
}


def check_stride(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
    """Refuses plain and SE bottleneck nets unless the caller says that their stride is in the 3x3 convolution.

    Raises:
        ValueError: The name lacks the 'b' of pytorchcv's nets with the stride in the 3x3.
    """
    net = name.partition('/')[2]
    kind = SOURCE.attn_of(keys)
    bottleneck = any('.body.conv3.' in key for key in keys)
    if kind not in ('se', PLAIN) or not bottleneck or re.fullmatch(r'(se)?resnet\d+b', net):
        return
    family = 'seresnet' if kind == 'se' else 'resnet'
    depth = (re.search(r'\d+', net or target.name) or ['50'])[0]
    given = f"'{net}' has the stride" if net else f"'{family}{depth}' has the stride"
    legacy = f": timm's with the stride in the 1x1, with weights of its own, is legacy_seresnet{depth}"
    raise ValueError(
        f"pytorchcv's {family}{depth} and {family}{depth}b have the same keys and are different networks: {given} in "
        f'the first 1x1 convolution, and its weights would give other logits in {target.name}. For the one with the b, '
        f"pass source='pytorchcv/{family}{depth}b'; for the other there is no model here"
        f'{legacy if kind == "se" else ""}.'
    )


def _block(match: re.Match[str]) -> str:
    return f'layer{match[1]}.{int(match[2]) - 1}.'  # units count from 1


SOURCE = Source(
    name='pytorchcv',
    marks={
        'sk': r'^features\..*\.body\.conv2\.branches\.',
        'cbam': r'^features\..*\.cbam\.ch_gate\.',
        'bam': r'^features\..*\.unit1\.bam\.',
        'se': r'^features\..*\.se\.conv1\.',
        PLAIN: r'^features\.init_block\.',
    },
    home='https://github.com/osmr/pytorchcv',
    licence='mit',
    rules=(
        (r'^features\.init_block\.conv\.conv\.', 'conv1.'),
        (r'^features\.init_block\.conv\.bn\.', 'bn1.'),
        (r'^output\.', 'fc.'),
        # BAM stands before stages 2 to 4 there, behind 1 to 3 here.
        (r'^features\.stage2\.unit1\.bam\.', 'layer1.END.'),
        (r'^features\.stage3\.unit1\.bam\.', 'layer2.END.'),
        (r'^features\.stage4\.unit1\.bam\.', 'layer3.END.'),
        (r'^features\.stage(\d)\.unit(\d+)\.(?:res_unit\.)?', _block),
        (r'\.body\.conv2\.branches\.branch2\.(conv|bn)\.', r'.conv2.\g<1>1.'),
        (r'\.body\.conv2\.branches\.branch3\.(conv|bn)\.', r'.conv2.\g<1>2.'),
        (r'\.body\.conv2\.fc1\.conv\.', '.conv2.fc1.'),
        (r'\.body\.conv2\.fc1\.bn\.', '.conv2.bn.'),
        (r'\.body\.conv2\.fc2\.', '.conv2.fc2.'),
        (r'\.body\.conv(\d)\.(conv|bn)\.', r'.\2\1.'),
        (r'\.identity_conv\.conv\.', '.downsample.0.'),
        (r'\.identity_conv\.bn\.', '.downsample.1.'),
        (r'\.se\.conv([12])\.', r'.se.fc\1.'),
        (r'\.cbam\.ch_gate\.mlp\.fc([12])\.', r'.se.fc\1.'),
        (r'\.cbam\.sp_gate\.conv\.(conv|bn)\.', r'.se.\1.'),
        (r'\.END\.ch_att\.init_fc\.(fc|bn)\.', r'.END.\g<1>1.'),
        (r'\.END\.ch_att\.final_fc\.', '.END.fc2.'),
        (r'\.END\.sp_att\.init_conv\.(conv|bn)\.', r'.END.\1_reduce.'),
        (r'\.END\.sp_att\.dil_convs\.conv([12])\.(conv|bn)\.', r'.END.\2_dil\1.'),
        (r'\.END\.sp_att\.final_conv\.', '.END.conv_final.'),
    ),
    checks=(check_stride, check_product, check_form('sknet')),
    nets=r'((bam_|cbam_|se)?resnet|sknet)\d+b?',
    known_sha1=KNOWN_SHA1,
)
