"""From the records of runs to rows, tables and the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..explain.images import skipped_line
from .stats import FEWEST_SEEDS, VERDICTS, Estimate, Judgement, estimate, judge, reading, signed


@dataclass(frozen=True)
class Row:
    """A model's line: accuracies in percent over seeds, and what they cost.

    Args:
        label: The model's name.
        parameters: How many.
        top1: Over the seeds that are there.
        difference: To the first model, over the seeds both have; None for the first model, or with no common seed.
        seconds: Per training epoch, median over seeds.
        activation_mib: What autograd keeps for one training step.
        judged: What the difference allows to say, beside those of the other models; None where there is none.
    """

    label: str
    parameters: int
    top1: Estimate
    difference: Estimate | None
    seconds: float
    activation_mib: float
    judged: Judgement | None = None


def rows(runs: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[Row]:
    """One row per model that has a finished run, in the order given; the first label is what others are compared with.

    Args:
        runs: Records as `train.run` returns them.
        labels: Of all models of the comparison.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {label: {} for label in labels}
    for record in runs:
        found[record['model']['label']][record['seed']] = record
    first = found[labels[0]]
    result = []
    for label in labels:
        own = found[label]
        if not own:
            continue
        common = sorted(own.keys() & first.keys()) if label != labels[0] else []
        some = next(iter(own.values()))
        result.append(
            Row(
                label=label,
                parameters=some['parameters'],
                top1=estimate([own[s]['top1'] for s in sorted(own)]),
                difference=estimate([_difference(own[s], first[s]) for s in common]) if common else None,
                seconds=float(np.median([r['seconds_per_epoch'] for r in own.values()])),
                activation_mib=some['activation_mib'],
            )
        )
    judged = judge({row.label: row.difference.values for row in result if row.difference is not None})
    return [replace(row, judged=judged.get(row.label)) for row in result]


def _difference(own: dict[str, Any], first: dict[str, Any]) -> float:
    return round(own['top1'] - first['top1'], 9)  # Equal accuracies are equal: no noise of their subtraction.


def cells(table: Sequence[Row], clock: str) -> tuple[list[str], list[list[str]]]:
    """Heads and text of each cell.

    Args:
        table: The rows.
        clock: 'cpu' or 'wall', said in the head of the time.
    """
    heads = [
        'model',
        'parameters',
        'top-1 %',
        'seeds',
        'difference [corrected 95 %]',
        f'{clock} s/epoch',
        'activations MiB',
    ]
    body = []
    for row in table:
        accuracy = f'{row.top1.mean:.2f}'
        if not math.isnan(row.top1.deviation):
            accuracy += f' ± {row.top1.deviation:.2f}'
        body.append(
            [
                row.label,
                f'{row.parameters:,}',
                accuracy,
                str(len(row.top1.values)),
                _shown(row),
                f'{row.seconds:.2f}',
                f'{row.activation_mib:.1f}',
            ]
        )
    return heads, body


def text_table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a terminal: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (heads, *body)) for i in range(len(heads))]
    lines = []
    for line in (heads, ['-' * w for w in widths], *body):
        others = [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        lines.append('  '.join([line[0].ljust(widths[0]), *others]).rstrip())
    return '\n'.join(lines)


def markdown_table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The same for a Markdown file."""
    lines = [heads, ['---'] + ['---:'] * (len(heads) - 1), *body]
    return '\n'.join('| ' + ' | '.join(c.replace('|', '\\|') for c in line) + ' |' for line in lines)


def readings(table: Sequence[Row], reference: str) -> list[str]:
    """One sentence per model but the first, by rule, with what the model costs."""
    base = next((r for r in table if r.label == reference), None)
    said = []
    for row in table:
        if row.difference is None or row.judged is None or base is None:
            continue
        cost = f'{row.parameters / base.parameters - 1:+.1%} parameters, {row.seconds / base.seconds:.2f}x the time'
        said.append(f'{reading(row.label, reference, row.difference, row.judged)} Cost: {cost}.')
    return said


def summary(table: Sequence[Row]) -> str:
    """One sentence on how many models differ from the first."""
    told = [r.judged.verdict for r in table if r.judged is not None]
    if not told:
        return 'Nothing to compare yet: no other model has a seed in common with the first.'
    counts = {v: told.count(v) for v in VERDICTS}
    said = ', '.join(f'{v}: {n}' for v, n in counts.items() if n)
    return f'Compared with {table[0].label}, of {len(told)} model{"s" * (len(told) > 1)}: {said}.'


def power(table: Sequence[Row]) -> str:
    """What the seeds could have shown at all; empty where there are too few."""
    able = [r.judged.detectable for r in table if r.judged is not None and not math.isnan(r.judged.detectable)]
    if not able:
        return ''
    smallest = f'{min(able):.2f}' + (f' to {max(able):.2f}' if len(able) > 1 else '')
    return (
        f'Power: with these seeds and the spread seen, a true difference of {smallest} points (by model) is shown in '
        'four of five such comparisons; a smaller one is mostly missed.'
    )


def report(comparison: dict[str, Any], runs: Sequence[dict[str, Any]], missing: Sequence[str]) -> str:
    """The report in Markdown.

    Args:
        comparison: What `comparison.json` holds.
        runs: Records of the finished runs.
        missing: Names of the runs that are not there yet.
    """
    labels = [m['label'] for m in comparison['models']]
    data, settings = comparison['data'], comparison['settings']
    table = rows(runs, labels)
    machines = sorted({environment_line(r['environment']) for r in runs})
    seeds = max((len(r.top1.values) for r in table), default=0)
    parts = [
        f'# {", ".join(labels)} on {data["name"]}',
        markdown_table(*cells(table, _clock(runs))),
        '## Reading',
        summary(table),
        '\n'.join(f'* {line}' for line in readings(table, labels[0])),
        power(table),
        '![Differences, and accuracy against parameters and time](comparison.png)',
        '![Error and loss by epoch](curves.png)',
        '## How it was measured',
        '\n'.join(f'* {line}' for line in _method(data, settings, labels[0], seeds)),
    ]
    if missing:
        parts.append(f'**Not finished:** {", ".join(missing)}.')
    head = 'Machine:' if len(machines) == 1 else 'Machines (times of different ones do not compare):'
    parts.append('\n'.join([head, '', *(f'* {m}' for m in machines)]))
    commands = ', '.join(f'`{c}`' for c in sorted({r['command'] for r in runs}))
    parts.append(f'Made by {commands}; last run finished {max(r["finished"] for r in runs)}.')
    parts.append('Settings: ' + ', '.join(f'`{k}={v}`' for k, v in settings.items()) + '.')
    return '\n\n'.join(p for p in parts if p) + '\n'


def environment_line(environment: dict[str, Any]) -> str:
    """One line that says where a run was made."""
    return (
        f'{environment["machine"]}, {environment["cores"]} cores, {environment["threads"]} threads per run, '
        f'torch {environment["torch"]}, timm {environment["timm"]}, Python {environment["python"]}'
    )


def _method(data: dict[str, Any], settings: dict[str, Any], reference: str, seeds: int) -> list[str]:
    lines = [
        f'{data["train"]} training and {data["val"]} held-out images ({data["measured"]}) of '
        f'{data["classes"]} classes, the same split for every seed. '
        'Accuracy is that of the last epoch; no epoch was chosen by it.',
        *filter(None, [skipped_line(data['skipped'])]),
        f'For each seed all models start from the weights of {reference} wherever name and shape agree, and see the '
        'same images in the same order with the same augmentation; so differences are taken seed by seed.'
        if not settings['pretrained']
        else 'Every model starts from its own pretrained weights, and sees the same images in the same order per seed.',
        '± is the standard deviation over seeds (n - 1). Differences are paired; their intervals and verdicts are of '
        "Student's t with Holm's correction over all models: of equal models, at most 5 % of such tables call any of "
        'them better or worse. Assumed: the differences of a model over seeds are independent and about normal. They '
        'tell how much seeds move the result, not how much other images would.',
        f'Activations: what autograd keeps for one step of {settings["batch_size"]} images.',
    ]
    if seeds < FEWEST_SEEDS:
        lines.append(f'{seeds} seed{"s" * (seeds > 1)} claim nothing: at least {FEWEST_SEEDS} are asked for.')
    return lines


def _shown(row: Row) -> str:
    if row.difference is None or row.judged is None:
        return ''
    if math.isnan(row.judged.low):
        return f'{signed(row.difference.mean)} (too few seeds)'
    return f'{signed(row.difference.mean)} [{signed(row.judged.low)}, {signed(row.judged.high)}]'


def _clock(runs: Sequence[dict[str, Any]]) -> str:
    return '/'.join(sorted({r['environment']['clock'] for r in runs}))
