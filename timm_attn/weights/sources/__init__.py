"""One file per source of checkpoints. To add one: write its file, and name it here."""

from . import (
    cadene,
    ecanet,
    fcanet,
    gam,
    gsop,
    insight,
    jongchan,
    moskomule,
    own,
    pytorchcv,
    refused,
    simam,
    srm,
    timm_,
    triplet,
)
from .base import Source

# In the order in which a state dict is asked for their marks.
SOURCES: tuple[Source, ...] = (
    cadene.SOURCE,
    refused.GCT,
    refused.GC,
    refused.SCSA,
    pytorchcv.SOURCE,
    jongchan.SOURCE,
    ecanet.SOURCE,
    fcanet.SOURCE,
    simam.SOURCE,
    srm.SOURCE,
    gsop.SOURCE,
    triplet.SOURCE,
    gam.SOURCE,
    insight.SOURCE,
    insight.SK_SOURCE,
    insight.SGE_SOURCE,
    moskomule.SOURCE,
    timm_.SOURCE,
    own.SOURCE,
)
