"""Weights: conversion of foreign checkpoints, warm starts, and the table of tags."""

from ._convert import convert as convert
from ._convert import list_sources as list_sources
from ._load import checkpoint_filter_fn as checkpoint_filter_fn
from ._warm_start import warm_start as warm_start
from .tags import TAGS as TAGS
from .tags import Tag as Tag
from .tags import cfgs_of as cfgs_of
from .tags import weights_table as weights_table
