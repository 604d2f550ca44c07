"""What README shows: a warm start, fine-tuned in its head and attention, saved, and loaded again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import timm_attn
from timm_attn.hub.folder import save


def test_head_and_attention_train_alone_and_the_saved_model_gives_the_same_logits(
    plain: Callable[[int], dict[str, Tensor]], tmp_path: Path
) -> None:
    save_file(plain(18), tmp_path / 'plain.safetensors')
    torch.manual_seed(0)
    model = timm.create_model(
        'cbam_resnet18.resnet18_a1_in1k',
        pretrained=True,
        num_classes=10,
        pretrained_cfg_overlay=dict(hf_hub_id=None, file=str(tmp_path / 'plain.safetensors')),
    )
    model.requires_grad_(False)
    trained = [model.get_submodule('fc'), *timm_attn.attn_sites(model).values()]
    for module in trained:
        module.requires_grad_(True)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.eval()  # the plain network's statistics stay as well
    x, y = torch.rand(4, 3, 64, 64), torch.arange(4)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved and all('.se.' in k or k.startswith('fc.') for k in moved)
    assert any('.se.' in k for k in moved)

    save(model, tmp_path / 'tuned', status='trained')
    again = timm.create_model(f'local-dir:{tmp_path / "tuned"}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize('name', ['srm_resnet18', 'cbam_resnet18', 'bam_resnet18', 'triplet_resnet18', 'csa_resnet18'])
def test_gates_norms_scalars_and_cfc_are_not_decayed(name: str) -> None:
    model = timm.create_model(name, device='meta')
    no_weight_decay = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()  # type: ignore[operator]
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=no_weight_decay)
    free = {id(p) for g in groups if g['weight_decay'] == 0 for p in g['params']}
    decayed = {id(p) for g in groups if g['weight_decay'] == 0.05 for p in g['params']}
    for site in timm_attn.attn_sites(model).values():
        for key, p in site.named_parameters():
            exempt = p.ndim <= 1 or key in ('cfc', 'temperature')
            assert (id(p) in free, id(p) in decayed) == (exempt, not exempt), key
