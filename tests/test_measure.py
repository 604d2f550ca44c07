"""What `timm_attn.measure` counts, against counts by hand."""

import torch
from torch import nn

from timm_attn.measure import environment, kept_bytes


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
