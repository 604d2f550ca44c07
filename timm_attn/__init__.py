"""Attention ResNets for timm. Importing this package makes `timm.create_model` know them."""

from importlib.metadata import PackageNotFoundError, version

from . import models as models
from .injection import attn_sites as attn_sites
from .injection import inject as inject
from .layers import create_attn as create_attn
from .layers import get_attn as get_attn
from .layers import list_attn as list_attn

try:
    __version__ = version('timm_attn')
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = '0.1.0'
