"""From nothing to a trained, saved, explained attention ResNet by one command: `timm-attn quickstart`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..explain import attention_maps, gate_kinds, gates_only
from ..files import atomic_write, check_vacant
from . import plots, tables
from .compare import compare, write_report
from .comparison import Comparison
from .data import load_data
from .export import best_run, export, sample
from .presets import PRESETS, SMOKE_IMAGES, SMOKE_SETTINGS
from .train import Entry, Settings


def quickstart(out: str | Path, *, jobs: int = 1, smoke: bool = False, **settings: Any) -> dict[str, Any]:
    """Trains small ResNets on scikit-learn's digits, and writes the best attention model as a folder with pictures.

    The folder then holds model.safetensors, config.json, README.md, curves.png, comparison.png and attention.png; the
    runs are in `comparison/`. The plain ResNet is measured beside the others and never saved: it holds no attention.

    Args:
        out: The folder, new or of an earlier quickstart, which goes on where it stopped.
        jobs: Processes.
        smoke: A trial: few images, two epochs.
        **settings: In place of the preset's `Settings`.

    Returns:
        The record of the saved run.

    Raises:
        ValueError: The folder holds something else.
    """
    out = Path(out)
    preset = PRESETS['digits']
    data = load_data('digits')
    chosen = preset.settings | (SMOKE_SETTINGS if smoke else {}) | settings
    if smoke:
        data = data.reduced(*SMOKE_IMAGES)
    models = tuple(replace(m, args=json.loads(json.dumps(m.args))) for m in preset.models)
    comparison = Comparison(models, data, Settings(**chosen), seeds=1)
    runs_folder = out / 'comparison'
    own = (runs_folder / 'comparison.json').exists()
    if not own and out.is_dir():
        check_vacant(runs_folder)  # one that was killed before it wrote down its comparison leaves this folder
    if not own and out.exists() and (not out.is_dir() or any(p != runs_folder for p in out.iterdir())):
        raise ValueError(f"'{out}' is not empty and holds no earlier quickstart: choose another folder.")
    runs = compare(comparison, runs_folder, jobs=jobs, save_weights=True)
    table, _, text = write_report(runs_folder)
    print(text)
    found = best_run(replace(comparison, models=models[1:]), runs)
    assert found is not None  # All runs are done, and all attention models can be saved.
    entry, record = found
    model = export(comparison, entry, record, runs_folder / 'checkpoints', out, overwrite=own)
    for picture in ('comparison.png', 'curves.png'):
        with atomic_write(out / picture) as temporary:
            shutil.copyfile(runs_folder / picture, temporary)
    _draw_attention(comparison, entry, model, out / 'attention.png')
    print(f'\n{_said(record, entry, table, len(data.val))}\n')
    print(_next(out))
    return record


def _draw_attention(comparison: Comparison, entry: Entry, model: Any, path: Path) -> None:
    targets = comparison.data.val.targets
    classes = comparison.data.classes
    first = [targets.index(c) for c in range(len(classes)) if c in targets]
    several = sorted({i for c in range(len(classes)) for i in [j for j, t in enumerate(targets) if t == c][:20]})
    x = sample(comparison, first)
    kinds = gate_kinds(model)
    many = sample(comparison, several)
    maps = {site: gates_only(g, kinds[site]) for site, g in attention_maps(model, x).items()}
    by_class = {site: gates_only(g, kinds[site]) for site, g in attention_maps(model, many).items()}
    plots.attention(
        images=[comparison.data.val.image(i) for i in first],
        maps=maps,
        kinds=kinds,
        by_class=by_class,
        targets=[targets[i] for i in several],
        classes=classes,
        path=path,
        title=f'{entry.label}: its gates for held-out images, one of each class',
    )


def _said(record: dict[str, Any], entry: Entry, table: list[tables.Row], n: int) -> str:
    plain = table[0]
    return (
        f'Saved: {entry.name} ({entry.label}), {record["top1"]:.2f} % of {n} held-out images right; '
        f'{plain.label} has {plain.top1.mean:.2f} %.\nRead back with timm, it gives the same logits to the bit. '
        'One seed cannot tell which attention is best: that takes the comparison below.'
    )


def _next(out: Path) -> str:
    return (
        'Next:\n'
        f'  timm-attn explain IMAGE... --model {out} --out runs/explained   # see where it looks\n'
        f'  timm-attn compare --preset digits --jobs 2 --out runs/digits   # the same models with five seeds\n'
        f'  timm-attn compare --models resnet50,cbam_resnet50 --pretrained --data FOLDER --save-best --out runs/mine'
        '   # fine-tune on your images\n'
        f'  timm-attn push {out} USER/NAME   # to the Hugging Face Hub'
    )
