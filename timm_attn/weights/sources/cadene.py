"""SE nets of the Caffe release in Cadene's layout, which timm has as `legacy_seresnet*`: other networks than ours.

Code: https://github.com/Cadene/pretrained-models.pytorch @8aae3d8 (BSD-3-Clause)
"""

import re
from collections.abc import Mapping

from torch import Tensor

from .base import Source, Target


def refuse(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
    """Refuses every checkpoint of this layout.

    Raises:
        ValueError: Always; it names the timm model that these weights fit.
    """
    depth = re.search(r'\d+', target.name)
    legacy = f'legacy_seresnet{depth.group() if depth else 50}'
    raise ValueError(
        f'These are the weights of an SE net in the Caffe layout (Cadene, timm {legacy}): their stride is in the first '
        f'1x1 convolution and their max-pool has no padding, so in {target.name}, whose stride is in the 3x3, they '
        f"would fit and give other logits. Use timm.create_model('{legacy}')."
    )


SOURCE = Source(
    name='cadene',
    marks={'se': r'^layer0\.conv1\.|\.se_module\.'},
    home='https://github.com/Cadene/pretrained-models.pytorch',
    licence='bsd-3-clause',
    checks=(refuse,),
)
