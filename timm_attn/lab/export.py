"""From the final weights of a run to a folder that timm, the Hub and people can read."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from ..hub.folder import save
from .comparison import Comparison
from .train import Entry, build, is_source, weights_path


def can_be_saved(entry: Entry) -> bool:
    """Whether a config can rebuild the model: not timm's ResNets with the 3x3 stem, for which they have no keyword."""
    if is_source(entry.name):
        return True
    return not entry.args.get('cifar_stem') or timm.model_entrypoint(entry.name).__module__.startswith('timm_attn.')


def best_run(comparison: Comparison, runs: list[dict[str, Any]]) -> tuple[Entry, dict[str, Any]] | None:
    """The most accurate run among the models that can be saved; of equals the smallest model, then the first seed."""
    entries = {m.label: m for m in comparison.models if can_be_saved(m)}
    found = [r for r in runs if r['model']['label'] in entries]
    if not found:
        return None
    record = min(found, key=lambda r: (-r['top1'], r['parameters'], r['seed']))
    return entries[record['model']['label']], record


def trained_model(comparison: Comparison, entry: Entry, seed: int, checkpoints: str | Path) -> nn.Module:
    """The model with the final weights that `run(save_weights=True)` left.

    Args:
        comparison: The run's.
        entry: The run's model.
        seed: The run's.
        checkpoints: Folder of the weights.

    Raises:
        ValueError: The weights are not there.
    """
    path = weights_path(checkpoints, entry, seed)
    if not path.is_file():
        raise ValueError(f"'{path}' is not there: the run was made without --save-weights; use another --out.")
    model = build(entry, comparison.data, comparison.settings)
    model.load_state_dict(load_file(path))
    return model.eval()


def data_config(comparison: Comparison) -> dict[str, Any]:
    """How images are prepared for the models of a comparison, in timm's words."""
    data, size = comparison.data, comparison.settings.img_size
    return dict(
        input_size=(data.in_chans, size, size),
        mean=data.mean,
        std=data.std,
        interpolation='bilinear',
        crop_pct=1.0,
    )


def export(
    comparison: Comparison,
    entry: Entry,
    record: dict[str, Any],
    checkpoints: str | Path,
    directory: str | Path,
    *,
    overwrite: bool = False,
) -> nn.Module:
    """Writes model.safetensors, config.json and the card of a run, reads them back, and compares the logits.

    Args:
        comparison: The run's.
        entry: The run's model.
        record: What `run` returned.
        checkpoints: Folder of the final weights.
        directory: The model's folder.
        overwrite: Replace the files where they exist.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: The files exist already.
        RuntimeError: The folder gives another model back, which would be a mistake of this package.
    """
    data, settings = comparison.data, comparison.settings
    model = trained_model(comparison, entry, record['seed'], checkpoints)
    environment = record['environment']
    save(
        model,
        directory,
        overwrite=overwrite,
        label_names=data.classes,
        data_config=data_config(comparison),
        eval_results=dict(
            dataset=data.name,
            split=data.measured,
            n=len(data.val),
            protocol=f'last epoch, {settings.img_size}x{settings.img_size}, centre',
            metrics={'top1': round(record['top1'], 2)},
        ),
        training=dict(
            data=f'{data.name}, {len(data.train)} images',
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            optimizer=f'{settings.opt}, lr {settings.lr:g}, weight decay {settings.weight_decay:g}, {settings.sched}',
            image_size=settings.img_size,
            seed=record['seed'],
            hardware=f'{environment["machine"]}, {environment["threads"]} threads',
            seconds=round(sum(h['seconds'] for h in record['history'])),
        ),
        status='trained',
    )
    again = timm.create_model(f'local-dir:{directory}', pretrained=True).eval()
    x = sample(comparison, range(min(16, len(data.val))))
    with torch.inference_mode():
        if not torch.equal(model(x), again(x)):
            raise RuntimeError(f"'{directory}' was written, but the model read back from it gives other logits.")
    return model


def sample(comparison: Comparison, indices: Any) -> torch.Tensor:
    """Held-out images (N, C, H, W), prepared as for measuring."""
    from timm.data import create_transform

    transform: Any = create_transform(**data_config(comparison))
    return torch.stack([transform(comparison.data.val.image(i)) for i in indices])
