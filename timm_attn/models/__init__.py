"""The registered models: importing this package makes timm know them."""

from ._build import FINISHERS as FINISHERS
from .attn_resnet import AttnResNet as AttnResNet
from .attn_resnet import cifar_stem_ as cifar_stem_
from .injected import injected_args as injected_args
from .simple_cnn import SimpleCNN as SimpleCNN
from .sk_resnet import SKResNet as SKResNet
