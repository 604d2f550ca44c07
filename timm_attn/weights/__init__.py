"""Weights: conversion of foreign checkpoints, warm starts, and the table of tags."""

from .convert import convert as convert
from .convert import list_sources as list_sources
from .load import checkpoint_filter_fn as checkpoint_filter_fn
from .tags import TAGS as TAGS
from .tags import Tag as Tag
from .tags import cfgs_of as cfgs_of
from .tags import weights_table as weights_table
from .warm_start import warm_start as warm_start
