"""The same function in less memory: ResNet blocks that recompute what is cheap, and fold what is constant.

A convolution's backward needs its input, a BatchNorm's its own. Between them lie a BatchNorm's output, a ReLU and the
attention, which plain autograd keeps too, although all of them follow from the convolution's output in a few passes
over memory. A fused block keeps the outputs of its convolutions and its own output, and recomputes the rest.
"""

from ..models import FINISHERS
from .blocks import fuse as fuse

__all__ = ['fuse']

# timm.create_model('cbam_resnet50', fused=True)
FINISHERS['fused'] = fuse
