"""One file per attention. To add one: write its file, and import it here."""

from ._base import Attention as Attention
from ._base import Gate as Gate
from ._base import attn_sites as attn_sites
from ._base import gain_keys as gain_keys
from ._base import read_gain as read_gain
from ._registry import AttnSpec as AttnSpec
from ._registry import accepted_args as accepted_args
from ._registry import check_attn_args as check_attn_args
from ._registry import create_attn as create_attn
from ._registry import get_attn as get_attn
from ._registry import list_attn as list_attn
from ._registry import register_attn as register_attn
from .bam import BAM as BAM
from .cbam import CBAM as CBAM
from .csa import ChannelSelfAttention as ChannelSelfAttention
from .eca import ECA as ECA
from .gam import GAM as GAM
from .gsop import GSoP as GSoP
from .se import SqueezeExcite as SqueezeExcite
from .sk import SelectiveKernel as SelectiveKernel
from .srm import SRM as SRM
from .triplet import TripletAttention as TripletAttention
