"""This package's own checkpoints, found by the model's keys."""

from .base import Source

SOURCE = Source(name='timm_attn', marks={})
