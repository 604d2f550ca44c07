"""One file per source of checkpoints. To add one: write its file, and name it here."""

from . import cadene, ecanet, gam, gsop, insight, jongchan, moskomule, own, pytorchcv, srm, timm_, triplet
from .base import Source

# In the order in which a state dict is asked for their marks.
SOURCES: tuple[Source, ...] = (
    cadene.SOURCE,
    pytorchcv.SOURCE,
    jongchan.SOURCE,
    ecanet.SOURCE,
    srm.SOURCE,
    gsop.SOURCE,
    triplet.SOURCE,
    gam.SOURCE,
    insight.SOURCE,
    insight.SK_SOURCE,
    moskomule.SOURCE,
    timm_.SOURCE,
    own.SOURCE,
)
