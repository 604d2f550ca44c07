"""GAM in the code that circulates; its authors released none.

Code: https://github.com/northBeggar/Plug-and-Play @96c81b4 (no licence)
"""

from collections.abc import Mapping

from torch import Tensor

from .base import Source, Target


def check_stated_gate(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
    """Demands what the keys cannot tell: whether the channel gate had a sigmoid, and where grouped maps were shuffled.

    Raises:
        ValueError: The caller did not say so.
    """
    if 'channel_gate' not in target.attn_args:
        raise ValueError(
            'The keys of GAM do not tell whether its channel gate has a sigmoid: the circulating code has none, the '
            "default here has one. Say it with attn_args={'channel_gate': None} or {'channel_gate': 'sigmoid'}."
        )
    if target.attn_args.get('groups', 1) > 1 and 'shuffle' not in target.attn_args:
        raise ValueError(
            'The keys of a grouped GAM do not tell what is shuffled: the circulating code shuffles the gate, the '
            "default here the hidden map. Say it with attn_args={'shuffle': 'gate'} or {'shuffle': 'hidden'}."
        )


SOURCE = Source(
    name='gam',
    marks={'gam': r'\.channel_attention\.0\.'},
    home='https://github.com/northBeggar/Plug-and-Play',
    rules=(
        (r'^(layer\d\.\d+)\.\w+\.channel_attention\.0\.', r'\1.se.fc1.'),
        (r'^(layer\d\.\d+)\.\w+\.channel_attention\.2\.', r'\1.se.fc2.'),
        (r'^(layer\d\.\d+)\.\w+\.spatial_attention\.0\.', r'\1.se.conv1.'),
        (r'^(layer\d\.\d+)\.\w+\.spatial_attention\.1\.', r'\1.se.bn1.'),
        (r'^(layer\d\.\d+)\.\w+\.spatial_attention\.3\.', r'\1.se.conv2.'),
        (r'^(layer\d\.\d+)\.\w+\.spatial_attention\.4\.', r'\1.se.bn2.'),
    ),
    checks=(check_stated_gate,),
)
