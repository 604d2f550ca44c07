"""SimAM of its authors. It has no weights: a net with it has a plain ResNet's, but for one name.

Code: https://github.com/ZjjConan/SimAM @ae98f43 (no licence)
"""

from collections.abc import Mapping

from torch import Tensor

from .base import Source, Target

# Its published networks, whose files do not hold it; the code's own default is another.
LAMBDA = 0.1


def check_lambda(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
    """Refuses the published weights in a model with another lambda.

    Raises:
        ValueError: It is not that of the published networks.
    """
    given = target.attn_args.get('e_lambda', 1e-4)
    if target.attn == 'simam' and given != LAMBDA:
        raise ValueError(
            f'The published networks have e_lambda={LAMBDA:g}, which is not in their files, and this {target.name} has '
            f'{given:g}, which would give other logits. If yours was trained with that, rename its keys '
            "('conv2.0.weight' to 'conv2.weight') and pass source='timm_attn'."
        )


SOURCE = Source(
    name='simam',
    marks={'simam': r'^layer\d\.\d+\.conv2\.0\.weight$'},
    rules=((r'^(layer\d\.\d+)\.conv2\.0\.', r'\1.conv2.'),),
    home='https://github.com/ZjjConan/SimAM',
    checks=(check_lambda,),
)
