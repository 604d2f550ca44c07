"""lightning: an injected network in a LightningModule, its checkpoint, and the frozen backbone under its train()."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import timm_attn

lightning = pytest.importorskip('lightning', reason='lightning is missing (extra ecosystem)')


@pytest.mark.filterwarnings('ignore')
def test_frozen_injected_model_trains_and_loads_again(tmp_path: Path) -> None:
    class Net(lightning.LightningModule):  # pyright: ignore[reportGeneralTypeIssues]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            small: Any = dict(layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), zero_init_last=False)
            self.net = timm_attn.inject(timm.create_model('resnet18', num_classes=2, **small), 'eca')
            timm_attn.freeze_backbone(self.net)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.1)

    model = Net()
    start = {k: v.clone() for k, v in model.net.state_dict().items()}
    data = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2), 4)
    options: Any = dict(accelerator='cpu', max_epochs=2, logger=False, enable_progress_bar=False)
    trainer = lightning.Trainer(default_root_dir=tmp_path, enable_model_summary=False, **options)
    trainer.fit(model, data)
    moved = {k for k, v in model.net.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {k for k in start if '.se.conv' in k or k.startswith('fc.')}
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    again = Net.load_from_checkpoint(tmp_path / 'last.ckpt').eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.net(x), model.eval().net(x))
