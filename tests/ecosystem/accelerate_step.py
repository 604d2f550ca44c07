"""A training step on every process: `accelerate launch --cpu --num_processes 2 accelerate_step.py RESULT`."""

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import timm_attn
from timm_attn.explain.gates import attention_maps


def main(result: str) -> None:
    """Trains a CBAM CNN for one epoch and writes what the first process saw.

    Args:
        result: JSON file to write.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = timm_attn.inject(timm.create_model('resnet18', num_classes=2, channels=(16, 16, 16, 16)), 'cbam')
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(data, batch_size=2)
    )
    steps = 0
    for x, y in loader:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    net = accelerator.unwrap_model(model)
    # Equal on all processes after a step, though each saw other images.
    total = torch.stack([p.double().sum() for p in net.parameters()]).sum()[None]
    sums: Any = accelerator.gather(total)
    maps = attention_maps(model, data.tensors[0])
    if accelerator.is_main_process:
        Path(result).write_text(
            json.dumps(
                {
                    'processes': accelerator.num_processes,
                    'steps': steps,
                    'sums': sums.tolist(),
                    'wrapper': type(model).__name__,
                    'sites': len(maps),
                }
            ),
            encoding='utf-8',
        )
    accelerator.end_training()


if __name__ == '__main__':
    main(sys.argv[1])
