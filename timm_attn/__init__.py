"""Attention ResNets for timm. Importing this package makes `timm.create_model` know them."""

from .layers import create_attn as create_attn
from .layers import list_attn as list_attn
