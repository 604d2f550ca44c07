"""Retrieval of classes that were never trained on: with and without attention, with a last stride of 2 and of 1.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py --weights mobilenet_v2-b0353104.pth

Writes results/retrieval.json, in ten minutes on one core. Each seed draws five classes of Fashion-MNIST, on which small
ResNets learn, all from the same draw; the pooled features of test images of the other five classes are the embeddings.
Every image asks for its class among all others, by cosine. Beside them, with nothing learned here: the pixels, and
the features of ImageNet's MobileNetV2 (`pretrained` of identity_start.py says where its weights are).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from identity_start import MEAN, STD, pretrained
from torch import Tensor, nn

import timm_attn
from timm_attn.files import atomic_write
from timm_attn.lab import load_data
from timm_attn.lab.data import Images
from timm_attn.lab.train import deterministic
from timm_attn.measure import environment

RESULTS = Path(__file__).parent / 'results'
ATTENTIONS = ('none', 'se', 'cbam')
TRAIN, TEST, EPOCHS, BATCH, LR = 400, 200, 4, 32, 4e-3  # Images of each class; AdamW with one cycle.


def tensors(images: Images, classes: list[int], count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images of each class, (N, 1, 28, 28) in -1 to 1, and the places of their classes (N,)."""
    chosen = [i for c in classes for i in [j for j, t in enumerate(images.targets) if t == c][:count]]
    x = torch.from_numpy(np.stack([np.asarray(images.items[i], np.float32) for i in chosen]))[:, None]
    return x / 127.5 - 1, torch.tensor([classes.index(images.targets[i]) for i in chosen])


def build(attention: str, last_stride: int) -> nn.Module:
    """A ResNet of one block a stage whose last maps are 4 x 4, or 7 x 7 with a last stride of 1."""
    model: Any = timm.create_model(
        f'{"se" if attention == "none" else attention}_resnet18',
        layers=(1, 1, 1, 1),
        channels=(16, 32, 64, 128),
        num_classes=5,
        in_chans=1,
        cifar_stem=True,
        last_stride=last_stride,
    )
    if attention == 'none':  # A plain ResNet has no keyword for the stride.
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            stage[0].se = None
        assert not timm_attn.attn_sites(model)
    return model


def train(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x))[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def embed(model: Any, x: Tensor) -> Tensor:
    """Pooled features, (N, C)."""
    return torch.cat([model.forward_head(model.forward_features(b), pre_logits=True) for b in x.split(100)])


def retrieve(embeddings: Tensor, y: Tensor) -> dict[str, float]:
    """Recall at 1 and mean average precision in percent, each image asking among all others.

    Args:
        embeddings: (N, C).
        y: (N,).
    """
    unit = nn.functional.normalize(embeddings)
    near = (unit @ unit.T).fill_diagonal_(-2).argsort(1, descending=True)[:, :-1]
    right = (y[near] == y[:, None]).double()
    precision = right.cumsum(1) / torch.arange(1, right.shape[1] + 1)
    return {
        'recall_at_1': 100 * float(right[:, 0].mean()),
        'map': 100 * float(((precision * right).sum(1) / right.sum(1)).mean()),
    }


def as_imagenet(x: Tensor) -> Tensor:
    """Grey images in -1 to 1, (N, 1, 28, 28), as ImageNet's networks take them, (N, 3, 96, 96)."""
    large = nn.functional.interpolate((x + 1) / 2, size=(96, 96), mode='bilinear')
    return (large - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--weights', type=Path, required=True, help="torchvision's mobilenet_v2-b0353104.pth")
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--out', type=Path, default=RESULTS / 'retrieval.json')
    args = parser.parse_args()
    data = load_data('fashion-mnist')
    imagenet = pretrained(args.weights)
    rows: list[dict[str, Any]] = []
    drawn = []
    with deterministic(torch.device('cpu')):
        for seed in range(args.seeds):
            order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
            seen, unseen = sorted(order[:5]), sorted(order[5:])
            drawn.append([data.classes[c] for c in unseen])
            x, y = tensors(data.train, seen, TRAIN)
            gallery, labels = tensors(data.val, unseen, TEST)
            found: dict[tuple[str, int | None], Tensor] = {('pixels', None): gallery.flatten(1)}
            found['imagenet', None] = embed(imagenet, as_imagenet(gallery))
            for attention in ATTENTIONS:
                for stride in (2, 1):
                    torch.manual_seed(seed)
                    found[attention, stride] = embed(train(build(attention, stride), x, y), gallery)
            for (name, stride), embeddings in found.items():
                rows.append({'seed': seed, 'model': name, 'last_stride': stride, **retrieve(embeddings, labels)})
                print(rows[-1], flush=True)
    report = {
        'command': f'OMP_NUM_THREADS=1 python benchmarks/retrieval.py --weights {args.weights.name}',
        'date': time.strftime('%Y-%m-%d'),
        'environment': environment(),
        'train': 5 * TRAIN,
        'gallery': 5 * TEST,
        'epochs': EPOCHS,
        'unseen': drawn,
        'rows': rows,
    }
    with atomic_write(args.out) as path:
        path.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
