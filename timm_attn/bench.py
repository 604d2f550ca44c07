"""What attention costs: time beside plain timm, in interleaved rounds, and the bytes kept for backward, exactly."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .fusion import fuse
from .measure import clock

MODES = ('inference', 'train')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
BASELINE = 'plain'
OURS = ('eager', 'fused', 'frozen')

Build = Callable[[], nn.Module]


def entrants(names: list[str], baseline: str, mode: str, compile: bool = True) -> dict[str, Build]:
    """The plain model, and each model eager and fused: label -> how to build it.

    Args:
        names: Registered models.
        baseline: timm's plain model.
        mode: 'inference', where fused models are frozen too, or 'train'.
        compile: As for `timm_attn.fuse`.
    """

    def fused(name: str, freeze: bool) -> Build:
        return lambda: fuse(timm.create_model(name), freeze=freeze, compile=compile)

    found: dict[str, Build] = {BASELINE: lambda: timm.create_model(baseline)}
    for label, name in [(BASELINE, baseline), *((name, name) for name in names)]:
        if label != BASELINE:
            found[label] = lambda name=name: timm.create_model(name)
        found[f'{label} fused'] = fused(name, False)
        if mode == 'inference':
            found[f'{label} frozen'] = fused(name, True)
    return found


def _step(model: nn.Module, x: Tensor, mode: str, autocast: AbstractContextManager[Any]) -> None:
    if mode == 'inference':
        with torch.no_grad(), autocast:
            model(x)
        return
    with autocast:
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
    device: str = 'cpu',
) -> dict[str, dict[str, Any]]:
    """Times all models in turn, round after round, so that what disturbs the machine disturbs all alike.

    Args:
        builds: Label -> how to build the model.
        mode: 'inference' or 'train' (forward and backward).
        batch: Images.
        size: Their side in pixels.
        dtype: 'float32', or 'bfloat16' for autocast.
        rounds: Timed steps of each model.
        device: 'cpu' or 'cuda'.

    Returns:
        Label -> 'seconds' of each round and 'first', the seconds of the first step, compilation included.
    """
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size, device=device)
    models = {label: build().to(device).train(mode == 'train') for label, build in builds.items()}

    def step(model: nn.Module) -> None:
        autocast = nullcontext() if dtype == 'float32' else torch.autocast(device, DTYPES[dtype])
        _step(model, x, mode, autocast)

    found: dict[str, dict[str, Any]] = {}
    for label, model in models.items():
        start = time.perf_counter()
        step(model)
        found[label] = {'first': time.perf_counter() - start, 'seconds': []}
        step(model)
    for _ in range(rounds):
        for label, model in models.items():
            start = clock(device)
            step(model)
            found[label]['seconds'].append(clock(device) - start)
    return found


def summary(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median, quartiles and the ratio to the baseline of the same round, median and quartiles too.

    Args:
        found: What `rounds_of` returned.
    """
    base = found[BASELINE]['seconds']
    rows = []
    for label, times in found.items():
        seconds = times['seconds']
        ratios = [t / b for t, b in zip(seconds, base, strict=True)]
        rows.append(
            {
                'model': label,
                'median': statistics.median(seconds),
                'quartiles': _quartiles(seconds),
                'ratio': statistics.median(ratios),
                'ratio_quartiles': _quartiles(ratios),
                'first': times['first'],
            }
        )
    return rows


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


def fastest_peer(ratios: Mapping[str, float]) -> str | None:
    """The kind of row, neither ours nor plain, of the least ratio."""
    peers = [k for k in ratios if k not in OURS and not k.startswith(BASELINE)]
    return min(peers, key=ratios.__getitem__) if peers else None


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
