"""What attention costs: time beside plain timm, in interleaved rounds, and the bytes kept for backward, exactly."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from .fusion import fuse
from .measure import seconds

MODES = ('inference', 'train')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
BASELINE = 'plain'
# Ways of running one of our models; the first three are what the package itself offers.
OURS = ('eager', 'fused', 'frozen')
COMPILED = ('compiled', 'autotuned')
# Conditions of a measured cell that tables leave unsaid.
USUAL = {'dtype': 'float32', 'batch': 4, 'size': 224, 'depth': 50, 'threads': 1, 'layout': 'contiguous'}
# What is no slower than this is as fast.
TOLERANCE = 1.02

Build = Callable[[], nn.Module]


def entrants(
    names: Sequence[str], baseline: str, ways: Sequence[str], *, compile: bool = True, backend: str = 'inductor'
) -> dict[str, Build]:
    """The plain model, and each model, in each of the ways: label -> how to build it.

    Args:
        names: Registered models.
        baseline: timm's plain model; its eager form is always there.
        ways: Of 'eager', 'fused', 'frozen' (fused and folded, for inference), 'compiled' (`torch.compile` with its
            defaults) and 'autotuned' (the same with `mode='max-autotune-no-cudagraphs'`).
        compile: As for `timm_attn.fuse`.
        backend: As for `torch.compile`.
    """
    make: dict[str, Callable[[nn.Module], nn.Module]] = {
        'eager': lambda model: model,
        'fused': lambda model: fuse(model, compile=compile),
        'frozen': lambda model: fuse(model, freeze=True, compile=compile),
        'compiled': lambda model: cast(nn.Module, torch.compile(model, backend=backend)),
        'autotuned': lambda model: cast(nn.Module, torch.compile(model, mode='max-autotune-no-cudagraphs')),
    }
    found: dict[str, Build] = {}
    for label, name in [(BASELINE, baseline), *((name, name) for name in names)]:
        for way in dict.fromkeys(['eager', *ways] if label == BASELINE else ways):
            suffix = '' if way == 'eager' else f' {way}'
            found[f'{label}{suffix}'] = lambda name=name, way=way: make[way](timm.create_model(name))
    return found


def autocast(device: str, dtype: str) -> AbstractContextManager[Any]:
    """The context in which a step runs: none for 'float32'.

    Args:
        device: 'cpu' or 'cuda'.
        dtype: One of `DTYPES`.
    """
    return nullcontext() if dtype == 'float32' else torch.autocast(device, DTYPES[dtype])


def step(model: nn.Module, x: Tensor, mode: str, dtype: str = 'float32') -> None:
    """One forward pass, in training a backward pass too; gradients are released.

    Args:
        model: The model, in its mode.
        x: Its input.
        mode: 'inference' or 'train'.
        dtype: 'float32', or 'bfloat16' for autocast.
    """
    if mode == 'inference':
        with torch.no_grad(), autocast(x.device.type, dtype):
            model(x)
        return
    with autocast(x.device.type, dtype):
        loss = model(x).float().square().mean()
    loss.backward()
    model.zero_grad()


def rounds_of(
    builds: Mapping[str, Build],
    mode: str,
    *,
    batch: int,
    size: int,
    dtype: str = 'float32',
    rounds: int = 10,
    steps: int = 1,
    device: str = 'cpu',
    channels_last: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times all models in turn, round after round, so that what disturbs the machine disturbs all alike.

    Args:
        builds: Label -> how to build the model.
        mode: 'inference' or 'train' (forward and backward).
        batch: Images.
        size: Their side in pixels.
        dtype: 'float32', or 'bfloat16' for autocast.
        rounds: Times that each model has its turn.
        steps: Steps in a turn.
        device: 'cpu' or 'cuda'.
        channels_last: Weights and images are in that memory format.

    Returns:
        Label -> 'seconds' a step in each round, 'first', the seconds of the first step, compilation included, and on a
        GPU 'peak_bytes', the most that a step holds beyond what was there before it.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    models: dict[str, nn.Module] = {}
    found: dict[str, dict[str, Any]] = {}
    for label, build in builds.items():
        with torch.device(device):
            model = build()
        model = models[label] = model.to(memory_format=layout).train(mode == 'train')  # pyright: ignore[reportCallIssue]
        start = time.perf_counter()
        step(model, x, mode, dtype)
        if device == 'cuda':
            torch.cuda.synchronize()
        found[label] = {'first': time.perf_counter() - start, 'seconds': []}
        if device == 'cuda':
            step(model, x, mode, dtype)  # settles what is allocated once
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(model, x, mode, dtype)
            found[label]['peak_bytes'] = torch.cuda.max_memory_allocated() - before
    for _ in range(rounds):
        for label, model in models.items():

            def turn(model: nn.Module = model) -> None:
                for _ in range(steps):
                    step(model, x, mode, dtype)

            found[label]['seconds'].append(seconds(turn, device) / steps)
    return found


def summary(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median, quartiles and the ratio to the baseline of the same round, median and quartiles too.

    Args:
        found: What `rounds_of` returned, with the baseline; bytes counted meanwhile stay in the rows.
    """
    rows = []
    for label, times in found.items():
        seconds = times['seconds']
        ratio, quartiles = _ratio(found, label, BASELINE)
        rows.append(
            {
                'model': label,
                'median': statistics.median(seconds),
                'quartiles': _quartiles(seconds),
                'ratio': ratio,
                'ratio_quartiles': quartiles,
                'first': times['first'],
                **{key: value for key, value in times.items() if key.endswith('_bytes')},
            }
        )
    return rows


def _ratio(found: Mapping[str, Mapping[str, Any]], label: str, base: str) -> tuple[float, list[float]]:
    """Median and quartiles of a model's time over another's of the same round."""
    ratios = [a / b for a, b in zip(found[label]['seconds'], found[base]['seconds'], strict=True)]
    return statistics.median(ratios), _quartiles(ratios)


def _does(share: float) -> str:
    return f'{"saves" if share < 1 else "costs"} {100 * abs(1 - share):.0f} % of a step'


def advice(found: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """What the measured rounds say to do with a model, in a line.

    A way is said to be faster or slower only where three quarters of the rounds say so, and by more than `TOLERANCE`.

    Args:
        found: What `rounds_of` returned, with 'kept_bytes' where they were counted.
        name: The registered model, whose eager form is there.
    """
    if len(found[name]['seconds']) < 4:
        return f'{name}: 4 rounds or more tell what to do.'
    code = {
        'fused': f"timm.create_model('{name}', fused=True)",
        'frozen': 'timm_attn.fuse(model, freeze=True)',
        'compiled': 'torch.compile(model)',
    }
    ways = [way for way in code if f'{name} {way}' in found]
    against = {way: _ratio(found, f'{name} {way}', name) for way in ways}
    faster = [way for way in ways if against[way][0] * TOLERANCE < 1 and against[way][1][1] < 1]
    best = min(faster, key=lambda way: against[way][0], default=None)
    parts, smaller = [], False
    for way in sorted(ways, key=lambda way: way != best):
        share, (low, _) = against[way]
        slower = share > TOLERANCE and low > 1
        part = f'{way} {_does(share)}' if way in faster or slower else f'{way} takes as long as eager'
        kept = [found[label].get('kept_bytes') for label in (name, f'{name} {way}')]
        if kept[0] is not None and kept[1] is not None:
            less = kept[0] - kept[1]
            smaller |= less > 0
            size = f'{abs(less) / 1e9:.1f} GB' if abs(less) >= 1e8 else f'{abs(less) / 1e6:.0f} MB'
            part += f' and {"saves" if less > 0 else "keeps"} {size}{"" if less > 0 else " more"}'
        parts.append(part + f' ({code[way]})' * (way == best))
    if best:
        todo = ''
    elif smaller:
        todo = ' Leave it eager for speed; fuse it where memory limits the batch.'
    else:
        todo = ' Leave it eager.'
    return f'{name}: {", ".join(parts)} here.{todo}'


def kinds(cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a measured cell by their labels without the model's name: 'eager', 'fused', 'plain fused', ...

    Args:
        cell: Of `benchmarks/results/speed.json`: 'attn', 'depth' and the 'rows' of `summary`.
    """
    name = f'{cell["attn"]}_resnet{cell["depth"]}'
    return {
        r['model']
        if r['model'].startswith(BASELINE)
        else r['model'].removeprefix(name).removeprefix(cell['attn']).strip() or 'eager': r
        for r in cell['rows']
    }


def unusual(cell: Mapping[str, Any]) -> str:
    """The conditions of a measured cell that are not the usual ones, in words; empty for the usual ones.

    Args:
        cell: Of `benchmarks/results/speed.json`.
    """
    words = {'dtype': '{}', 'batch': 'batch {}', 'size': '{} px', 'depth': 'depth {}', 'threads': '{} threads'}
    return ', '.join(words.get(k, '{}').format(cell[k]) for k, v in USUAL.items() if cell[k] != v)


def fastest_peer(ratios: Mapping[str, float]) -> str | None:
    """The kind of row, neither ours nor the compiler's nor plain, of the least ratio."""
    peers = [k for k in ratios if k not in (*OURS, *COMPILED) and not k.startswith(BASELINE)]
    return min(peers, key=ratios.__getitem__) if peers else None


def losses(ratios: Mapping[str, float]) -> list[str]:
    """Where ours takes more than `TOLERANCE` of a rival's time.

    The eager form's rival is the fastest peer; the fused form's are that, the eager form and torch.compile's.

    Args:
        ratios: Kind of row -> its ratio to the plain model's time.
    """
    peer = fastest_peer(ratios)
    pairs = [('eager', peer), ('fused', 'eager'), ('fused', 'compiled'), ('fused', peer)]
    shown = {'compiled': 'torch.compile', 'eager': 'eager', peer: peer}
    return [
        f'{ours} {ratios[ours] / ratios[rival]:.2f} of {shown[rival]}'
        for ours, rival in pairs
        if ours in ratios and rival in ratios and ratios[ours] > TOLERANCE * ratios[rival]
    ]


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method='inclusive')
    return [low, high]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `summary` as aligned text."""
    width = max(len(row['model']) for row in rows)
    kept = any('kept_bytes' in row for row in rows)
    lines = [f'{"model":{width}}  {"ms":>8}  {"ratio":>6}  {"quartiles":>13}' + (f'  {"kept MB":>8}' if kept else '')]
    for row in rows:
        low, high = row['ratio_quartiles']
        line = f'{row["model"]:{width}}  {1e3 * row["median"]:8.1f}  {row["ratio"]:6.3f}  {low:6.3f} {high:6.3f}'
        lines.append(line + (f'  {row["kept_bytes"] / 1e6:8.1f}' if 'kept_bytes' in row else ''))
    return '\n'.join(lines)
