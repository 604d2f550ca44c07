"""Checkpoints of other sources, as the tests of `weights` make them."""

from weights.conftest import filled, golden, plain, randomise, served, signal, with_weights

__all__ = ['filled', 'golden', 'plain', 'randomise', 'served', 'signal', 'with_weights']
