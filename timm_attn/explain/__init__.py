"""What attentions do with an input: their gates, whether they do anything, and pictures of both."""

from .draw import Explanation as Explanation
from .draw import draw_explanation as draw_explanation
from .draw import draw_summary as draw_summary
from .draw import figure_image as figure_image
from .gates import attention_maps as attention_maps
from .gates import gate_kinds as gate_kinds
from .gates import gates_only as gates_only
from .gates import stage_sites as stage_sites
from .health import GateHealth as GateHealth
from .health import GateStats as GateStats
from .health import attention_health as attention_health
from .model import is_untrained as is_untrained
from .model import load_model as load_model
from .panels import percent as percent
from .pictures import LabelledImage as LabelledImage
from .pictures import explain as explain
from .pictures import explain_image as explain_image
from .space import write_space as write_space
