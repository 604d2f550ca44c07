"""What `timm_attn.measure` counts, against counts by hand."""

import pytest
import timm
import torch
from torch import nn

import timm_attn
from timm_attn.measure import count, environment, kept_bytes


@pytest.mark.parametrize('name', sorted({*timm_attn.list_attn()} - {'sk'}))
def test_counts_are_the_same_with_and_without_data(name: str) -> None:
    """What computes in other operations than the equation's is counted as the equation."""
    sizes = []
    for device in ('cpu', 'meta'):
        with torch.device(device):
            model = timm_attn.inject(timm.create_model('resnet18'), name, start='paper', at=r'layer4\.1')
        sizes.append(count(model, (3, 64, 64)))
    assert sizes[0] == sizes[1]


def test_kept_bytes_of_a_net_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    # Kept: the ReLU's output (4, 5), which the second layer shares, and the output (4, 2). The input was there before.
    assert kept_bytes(model, torch.zeros(4, 3)) == 4 * (4 * 5 + 4 * 2)


def test_kept_bytes_leaves_model_and_random_numbers_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    kept_bytes(model, torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_the_environment_names_what_a_number_depends_on() -> None:
    found = environment()
    assert found['threads'] == torch.get_num_threads() and found['torch'] == torch.__version__
    assert found['clock'] == 'process' and found['machine']
