"""Networks that are known by their keys and that no model here is: refused with what they are."""

from collections.abc import Mapping

from torch import Tensor

from .base import Check, Source, Target


def _refuse(what: str, instead: str) -> Check:
    def refuse(keys: Mapping[str, Tensor], target: Target, name: str) -> None:
        """Refuses every checkpoint of this layout.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f'These are the weights of {what}, so {target.name} is another network. {instead}')

    return refuse


# Code: https://github.com/z-x-yang/GCT @68983ed (none stated for PyTorch/)
GCT = Source(
    name='gct',
    marks={'gct': r'(^|\.)(conv\d|downsample)\.0\.(alpha|gamma|beta)$'},
    home='https://github.com/z-x-yang/GCT',
    checks=(
        _refuse(
            "the GCT authors' network: a gate stands before every convolution, the stem's and the shortcuts' too, and "
            'the stride is in the first 1x1 convolution',
            'There is no model for them here.',
        ),
    ),
)
# Code: https://github.com/open-mmlab/mmdetection (Apache-2.0)
GC = Source(
    name='mmdetection',
    marks={'gc': r'\.\w*context_block\w*\.conv_mask\.'},
    home='https://github.com/open-mmlab/mmdetection',
    licence='apache-2.0',
    checks=(
        _refuse(
            "a detector's backbone with global context blocks in its stages 2 to 4 alone",
            "gc_resnet18 and gc_resnet50 have one in every block: inject 'gc' where these have theirs.",
        ),
    ),
)
# Code: https://github.com/HZAI-ZJNU/SCSA @8c46866 (Apache-2.0)
SCSA = Source(
    name='mmpretrain',
    marks={'scsa': r'\.attn\.local_dwc\.weight$'},
    home='https://github.com/HZAI-ZJNU/SCSA',
    licence='apache-2.0',
    checks=(
        _refuse(
            "the SCSA authors' network: its attention stands behind the activation in the middle of a block",
            'scsa_resnet18 and scsa_resnet50 have it at the end of the residual branch.',
        ),
    ),
)
