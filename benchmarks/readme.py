"""Writes the generated parts of README.md and docs/: `python benchmarks/readme.py`.

Tables come from the registry, the weights table and `benchmarks/results/`; a test renders them again and compares.
"""

import functools
import importlib.util
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from timm_attn import create_attn, get_attn, list_attn
from timm_attn.bench import BASELINE, COMPILED, OURS, USUAL, fastest_peer, kinds, losses, unusual
from timm_attn.cli.list import list_our_models, markdown_table, models_table, size_of
from timm_attn.lab.stats import judge
from timm_attn.measure import count
from timm_attn.weights import TAGS, weights_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks/results'


def _read(name: str) -> Any:
    """A file of results, None where it has not been made."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def load_module(name: str) -> Any:
    """Another script of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f'benchmarks/{name}.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attentions_table() -> str:
    """The attentions in a line each: name, paper, place, and whether trained ImageNet weights can be had."""
    trained = {t.model.partition('_')[0] for t in TAGS if t.status == 'trained'}
    rows = []
    for name in list_attn():
        spec = get_attn(name)
        rows.append((f'`{name}`', f'[{spec.title}]({spec.paper})', spec.place, 'yes' if name in trained else '-'))
    return markdown_table(('name', 'paper', 'place in a ResNet', 'trained weights'), rows)


def _facts(name: str) -> dict[str, Any]:
    """What the registry and the class say of an attention, at 256 channels."""
    attn = create_attn(name, 256, device='meta')
    gates = ''.join(gate.axes for gate in attn.kinds.values())
    depths = timm.list_models(f'{name}_resn*')
    return {
        'parameters': sum(p.numel() for p in attn.parameters()),
        'neutral': attn.neutral_gate,
        'positions': 'H' in gates or 'W' in gates,
        'channels': 'C' in gates.replace('CHW', '').replace('CC', ''),
        'sees': ', '.join(w for w, axes in (('channels', 'C'), ('positions', 'HW')) if set(axes) & set(gates)),
        'self-attention': 'self-attention' in attn.keywords,
        'trained': any(t.status == 'trained' and t.model in depths for t in TAGS),
        'warm': any(t.status == 'warm' and t.model in depths for t in TAGS),
    }


def reference_table() -> str:
    """Every attention by its equation, place, size, licence of the released code and neutral constant."""
    rows = []
    for name in list_attn():
        spec, facts = get_attn(name), _facts(name)
        neutral = 'none' if facts['neutral'] is None else f'{facts["neutral"]:g}'
        weights = 'trained' if facts['trained'] else 'warm start' if facts['warm'] else '-'
        equation = spec.equation.replace('|', '\\|')
        paper = f'[{spec.year}]({spec.paper})'
        licence = f'[{spec.licence}]({spec.code})' if spec.code else "the project's own"
        ratios = _ratios().get((name, 'train'), {})
        cost = f'{ratios["eager"]:.2f} / {ratios["fused"]:.2f}' if ratios else '-'
        size = f'{facts["parameters"]:,}'
        row = (equation, facts['sees'], spec.place, size, cost, neutral, weights, licence, paper)
        rows.append((f'`{name}`', *row))
    head = (
        'equation',
        'sees',
        'place in a ResNet',
        'parameters, C = 256',
        'step',
        'neutral',
        'weights',
        'code',
        'paper',
    )
    return markdown_table(('name', *head), rows)


def needs_table() -> str:
    """The attentions that answer a need."""
    facts = {name: _facts(name) for name in list_attn()}
    cheapest = sorted(facts, key=lambda n: facts[n]['parameters'])[:6]
    trained = {a: ratios for (a, mode), ratios in _ratios().items() if mode == 'train' and a in facts}
    quick = [sorted(trained, key=lambda a: trained[a][way])[:6] for way in ('eager', 'fused')]
    needs: dict[str, list[str]] = {
        'no parameters': [n for n, f in facts.items() if not f['parameters']],
        'cheapest in parameters, the fewest first': cheapest,
        'cheapest to train as it is, the quickest first (measured)': quick[0],
        'cheapest to train fused, the quickest first (measured)': quick[1],
        'sees positions': [n for n, f in facts.items() if f['positions']],
        'weights channels alone': [n for n, f in facts.items() if f['channels'] and not f['positions']],
        'self-attention': [n for n, f in facts.items() if f['self-attention']],
        'has trained ImageNet weights': [n for n, f in facts.items() if f['trained']],
        'starts from a plain ResNet without changing it': [n for n, f in facts.items() if f['warm']],
        'the identity as it is built, so injecting changes nothing': [
            n for n, f in facts.items() if f['neutral'] == 1 and get_attn(n).placement != 'conv'
        ],
    }
    return markdown_table(
        ('need', 'attentions'), [(n, ', '.join(f'`{a}`' for a in found)) for n, found in needs.items()]
    )


def parity_table() -> str:
    """Largest gap of each golden file, as measured."""
    record = _read('parity.json')
    kinds = ('output', 'input gradient', 'parameter gradients', 'buffers')
    rows = [
        (f'`{name}`', *(f'{gaps[kind]:.1e}' if gaps.get(kind) is not None else '-' for kind in kinds))
        for name, gaps in record['gaps'].items()
    ]
    return markdown_table(('golden data', *kinds), rows)


def half_text() -> str:
    """Error of half precision on each machine it was measured on; of float16 also where values grow too large."""
    parts = []
    for name in ('half_cpu.json', 'half_cuda.json'):
        found = _read(name)
        if found is None:
            continue
        cells = {(c['attn'], c['dtype'], c['way'], c['spread']): c['errors'] for c in found['cells']}
        ways = [(dtype, way) for dtype in ('float16', 'bfloat16') for way in ('autocast', 'model')]
        lines = []
        for attn in dict.fromkeys(c['attn'] for c in found['cells']):
            errors = [cells[(attn, *way, 1)] for way in ways]
            shown = [f'{e["output"]:.0e} / {e["input gradient"]:.0e}' for e in errors]
            large = [
                spread
                for spread in (30, 300)
                if any(not math.isfinite(v) for way in ways[:2] for v in cells[(attn, *way, spread)].values())
            ]
            lines.append((f'`{attn}`', *shown, f'from a spread of {large[0]} on' if large else '-'))
        where = found['environment']
        parts.append(
            f'{where["machine"]}, torch {where["torch"]}, {found["date"]}, `{found["command"]}`:\n\n'
            + markdown_table(('attention', *(f'{d}, {w}' for d, w in ways), 'float16 overflows'), lines)
        )
    return '\n\n'.join(parts)


def bytes_table() -> str:
    """Bytes kept for backward, eager and fused, with the ratio to the plain model's."""
    rows = {r['model']: r for r in _read('memory.json')['rows']}

    def cell(name: str) -> str:
        return f'{rows[name]["kept_bytes"] / 1e6:.1f} MB ({rows[name]["kept_bytes_ratio"]:.2f})'

    names = [n for n in rows if f'{n} fused' in rows]
    return markdown_table(('model', 'eager', 'fused'), [(n, cell(n), cell(f'{n} fused')) for n in names])


def _ratio_of(cell: dict[str, Any]) -> dict[str, float]:
    return {kind: row['ratio'] for kind, row in kinds(cell).items()}


@functools.cache
def _ratios() -> dict[tuple[str, str], dict[str, float]]:
    """Attention and mode of the cells measured in the usual conditions -> the ratio of each kind of row."""
    return {(c['attn'], c['mode']): _ratio_of(c) for c in _read('speed.json') if not unusual(c)}


WAYS = (*OURS, COMPILED[0])


def _times(ratios: dict[str, float]) -> tuple[str, ...]:
    """Ours, torch.compile's, the fastest peer's, and where ours loses."""
    best = fastest_peer(ratios)
    ours = [f'{ratios[k]:.2f}' if k in ratios else '-' for k in WAYS]
    return (*ours, f'{ratios[best]:.2f} ({best})' if best else '-', '; '.join(losses(ratios)) or '-')


TIMES = (*OURS, '`torch.compile`', 'fastest peer', 'loses')


def times_table() -> str:
    """Time beside the plain model's in the usual conditions: ours, torch.compile, the fastest peer of the same run."""
    lines = [(attn, mode, *_times(r)) for (attn, mode), r in sorted(_ratios().items()) if attn != BASELINE]
    plain = [
        (BASELINE, mode, '1.00', *_times({k.removeprefix(f'{BASELINE} '): v for k, v in ratios.items()})[1:])
        for (attn, mode), ratios in sorted(_ratios().items())
        if attn == BASELINE
    ]
    return markdown_table(('attention', 'mode', *TIMES), plain + lines)


def conditions_table() -> str:
    """The same in other conditions, which the third column names."""
    lines = [
        (cell['attn'], cell['mode'], unusual(cell), *_times(_ratio_of(cell)))
        for cell in _read('speed.json')
        if unusual(cell) and cell['attn'] != BASELINE
    ]
    return markdown_table(('attention', 'mode', 'conditions', *TIMES), sorted(lines))


def _fit(points: list[tuple[float, float, float]]) -> tuple[list[float], float]:
    """Least squares of ratio = a + b log2(batch / 4) + c log2(size / 224), and the largest miss."""
    x = torch.tensor([[1, math.log2(b / 4), math.log2(s / 224)] for b, s, _ in points], dtype=torch.float64)
    y = torch.tensor([[r] for *_, r in points], dtype=torch.float64)
    solution = torch.linalg.lstsq(x, y).solution
    return solution[:, 0].tolist(), float((x @ solution - y).abs().max())


def growth_table() -> str:
    """How the ratio to the plain model grows: a fit over all batches and sizes that were measured."""
    points: dict[tuple[str, int, str, str], list[tuple[float, float, float]]] = {}
    for cell in _read('speed.json'):
        if not unusual({**cell, 'batch': USUAL['batch'], 'size': USUAL['size'], 'depth': USUAL['depth']}):
            for kind, ratio in _ratio_of(cell).items():
                if kind in ('eager', 'fused'):
                    key = (cell['attn'], cell['depth'], cell['mode'], kind)
                    points.setdefault(key, []).append((cell['batch'], cell['size'], ratio))
    lines = []
    for (attn, depth, mode, kind), found in sorted(points.items()):
        if len({b for b, *_ in found}) > 2 and len({s for _, s, _ in found}) > 2:
            (start, by_batch, by_side), miss = _fit(found)
            growth = (f'{start:.2f}', f'{by_batch:+.3f}', f'{by_side:+.3f}', f'{miss:.2f}')
            lines.append((f'{attn}-{depth}', f'{mode}, {kind}', *growth))
    head = ('model', 'ratio of', 'at batch 4, 224 px', 'each doubling of the batch', 'of the side', 'largest miss')
    return markdown_table(head, lines)


@functools.cache
def _models() -> str:
    return models_table()


def arithmetic_table() -> str:
    """What each attention adds to a ResNet-50's multiply-adds and parameters, counted."""
    plain = count(timm.create_model('resnet50', device='meta'), (3, 224, 224))
    sizes = {name: (params, gmacs) for name, params, gmacs in re.findall(r'`(.*?)` \| ([\d,]+) \| ([\d.]+)', _models())}
    added = {}
    for attn in list_attn():
        params, gmacs = sizes[f'{attn}_resnet50']
        added[attn] = (1e9 * float(gmacs) / plain['macs'] - 1, int(params.replace(',', '')) / plain['params'] - 1)
    ranked = sorted(added, key=lambda a: (round(added[a][0], 3), a))
    lines = [(a, *(f'{round(100 * share, 1) + 0.0:.1f} %' for share in added[a])) for a in ranked]
    return markdown_table(('attention', 'multiply-adds, added', 'parameters, added'), lines)


def accuracy_text(name: str = 'fashion-attn') -> str:
    """A comparison on Fashion-MNIST, once that has been run: accuracies, corrected intervals, verdicts, power.

    Args:
        name: Of its folder in `benchmarks/results/`.
    """
    found = _read(f'{name}/results.json')
    if found is None:
        return 'Not measured yet.'
    rows = [r for r in found['rows'] if r['top1']]
    lines = []
    for row in rows:
        top1, gap, judged = row['top1'], row['difference'], row.get('judged')
        told = f'{gap["mean"]:+.2f}' if gap else '-'
        if judged and judged['low'] is not None:
            told += f' [{judged["low"]:+.2f}, {judged["high"]:+.2f}]'
        verdict = judged['verdict'] if judged else '-'
        lines.append((row['label'], f'{top1["mean"]:.2f}', str(len(top1['values'])), told, verdict))
    head = ('model', 'top-1 %', 'seeds', f'beside {rows[0]["label"]} [corrected 95 %]', 'all models judged together')
    data, settings = found['data'], found['settings']
    able = [r['judged']['detectable'] for r in rows if r.get('judged') and r['judged']['detectable'] is not None]
    power = (
        f'\n\nThese seeds find a true difference of {min(able):.2f} to {max(able):.2f} points (by model) in four of '
        'five such comparisons; a smaller one is mostly missed.'
        if able
        else ''
    )
    return (
        f'{data["train"]:,} images to train, {data["val"]:,} to measure, {settings["img_size"]} pixels, '
        f'{settings["epochs"]} epochs.'
        f'\n\n{markdown_table(head, lines)}{power}'
    )


def starts_text() -> str:
    """A pretrained network with attention of both starts and with none, by epochs of fine-tuning."""
    runs = _read('identity_start/results.json')
    settings = runs[0]['settings']
    arms: dict[tuple[bool, str, str], dict[int, list[float]]] = {}
    for r in runs:
        arms.setdefault((r['frozen'], r['attention'], r['start']), {})[r['seed']] = r['top1']
    most = max(map(len, arms.values()))
    shown = {arm: by_seed for arm, by_seed in arms.items() if len(by_seed) == most}
    last = settings['epochs']
    judged = {}
    for frozen in (False, True):
        if plain := shown.get((frozen, 'none', '-')):
            others = [a for a in shown if a[0] == frozen and a[1] != 'none']
            found = judge({' '.join(a[1:]): [shown[a][s][last] - plain[s][last] for s in plain] for a in others})
            judged |= {a: found[' '.join(a[1:])] for a in others}
    lines = []
    for (frozen, attention, start), by_seed in shown.items():
        means = [sum(v[e] for v in by_seed.values()) / most for e in (0, 1, last)]
        j = judged.get((frozen, attention, start))
        told = f'{j.verdict} [{j.low:+.1f}, {j.high:+.1f}]' if j else '-'
        learns = 'attention and classifier' if frozen else 'all'
        lines.append((attention, start, learns, *(f'{m:.1f}' for m in means), told))
    head = ('attention', 'start', 'what learns', 'before', '1 epoch', f'{last} epochs', 'beside none [corrected 95 %]')
    return (
        f'{settings["train"]:,} images to train, {settings["val"]:,} to measure, {settings["img_size"]} pixels, '
        f'{most} seeds; top-1 in percent.\n\n{markdown_table(head, lines)}'
    )


def gpu_text() -> str:
    """What was measured on a GPU: networks, then blocks alone."""
    found = _read('gpu.json')
    if found is None:
        return 'Not measured yet.'
    nets = []
    for cell in found['cells']:
        if 'rows' not in cell:
            nets.append((cell['attn'], cell['mode'], *['-'] * len(WAYS), '-', '-', f'fails: {cell["error"][:60]}'))
            continue
        rows = kinds({**cell, 'depth': found['depth']})
        peak = [rows[k]['peak_bytes'] / rows[BASELINE]['peak_bytes'] for k in ('eager', 'fused') if k in rows]
        times = _times({k: r['ratio'] for k, r in rows.items()})
        nets.append((cell['attn'], cell['mode'], *times[:-1], ' / '.join(f'{p:.2f}' for p in peak), times[-1]))
    blocks = [
        (
            b['attn'],
            b['mode'],
            b['block'],
            f'{1e3 * b["block_seconds"]:.2f}',
            f'{1e3 * b["convolution_seconds"]:.2f}',
            f'{1e3 * b["bound_seconds"]:.2f}',
            f'{b["over_bound"]:.2f}',
        )
        for b in found['blocks']
    ]
    head = ('block of', 'mode', 'block', 'all, ms', 'convolutions, ms', 'bound, ms', 'passes / bound')
    where = found['environment']
    left_out = [f'Left out: {found["left_out"]}'] if 'left_out' in found else []
    return '\n\n'.join(
        [
            f'{where["machine"]}, torch {where["torch"]}, {found["date"]}: batch {found["batch"]}, {found["size"]} px, '
            f'{found["dtype"]}, {found["layout"]}; made by `{found["command"]}`.',
            *left_out,
            markdown_table(('attention', 'mode', *TIMES[:-1], 'peak, eager / fused', 'loses'), nets),
            *([markdown_table(head, blocks)] if blocks else []),
        ]
    )


def machine_text() -> str:
    """The machine of the CPU's cells, and the days."""
    cells = _read('speed.json')
    machines = sorted({f'{c["environment"]["machine"]}, torch {c["environment"]["torch"]}' for c in cells})
    days = sorted({c['date'] for c in cells})
    paired = sum(c.get('at_once', 1) > 1 for c in cells)
    beside = f' {paired} of them were measured while another was, each on a core of its own.' if paired else ''
    span = days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'
    return f'{"; ".join(machines)}; {span}; {len(cells)} cells.{beside}'


def costs_table() -> str:
    """What each attention costs a ResNet-50: time and memory beside the plain model's, eager and at its best."""
    memory = {r['model']: r for r in _read('memory.json')['rows']}
    lines = []
    for attn in list_attn():
        times = []
        for mode, fused in (('inference', 'frozen'), ('train', 'fused')):
            ratios = _ratios().get((attn, mode))
            times.append(f'{ratios["eager"]:.2f} / {ratios[fused]:.2f}' if ratios else '-')
        rows = [memory.get(name) for name in (attn, f'{attn} fused')]
        kept = ' / '.join(f'{row["kept_bytes_ratio"]:.2f}' for row in rows if row) or '-'
        lines.append((attn, *times, kept))
    return markdown_table(('attention', 'inference', 'training', 'kept for backward'), lines)


def machines_table() -> str:
    """What the gradients of a ResNet-50 with each attention weigh, and what each GPU of eight sends a step."""
    rows = []
    for name in ('resnet50', *(f'{attn}_resnet50' for attn in list_attn())):
        model = timm.create_model(name, device='meta')
        weights = 4 * sum(p.numel() for p in model.parameters())
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        rows.append(
            (
                f'`{name}`',
                f'{weights // 4:,}',
                f'{weights / 1e6:.1f}',
                f'{2 * 7 / 8 * weights / 1e6:.1f}',
                f'{buffers / 1e6:.2f}',
                f'{(2 * weights + buffers) / 1e6:.0f}',
            )
        )
    head = ('model', 'parameters', 'all-reduced, MB a step', 'sent by each of 8 GPUs, MB a step', 'BatchNorm, MB')
    return markdown_table((*head, 'checkpoint with SGD, MB'), rows)


def hosts_table() -> str:
    """What a step of train.py sent from each of two hosts."""
    rows = [
        (
            f'`{m["model"]}`',
            f'{m["parameter_bytes"] / 1e6:.2f}',
            f'{m["buffer_bytes"] / 1e6:.2f}',
            *(f'{sent / 1e6:.2f}' for sent in m['sent_per_step']),
            'yes' if m['same_weights_as_one_host'] else 'no',
        )
        for m in _read('two_hosts.json')['models']
    ]
    head = ('model', '4 x parameters, MB', 'BatchNorm, MB', 'sent by host 0, MB a step', 'sent by host 1, MB a step')
    return markdown_table((*head, 'weights bit-equal to one host with two processes'), rows)


@functools.cache
def _production() -> dict[str, Any]:
    return json.loads((RESULTS / 'production.json').read_text(encoding='utf-8'))


def formats_table() -> str:
    """Each format over all trained models: what it costs at worst, its size and its time."""
    report = _production()
    models = [m['formats'] for m in report['models'].values()]
    rows = []
    for name in dict.fromkeys(f for m in models for f in m):
        cells = [(m['eager'], m[name]) for m in models if 'top1' in m.get(name, {})]
        failed = [m for m in models if 'error' in m.get(name, {})]
        changes = [c['top1'] - eager['top1'] for eager, c in cells]
        ratios = [c['ratio'] for _, c in cells]
        rows.append(
            (
                name,
                f'{len(cells)}' + (f', {len(failed)} fail' if failed else ''),
                f'{min(changes):+.2f} to {max(changes):+.2f}',
                str(max(c['other_labels'] for _, c in cells)),
                f'{100 * max(c["logit_change"] for _, c in cells):.2g} %',
                f'{100 * max(c["bytes"] / eager["bytes"] for eager, c in cells):.0f} %',
                f'{min(ratios):.2f} to {max(ratios):.2f}',
            )
        )
    head = (
        'format',
        'models',
        'accuracy, points',
        f'other labels of {report["test_images"]}, at most',
        'logits, at most',
    )
    return markdown_table((*head, 'bytes, at most', 'time / eager'), rows)


def quantising_table() -> str:
    """What int8 costs the model of each attention."""
    kinds = ('onnx int8 dynamic', 'onnx int8 static', 'onnx int8 static, attention float32')

    def cell(of: dict[str, Any]) -> str:
        if 'top1' not in of:
            return of.get('error', '-').partition(':')[0]
        return f'{of["top1"]:.2f}, {of["other_labels"]}, {100 * of["logit_change"]:.1f} %, {of["ratio"]:.2f}'

    rows = [
        (
            label,
            f'{m["formats"]["eager"]["top1"]:.2f}',
            *(cell(m['formats'].get(kind, {})) for kind in kinds),
            'works' if m['symbolic_shape_inference'] == 'works' else 'fails',
        )
        for label, m in _production()['models'].items()
    ]
    head = ('attention', 'float32 %', *(f'{k.removeprefix("onnx ")}: %, other labels, logits, time' for k in kinds))
    return markdown_table((*head, '`quant_pre_process` by default'), rows)


def sides_table() -> str:
    """The smallest image that each program takes."""
    models = _production()['models']
    ways = list(next(iter(models.values()))['smallest_side'])
    rows = [(label, *(str(m['smallest_side'].get(w) or '-') for w in ways)) for label, m in models.items()]
    return markdown_table(('attention', *ways), rows)


def retrieval_text() -> str:
    """Recall and precision of embeddings of classes that were not trained on, by model and last stride."""
    report = _read('retrieval.json')
    if report is None:
        return 'Not measured yet.'
    scores: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in report['rows']:
        scores.setdefault((row['model'], row['last_stride']), []).append(row)
    maps = {key: [r['map'] for r in rows] for key, rows in scores.items()}
    first = ('none', 2)
    learnt = [key for key in maps if key[1] and key != first]
    differences = {key: [a - b for a, b in zip(maps[key], maps[first], strict=True)] for key in learnt}
    judged = judge({str(key): values for key, values in differences.items()})
    names = {'pixels': 'the pixels', 'imagenet': 'MobileNetV2 of ImageNet, 96 px', 'none': 'no attention'}
    lines = []
    for key, rows in scores.items():
        j = judged.get(str(key))
        gap = f'{sum(differences[key]) / len(rows):+.1f} [{j.low:+.1f}, {j.high:+.1f}]' if j else '-'
        means = [f'{sum(r[of] for r in rows) / len(rows):.1f}' for of in ('recall_at_1', 'map')]
        lines.append((names.get(key[0], key[0]), str(key[1] or '-'), *means, gap, j.verdict if j else '-'))
    head = ('embedding', 'last stride', 'recall at 1, %', 'mean average precision, %')
    told = markdown_table((*head, 'precision beside the plain net [corrected 95 %]', 'all judged together'), lines)
    able = [j.detectable for j in judged.values()]
    return (
        f'{report["train"]:,} images of five classes to train, {report["gallery"]:,} of the other five to ask and to '
        f'find, {report["epochs"]} epochs, {len(maps[first])} seeds.\n\n{told}\n\nThese seeds find a true difference '
        f'of {min(able):.1f} to {max(able):.1f} points of precision (by model) in four of five such comparisons.'
    )


def costs() -> str:
    """What `timm-attn list` shows, in JSON.

    Attentions: [eager, fused] beside the plain ResNet-50's. Models: their sizes, since to build all takes 20 seconds.
    """
    kept = {r['model']: round(r['kept_bytes_ratio'], 3) for r in _read('memory.json')['rows']}
    found = {}
    for attn in list_attn():
        ratios = _ratios()[attn, 'train']
        times = [round(ratios[way], 3) for way in ('eager', 'fused')]
        found[attn] = {'training': times, 'kept': [kept[attn], kept[f'{attn} fused']]}
    sizes = {name: size_of(name) for name in list_our_models()}
    where = 'batch 4, 224 px, float32, one CPU thread'
    return json.dumps({'where': where, 'attentions': found, 'models': sizes}, indent=1) + '\n'


Table = Callable[[], str]


def adapters_table() -> str:
    """Numbers and bytes of adapters, beside the whole models."""
    record = json.loads((RESULTS / 'adapters.json').read_text(encoding='utf-8'))

    def size(count: int) -> str:
        return f'{count / 1e6:.1f} MB' if count >= 1e5 else f'{count / 1e3:.1f} KB'

    rows = sorted(record['rows'], key=lambda r: r['adapter'])
    return markdown_table(
        ('attention', 'numbers', 'adapter', 'whole model'),
        [(f'`{r["attention"]}`', f'{r["numbers"]:,}', size(r['adapter']), size(r['whole'])) for r in rows],
    )


def start_table() -> str:
    """First steps of a process by what is on the machine, and later ones."""
    record = json.loads((RESULTS / 'start_up.json').read_text(encoding='utf-8'))
    rows = [
        (
            f'{r["model"]}, {"training" if r["mode"] == "train" else "inference"}, {r["way"]}',
            *(f'{r[state]["first"]:.1f} s' for state in ('nothing', 'header', 'everything')),
            f'{min(r[state]["later"] for state in ("nothing", "header", "everything")):.1f} s',
        )
        for r in record['rows']
    ]
    head = ('first step of a process', 'nothing compiled before', "torch's headers", 'the same step', 'a later step')
    return markdown_table(head, rows)


def scan_table() -> str:
    """What became of timm's architectures: accepted, or refused and why; in memory, and on the meta device."""
    scan = load_module('scan_timm')
    record = json.loads((RESULTS / 'scan_timm.json').read_text(encoding='utf-8'))
    rows = list(record['rows'].values())
    cases = [(device, key) for device in ('cpu', 'meta') for key in ('slots', 'stages')]
    counts = {case: Counter(scan.verdict(r[case[1]]) for r in rows if r['device'] == case[0]) for case in cases}
    found = sorted({verdict for c in counts.values() for verdict in c}, key=lambda v: (v != 'accepted', v))
    total = {d: sum(r['device'] == d for r in rows) for d in ('cpu', 'meta')}
    head = [
        f'{total[device]} {"in memory" if device == "cpu" else "others on the meta device"}, '
        f'{"own slots (`at=None`)" if key == "slots" else "`at=` its stages"}'
        for device, key in cases
    ]
    version = record['environment']['timm']
    return markdown_table(
        (f'{len(rows)} of {record["architectures"]} architectures of timm {version}', *head),
        [(v, *(str(counts[case][v]) for case in cases)) for v in found],
    )


PAGES: dict[Path, dict[str, Table]] = {
    ROOT / 'README.md': {'attentions': attentions_table},
    ROOT / 'docs/attentions.md': {'needs': needs_table, 'reference': reference_table},
    ROOT / 'docs/models.md': {'models': _models, 'weights': weights_table},
    ROOT / 'docs/speed.md': {
        'arithmetic': arithmetic_table,
        'bytes': bytes_table,
        'machine': machine_text,
        'times': times_table,
        'conditions': conditions_table,
        'growth': growth_table,
        'gpu': gpu_text,
    },
    ROOT / 'docs/fidelity.md': {'parity': parity_table, 'half': half_text},
    ROOT / 'docs/many-machines.md': {'hosts': hosts_table, 'machines': machines_table},
    ROOT / 'docs/production.md': {'formats': formats_table, 'quantising': quantising_table, 'sides': sides_table},
    ROOT / 'docs/embeddings.md': {'retrieval': retrieval_text},
    ROOT / 'docs/compare.md': {'order': functools.partial(accuracy_text, 'cbam-order')},
    ROOT / 'docs/pretrained.md': {'starts': starts_text},
    ROOT / 'docs/choose.md': {'needs': needs_table, 'costs': costs_table, 'accuracy': accuracy_text},
    ROOT / 'docs/fuse.md': {'start': start_table},
    ROOT / 'docs/inject.md': {'adapters': adapters_table},
    ROOT / 'docs/inject-timm.md': {'scan': scan_table},
}


def render(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """A page with its tables made again.

    Args:
        text: The page as it is.
        tables: Name in the page's markers -> table.
    """
    for name, table in tables.items():
        text, n = re.subn(
            rf'(<!-- table: {name} -->\n).*?(<!-- end -->)',
            lambda m, table=table: f'{m[1]}{table()}\n{m[2]}',
            text,
            flags=re.DOTALL,
        )
        if n != 1:
            raise ValueError(f"The page holds the markers of table '{name}' {n} times, expected once.")
    return text


if __name__ == '__main__':
    (ROOT / 'timm_attn/cli/costs.json').write_text(costs(), encoding='utf-8')
    for path, tables in PAGES.items():  # The table of models reads the sizes.
        path.write_text(render(path.read_text(encoding='utf-8'), tables), encoding='utf-8')
