"""One training run, built from timm's parts, that can be killed at any moment and continues to the same bits.

Randomness is a function of seed and epoch, and the data has a stream of its own, augmentation one for each image:
whatever random numbers a model draws and however many processes decode, every model of a seed sees the same images in
the same order with the same augmentation.
"""

import hashlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from timm.data import create_loader
from timm.data.loader import fast_collate
from timm.loss import LabelSmoothingCrossEntropy
from timm.models.resnet import ResNet
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, dispatch_clip_grad, random_seed
from torch import Tensor, nn

from ..files import atomic_write
from ..hub.load import open_model
from ..layers import did_you_mean
from ..measure import clock, environment, kept_bytes
from ..models import cifar_stem_
from .data import Data, rng_state, set_rng_state, stream_seed

Report = Callable[[str, dict[str, float]], None]  # Called after each epoch with the run's id and the epoch's numbers.


SCHEDULES = ('cosine', 'tanh', 'poly', 'none')  # Of timm's, those that step at each update and need no more options.


@dataclass(frozen=True)
class Entry:
    """A model of a comparison.

    Args:
        label: Its name in tables and pictures.
        name: Its name for `timm.create_model`.
        args: Keyword arguments for `timm.create_model`; `cifar_stem` is also understood for timm's own ResNets.
    """

    label: str
    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run, beside model and seed.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        img_size: Side in pixels.
        opt: timm's name of the optimizer.
        lr: Highest learning rate.
        weight_decay: As timm applies it: not to biases and normalisation.
        momentum: Where the optimizer has one.
        sched: timm's name of the schedule, stepped at each update.
        warmup_epochs: Linear warm-up, part of `epochs`.
        smoothing: Label smoothing.
        clip_grad: Largest gradient norm, None for no limit.
        amp: bfloat16 autocast.
        pretrained: Start from each model's pretrained weights.
        device: 'cpu' or 'cuda'.
    """

    epochs: int
    batch_size: int
    img_size: int
    opt: str = 'sgd'
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    sched: str = 'cosine'
    warmup_epochs: int = 0
    smoothing: float = 0.0
    clip_grad: float | None = None
    amp: bool = False
    pretrained: bool = False
    device: str = 'cpu'

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.img_size < 1:
            raise ValueError(
                f"'epochs' (={self.epochs}), 'batch_size' (={self.batch_size}) and 'img_size' (={self.img_size}) "
                'must be at least 1.'
            )
        if self.sched not in SCHEDULES:
            raise ValueError(
                f"'sched' (={self.sched}) must be one of: {', '.join(SCHEDULES)}.{did_you_mean(self.sched, SCHEDULES)}"
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"'lr' (={self.lr}) must be positive.")
        if not 0 <= self.smoothing < 1 or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"'smoothing' (={self.smoothing}) must be in [0, 1), 'weight_decay' (={self.weight_decay}) at least 0."
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"'warmup_epochs' (={self.warmup_epochs}) must be less than 'epochs' (={self.epochs}).")


def build(entry: Entry, data: Data, settings: Settings) -> nn.Module:
    """Creates the model of an entry for the classes and channels of the data.

    Models of the Hub and of folders are checked as `load_from_hub` checks them.

    Raises:
        ValueError: timm knows no such model, it takes no such arguments, has no pretrained weights where they are
            asked for, or no stem to replace.
    """
    args = dict(entry.args)
    args.update(num_classes=len(data.classes), in_chans=data.in_chans)
    if is_source(entry.name):
        return _from_source(entry.name, args, settings.pretrained)
    if not timm.is_model(entry.name):
        if Path(entry.name).is_dir():
            raise ValueError(f"'{entry.name}' is a folder, and no model of timm: write 'local-dir:{entry.name}'.")
        if entry.name.count('/') == 1:
            raise ValueError(f"'{entry.name}' is no model of timm: write 'hf-hub:{entry.name}' for one of the Hub.")
        meant = did_you_mean(entry.name, [*timm.list_models(), *timm.list_pretrained()])
        raise ValueError(
            f"Unknown model '{entry.name}'.{meant} `timm-attn list` shows ours, `timm.list_models()` all there are."
        )
    # Our models take the keyword themselves; timm's ResNets are given the same stem after they are built.
    ours = timm.model_entrypoint(entry.name).__module__.startswith('timm_attn.')
    stem = not ours and args.pop('cifar_stem', False)
    try:
        model = timm.create_model(entry.name, pretrained=settings.pretrained, **args)
    except (TypeError, RuntimeError, ValueError) as e:
        raise ValueError(f"'{entry.label}' ({entry.name}) cannot be built with {entry.args}: {e}") from e
    if stem:
        if not isinstance(model, ResNet):
            raise ValueError(f"'{entry.name}' is no ResNet, so it has no 3x3 stem to choose: leave out cifar_stem.")
        cifar_stem_(model)
    return model


def is_source(name: str) -> bool:
    """Whether a name is that of a folder or of a repository of the Hub."""
    return name.startswith(('hf-hub:', 'hf_hub:', 'local-dir:'))


def _from_source(name: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    return open_model(name.replace('hf_hub:', 'hf-hub:'), pretrained=pretrained, **args)


def optimization(model: nn.Module, settings: Settings, updates_per_epoch: int) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer of a model and the schedule, None for a constant rate.

    Raises:
        ValueError: timm knows no such optimizer, or it takes no such arguments.
    """
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=settings.opt,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
        )
    except (ValueError, TypeError, AssertionError) as e:
        meant = did_you_mean(settings.opt, map(str, list_optimizers()))
        raise ValueError(f"'opt' (={settings.opt}): {e}{meant}") from e
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        num_epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return optimizer, scheduler


def share_initial_weights(model: nn.Module, reference: nn.Module, only: str = '') -> int:
    """Gives `model` the reference's values wherever name and shape agree.

    Args:
        model: Changed in place.
        reference: The plain backbone, or whichever model comes first.
        only: Prefix of the names to share.

    Returns:
        How many tensors are shared.
    """
    given = reference.state_dict()
    own = model.state_dict()
    common = {k: v for k, v in given.items() if k.startswith(only) and k in own and own[k].shape == v.shape}
    model.load_state_dict(common, strict=False)
    return len(common)


def run(
    entry: Entry,
    reference: Entry,
    data: Data,
    settings: Settings,
    seed: int,
    folder: str | Path,
    *,
    workers: int = 0,
    save_weights: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Trains and measures one model with one seed, going on from the last finished epoch where there is one.

    Args:
        entry: The model.
        reference: The model whose initial weights are shared.
        data: Images of both splits.
        settings: What decides the outcome.
        seed: Of initial weights, data order and augmentation.
        folder: The checkpoint and the final weights go here.
        workers: Processes that decode images.
        save_weights: Write the final weights to `<run>.safetensors`.
        report: Called after each epoch.

    Returns:
        The record of the run, plain JSON.

    Raises:
        ValueError: A batch is larger than the training split, or the loss is no longer finite.
    """
    if settings.batch_size > len(data.train):
        raise ValueError(f"'batch_size' (={settings.batch_size}) exceeds the {len(data.train)} training images.")
    name = run_id(entry, seed)
    checkpoint = Path(folder) / f'{name}.pt'
    device = torch.device(settings.device)
    with deterministic(device):
        model, shared = initial_model(entry, reference, data, settings, seed)
        model.to(device)
        train_loader, val_loader = _loaders(data, settings, device, workers)
        memory = kept_bytes(
            model.train(), torch.zeros(settings.batch_size, *_input_size(data, settings), device=device)
        )
        optimizer, scheduler = optimization(model, settings, len(train_loader))
        loss_fn = LabelSmoothingCrossEntropy(settings.smoothing) if settings.smoothing else nn.CrossEntropyLoss()

        history: list[dict[str, float]] = []
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location=device, weights_only=True)
            model.load_state_dict(state['model'])
            optimizer.load_state_dict(state['optimizer'])
            if scheduler is not None:
                scheduler.load_state_dict(state['scheduler'])
            history = state['history']
        resumed = len(history)
        for epoch in range(resumed, settings.epochs):
            random_seed(stream_seed(seed, epoch, 'model'))
            start = clock(device.type)
            data.train.stream = None if data.augment.get('no_aug') else (seed, epoch)
            batches = _own_randomness(train_loader, stream_seed(seed, epoch, 'data'))
            updates = epoch * len(train_loader)
            train_loss = _train_epoch(model, batches, optimizer, scheduler, loss_fn, settings, updates)
            seconds = clock(device.type) - start
            if not math.isfinite(train_loss):
                raise ValueError(f'{name}: the loss is {train_loss} in epoch {epoch + 1}: lower --lr (={settings.lr}).')
            measured = _evaluate(model, val_loader, settings)
            lr = optimizer.param_groups[0]['lr']
            history.append(dict(epoch=epoch + 1, lr=lr, train_loss=train_loss, **measured, seconds=seconds))
            with atomic_write(checkpoint) as temporary:
                torch.save(
                    dict(
                        model=model.state_dict(),
                        optimizer=optimizer.state_dict(),
                        scheduler=None if scheduler is None else scheduler.state_dict(),
                        history=history,
                    ),
                    temporary,
                )
            if report:
                report(name, history[-1] | dict(epochs=settings.epochs))
        if save_weights:
            weights = safetensors.torch.save({k: v.cpu().contiguous() for k, v in model.state_dict().items()})
            with atomic_write(weights_path(folder, entry, seed)) as temporary:
                temporary.write_bytes(weights)  # A full disc is an OSError here, and none of safetensors' own.
    return dict(
        run=name,
        model=asdict(entry),
        seed=seed,
        top1=history[-1]['top1'],
        history=history,
        resumed_after=resumed,
        parameters=sum(p.numel() for p in model.parameters()),
        activation_mib=memory / 2**20,
        seconds_per_epoch=float(np.median([h['seconds'] for h in history])),
        shared_initial_tensors=shared,
        weights_sha256=_digest(model),
        environment=environment(device.type),
        finished=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def run_id(entry: Entry, seed: int) -> str:
    """The name of a run's files."""
    plain = ''.join(c if c.isalnum() or c in '._-' else '-' for c in entry.label)
    return f'{plain}-seed{seed}'


def weights_path(folder: str | Path, entry: Entry, seed: int) -> Path:
    """Where `run` leaves the final weights when it is asked to."""
    return Path(folder) / f'{run_id(entry, seed)}.safetensors'


def initial_model(
    entry: Entry,
    reference: Entry,
    data: Data,
    settings: Settings,
    seed: int,
) -> tuple[nn.Module, int]:
    """The model before its first step, and how many of its tensors it shares with the reference."""
    random_seed(seed)
    backbone = build(reference, data, settings)
    if entry == reference:
        return backbone, len(backbone.state_dict())
    random_seed(seed)
    model = build(entry, data, settings)
    # Pretrained weights are each model's own; only the new classifier starts alike.
    cfg: Any = model.pretrained_cfg
    only = f'{cfg["classifier"]}.' if settings.pretrained else ''
    return model, share_initial_weights(model, backbone, only)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms inside the block; on a GPU an operation without one warns, on a CPU there is none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    filling: Any = torch.utils.deterministic  # Its one attribute is set by a trick that type checkers miss.
    filled = filling.fill_uninitialized_memory
    if device.type == 'cuda':
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS reads it when it is first used.
    torch.use_deterministic_algorithms(True, warn_only=device.type != 'cpu')
    torch.backends.cudnn.benchmark = False
    # Filling each new tensor guards code that reads what it never wrote; it costs a pass over memory for each.
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        filling.fill_uninitialized_memory = filled


def _train_epoch(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    loss_fn: nn.Module,
    settings: Settings,
    updates: int,
) -> float:
    model.train()
    losses = AverageMeter()
    for x, target in batches:
        with _autocast(settings):
            loss = loss_fn(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        if settings.clip_grad is not None:
            dispatch_clip_grad(model.parameters(), settings.clip_grad)
        optimizer.step()
        updates += 1
        if scheduler is not None:
            scheduler.step_update(updates)
        losses.update(loss.detach(), len(x))  # Stays on the device, so that a GPU is not waited for.
    return float(losses.avg)


@torch.inference_mode()
def _evaluate(model: nn.Module, loader: Any, settings: Settings) -> dict[str, float]:
    model.eval()
    loss = AverageMeter()
    correct = 0
    for x, target in loader:
        with _autocast(settings):
            out = model(x)
        out = out.float()
        loss.update(nn.functional.cross_entropy(out, target).item(), len(x))
        # Back to whole images, so that equally good models are exactly equal.
        correct += round(accuracy(out, target)[0].item() * len(x) / 100)
    return dict(val_loss=loss.avg, top1=100 * correct / loss.count)


def _autocast(settings: Settings) -> torch.autocast:
    return torch.autocast(torch.device(settings.device).type, dtype=torch.bfloat16, enabled=settings.amp)


def _input_size(data: Data, settings: Settings) -> tuple[int, int, int]:
    return data.in_chans, settings.img_size, settings.img_size


def _loaders(data: Data, settings: Settings, device: torch.device, workers: int) -> tuple[Any, Any]:
    common: dict[str, Any] = dict(
        input_size=_input_size(data, settings),
        mean=data.mean,
        std=data.std,
        num_workers=workers,
        persistent_workers=False,  # A worker that lives on keeps random numbers that no checkpoint holds.
        pin_memory=device.type == 'cuda',
        device=device,
    )
    batch = settings.batch_size
    # timm annotates its own data sets; any with a `transform` attribute does.
    train_images: Any = data.train
    val_images: Any = data.val
    # The bits are the same either way; validation never augments.
    data.train.stacked = data.augment == dict(no_aug=True) and data.train.stacks(settings.img_size)
    data.val.stacked = data.val.stacks(settings.img_size)
    common['collate_fn'] = _collate
    train = create_loader(train_images, batch_size=batch, is_training=True, **common, **data.augment)
    val = create_loader(val_images, batch_size=2 * batch, is_training=False, crop_pct=1.0, **common)
    return train, val


def _collate(batch: Any) -> tuple[Tensor, Tensor]:
    return batch if isinstance(batch, tuple) else fast_collate(batch)


def _own_randomness(loader: Any, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterates with random numbers of its own, so that neither the model nor the data disturbs the other's."""
    outside = rng_state()
    random_seed(seed)
    try:
        iterator = iter(loader)
        while True:
            batch = next(iterator, None)
            inside = rng_state()
            set_rng_state(outside)
            if batch is None:
                return
            yield batch
            outside = rng_state()
            set_rng_state(inside)
    finally:
        set_rng_state(outside)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
