"""Attention ResNets for timm. Importing this package makes `timm.create_model` know them."""

import importlib
import types

from . import models as models
from .explain import attention_health as attention_health
from .explain import attention_maps as attention_maps
from .fusion import fuse as fuse
from .hub import load_from_hub as load_from_hub
from .hub import push_to_hub as push_to_hub
from .hub import save as save
from .hub.load import load as load
from .injection import eject as eject
from .injection import freeze_backbone as freeze_backbone
from .injection import inject as inject
from .layers import attn_sites as attn_sites
from .layers import create_attn as create_attn
from .layers import get_attn as get_attn
from .layers import list_attn as list_attn
from .layers import register_attn as register_attn
from .version import package_version
from .weights import convert as convert

__version__ = package_version()


def __getattr__(name: str) -> types.ModuleType:
    """Imports `timm_attn.lab` when it is asked for: training and statistics need the extra `lab`."""
    if name == 'lab':
        return importlib.import_module('timm_attn.lab')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
