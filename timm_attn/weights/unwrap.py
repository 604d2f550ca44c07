"""The state dict inside a training checkpoint: wrappers, prefixes, averaged weights beside raw ones."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_logger = logging.getLogger(__name__)

WEIGHTS = ('ema', 'raw')
# Entries that hold the weights, in the order in which they are looked for.
_AVERAGED = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'ema', 'params_ema')
_RAW = ('state_dict', 'model_state_dict', 'model', 'net', 'network', 'module', 'params')
# What Lightning's WeightAveraging adds; its 'state_dict' is the average then.
_LIGHTNING_RAW, _LIGHTNING_MARK = 'current_model_state', 'averaging_state'
# Prefixes of torch.compile and DataParallel may stand before some keys only; the others are those of a whole module.
_TRANSPARENT = ('_orig_mod.', 'module.')
_AVERAGED_PREFIXES = ('model_ema.', 'ema_model.', 'ema.', 'averaged_model.')
_RAW_PREFIXES = ('model.', 'net.', 'network.', 'backbone.')
# The counter of torch.optim.swa_utils.AveragedModel.
_COUNTER = 'n_averaged'


@dataclass(frozen=True)
class Unwrapped:
    """The weights of a checkpoint.

    Attributes:
        state_dict: Without wrappers and prefixes.
        kind: 'ema' for averaged weights, 'raw' for those beside which averaged ones were left, '' where the
            checkpoint holds one set and does not say that it is an average.
    """

    state_dict: dict[str, Tensor]
    kind: str


def some(names: Iterable[Any], limit: int = 1000) -> str:
    """Names joined by commas; of very many, the first ones and how many more.

    Args:
        names: What is listed.
        limit: How many at most.
    """
    names = list(map(str, names))
    return ', '.join(names[:limit]) + (f', ... ({len(names) - limit} more)' if len(names) > limit else '')


def unwrap(checkpoint: Mapping[str, Any], weights: str | None = None, prefix: str | None = None) -> Unwrapped:
    """Finds the state dict of a checkpoint; tensors are looked at, not read.

    A log line says which weights are taken where there are averaged ones and raw ones, and what `prefix` leaves out.

    Args:
        checkpoint: A state dict, or a dict that holds one as 'state_dict', 'model_state_dict', 'model', 'net', ...,
            averaged ones as 'model_ema', 'state_dict_ema', ... .
        weights: 'ema' or 'raw'; None takes the averaged ones where there are both.
        prefix: Take the keys that begin with it, without it. None takes off 'module.', '_orig_mod.', and 'model.',
            'net.', 'network.' or 'backbone.' where every key has it.

    Raises:
        ValueError: There is no tensor, something else stands among them, two keys become one, the weights asked for
            are not there, or the prefix has to be named.
    """
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights (={weights!r}) must be one of: 'ema', 'raw', or None.")
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f'Expected a state dict or a checkpoint that holds one, not {type(checkpoint).__name__}: pass '
            'model.state_dict(), or what torch.load returned.'
        )
    found, kind, left = _enter(checkpoint, weights)
    if found.keys() & {_COUNTER}:
        found = {k: v for k, v in found.items() if k != _COUNTER}
        kind = 'ema'
    _check_tensors_only(found)
    plain, inner, beside = _without_prefixes(found, weights, prefix)
    kind, left = inner or kind, beside or left
    if weights and kind != weights and (weights == 'ema' or kind == 'ema'):
        have = 'averaged weights only' if kind == 'ema' else 'no averaged weights'
        raise ValueError(f'The checkpoint holds {have}, and weights={weights!r} was asked for: leave it out.')
    if left and weights is None:
        _logger.warning(
            "The checkpoint holds averaged weights and raw ones (%s): the averaged ones are taken. weights='raw' "
            '(--weights raw) takes the others.',
            left,
        )
    return Unwrapped(plain, kind)


def _enter(checkpoint: Mapping[str, Any], weights: str | None) -> tuple[Mapping[str, Any], str, str]:
    """The innermost dict, which weights it holds, and the entry of raw weights beside averaged ones."""
    found, kind, left = checkpoint, '', ''
    passed: set[int] = set()
    while True:
        if id(found) in passed:
            raise ValueError('The checkpoint holds no weights: its entries lead back to itself.')
        passed.add(id(found))
        lightning = _LIGHTNING_MARK in found and _LIGHTNING_RAW in found
        averaged = ('state_dict',) if lightning else _AVERAGED
        names = (_LIGHTNING_RAW,) if lightning else _RAW
        ema, raw = _one_of(found, averaged), _one_of(found, names)
        if ema and (weights != 'raw' or not raw):
            kind, left = 'ema', raw
            found = found[ema]
        elif raw:
            kind = 'raw' if ema else kind
            found = found[raw]
        else:
            return found, kind, left


def _one_of(found: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The entry of these names that holds weights, empty for none."""
    inner = {n: v for n in names if isinstance(v := found.get(n), Mapping) and _holds_weights(v)}
    if len({id(v) for v in inner.values()}) > 1:
        raise ValueError(
            f'The checkpoint holds several sets of weights, {some(map(repr, inner))}: pass the one that is meant.'
        )
    return next(iter(inner), '')


def _holds_weights(found: Mapping[str, Any]) -> bool:
    wrappers = (*_AVERAGED, *_RAW)
    return any(isinstance(v, Tensor) or (k in wrappers and isinstance(v, Mapping)) for k, v in found.items())


def _check_tensors_only(found: Mapping[Any, Any]) -> None:
    strange = [type(k).__name__ for k in found if not isinstance(k, str)]
    if strange:
        raise ValueError(f'A state dict has texts for keys; this one has also: {some(sorted(set(strange)))}.')
    if not any(isinstance(v, Tensor) for v in found.values()):
        inner = [
            k for k, v in found.items() if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values())
        ]
        hint = f' If one of {some(map(repr, inner), 5)} is the network, pass that entry.' if inner else ''
        raise ValueError(f'The checkpoint holds no weights: its entries are {list(found)[:1000] or "none"}.{hint}')
    other = {k: type(v).__name__ for k, v in found.items() if not isinstance(v, Tensor)}
    if other:
        shown = dict(list(other.items())[:100])
        raise ValueError(f'A state dict holds tensors only; this one has also: {shown}.')


def _without_prefixes(
    found: Mapping[str, Tensor], weights: str | None, prefix: str | None
) -> tuple[dict[str, Tensor], str, str]:
    """The keys without what stands before all of them, which weights they are, and the prefix of raw ones beside."""
    kind = left = ''
    if prefix is not None:
        taken = {k[len(prefix) :]: v for k, v in found.items() if prefix and k.startswith(prefix)}
        if not taken:
            raise ValueError(f'No key begins with prefix (={prefix!r}); the first are: {some(found, 5)}.')
        if rest := [k for k in found if not k.startswith(prefix)]:
            _logger.warning("prefix %r leaves out %d of the checkpoint's keys: %s.", prefix, len(rest), some(rest, 5))
        found = taken
    while True:
        plain = _without_transparent(found)
        groups = {p: sum(k.startswith(p) for k in plain) for p in (*_AVERAGED_PREFIXES, *_RAW_PREFIXES)}
        groups = {p: n for p, n in groups.items() if n}
        if not groups:
            return plain, kind, left
        ema = next((p for p in groups if p in _AVERAGED_PREFIXES), None)
        raw = next((p for p in groups if p in _RAW_PREFIXES), None)
        # Of several, or of one beside other keys, only the caller knows which is the network.
        if sum(groups.values()) < len(plain) or len(groups) > bool(ema) + bool(raw):
            rest = [k for k in plain if not k.startswith(tuple(groups))]
            named = some(f"'{p}' ({n} of {len(plain)} keys)" for p, n in groups.items())
            beside = f', beside {some(rest, 3)}' if rest else ''
            raise ValueError(
                f'The network may stand under {named}{beside}: say where with prefix={next(iter(groups))!r} '
                f'(--prefix {next(iter(groups))}); all other keys are left out then.'
            )
        chosen = ema if ema and (weights != 'raw' or not raw) else raw
        assert chosen is not None
        if ema:
            kind, left = ('ema', raw or '') if chosen == ema else ('raw', '')
        found = {k[len(chosen) :]: v for k, v in plain.items() if k.startswith(chosen)}
        if _COUNTER in found:
            found, kind = {k: v for k, v in found.items() if k != _COUNTER}, 'ema'


def _without_transparent(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for key, value in found.items():
        short = key
        while prefix := next((p for p in _TRANSPARENT if short.startswith(p)), None):
            short = short[len(prefix) :]
        if short in plain:
            raise ValueError(f"Without its prefix, '{key}' has the name of another key.")
        plain[short] = value
    return plain
