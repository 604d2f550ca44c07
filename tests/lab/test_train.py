import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from timm_attn.lab import train
from timm_attn.lab.data import Data
from timm_attn.lab.train import Entry, Settings, initial_model, run, weights_path

Models = tuple[Entry, ...]
OTHER = dict(opt='adamw', sched='none', warmup_epochs=0, smoothing=0.1, clip_grad=1.0)


def same(record: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on when and in how many pieces a run was made."""
    history = [{k: v for k, v in h.items() if k != 'seconds'} for h in record['history']]
    return dict(history=history, weights=record['weights_sha256'], top1=record['top1'])


def test_a_run_learns_and_its_record_is_plain_json(
    tiny_data: Data,
    tiny_settings: Settings,
    tiny_models: Models,
    tmp_path: Path,
) -> None:
    told = []
    record = run(
        tiny_models[1],
        tiny_models[0],
        tiny_data,
        replace(tiny_settings, epochs=25, lr=0.1),
        0,
        tmp_path,
        save_weights=True,
        report=lambda name, numbers: told.append((name, numbers['epoch'])),
    )
    assert json.loads(json.dumps(record)) == record
    assert record['history'][-1]['train_loss'] < 0.7 * record['history'][0]['train_loss']
    assert record['top1'] == record['history'][-1]['top1'] > 50
    assert told == [('SE-seed0', e) for e in range(1, 26)]
    model = timm.create_model('se_resnet18', num_classes=4, in_chans=1, **tiny_models[1].args)
    assert record['parameters'] == sum(p.numel() for p in model.parameters())
    model.load_state_dict(load_file(weights_path(tmp_path, tiny_models[1], 0)))
    # Warm-up, then cosine down to zero at the last update.
    rates = [h['lr'] for h in record['history']]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0, abs=1e-9)


def test_top1_counts_the_images_that_the_saved_weights_get_right(
    tiny_data: Data,
    tiny_settings: Settings,
    tiny_models: Models,
    tmp_path: Path,
) -> None:
    record = run(tiny_models[0], tiny_models[0], tiny_data, tiny_settings, 0, tmp_path, save_weights=True)
    model = train.build(tiny_models[0], tiny_data, tiny_settings).eval()
    model.load_state_dict(load_file(weights_path(tmp_path, tiny_models[0], 0)))
    x = torch.stack([torch.tensor(list(tiny_data.val.image(i).tobytes())).view(1, 8, 8) for i in range(16)])
    with torch.inference_mode():
        right = model((x / 255 - 0.5) / 0.5).argmax(1) == torch.tensor(tiny_data.val.targets)
    assert record['top1'] == 100 * right.sum().item() / 16


def test_models_of_a_seed_start_from_the_same_backbone(
    tiny_data: Data,
    tiny_settings: Settings,
    tiny_models: Models,
) -> None:
    plain, other = tiny_models
    reference, _ = initial_model(plain, plain, tiny_data, tiny_settings, 3)
    model, shared = initial_model(other, plain, tiny_data, tiny_settings, 3)
    given, own = reference.state_dict(), model.state_dict()
    assert shared == len(given)
    for name, value in given.items():
        assert torch.equal(own[name], value), name
    another, _ = initial_model(other, plain, tiny_data, tiny_settings, 4)
    assert not torch.equal(another.state_dict()['conv1.weight'], own['conv1.weight'])


def test_every_model_of_a_seed_sees_the_same_batches_whatever_it_draws_itself(
    tiny_data: Data,
    tiny_settings: Settings,
    tiny_models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    original = train.build

    def watched(entry: Entry, data: Data, settings: Settings) -> nn.Module:
        model = original(entry, data, settings)

        def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if module.training:
                seen.setdefault(entry.label, []).append(args[0].clone())

        model.register_forward_pre_hook(keep)
        return model

    monkeypatch.setattr(train, 'build', watched)
    plain, other = tiny_models
    drops = Entry('drops', plain.name, plain.args | dict(drop_rate=0.5, drop_path_rate=0.3))
    for entry in (plain, other, drops):
        run(entry, plain, tiny_data, tiny_settings, 0, tmp_path)
    steps = 3 * (40 // 8) + 2  # The first two are the measurement of kept bytes.
    assert [len(v) for v in seen.values()] == [steps] * 3
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*seen.values(), strict=True))
    assert not torch.equal(seen['plain'][1], seen['plain'][6])  # Another epoch has another order.


@pytest.mark.parametrize('changes', [{}, OTHER, dict(amp=True)])
def test_a_run_cut_after_an_epoch_goes_on_to_the_same_bits(
    tiny_data: Data,
    tiny_settings: Settings,
    tiny_models: Models,
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    settings = replace(tiny_settings, **changes)
    entry = Entry('drops', tiny_models[1].name, tiny_models[1].args | dict(drop_rate=0.5, drop_path_rate=0.3))
    arguments = (entry, tiny_models[0], tiny_data, settings, 0)
    whole = run(*arguments, tmp_path / 'whole')

    class Cut(Exception):
        pass

    def cut(name: str, numbers: dict[str, float]) -> None:
        if numbers['epoch'] == 2:
            raise Cut

    with pytest.raises(Cut):
        run(*arguments, tmp_path / 'cut', report=cut)
    resumed = run(*arguments, tmp_path / 'cut')
    assert (whole['resumed_after'], resumed['resumed_after']) == (0, 2)
    assert same(resumed) == same(whole)


def test_a_run_leaves_the_random_numbers_of_the_process_to_no_influence(
    tiny_data: Data,
    tiny_settings: Settings,
    tiny_models: Models,
    tmp_path: Path,
) -> None:
    first = run(tiny_models[0], tiny_models[0], tiny_data, tiny_settings, 0, tmp_path / 'a')
    torch.rand(3)
    assert same(run(tiny_models[0], tiny_models[0], tiny_data, tiny_settings, 0, tmp_path / 'b')) == same(first)
    assert same(run(tiny_models[0], tiny_models[0], tiny_data, tiny_settings, 1, tmp_path / 'c')) != same(first)
    assert not torch.are_deterministic_algorithms_enabled()


def test_user_errors_say_what_to_do(
    tiny_data: Data,
    tiny_settings: Settings,
    tiny_models: Models,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r"'batch_size' \(=41\) exceeds the 40 training images"):
        run(tiny_models[0], tiny_models[0], tiny_data, replace(tiny_settings, batch_size=41), 0, tmp_path)
    with pytest.raises(ValueError, match=r'plain-seed0: the loss is (nan|inf) in epoch \d: lower --lr'):
        run(tiny_models[0], tiny_models[0], tiny_data, replace(tiny_settings, lr=1e30), 0, tmp_path)
    with pytest.raises(
        ValueError, match=r"Unknown model 'resnet19'\. Did you mean .*'resnet18'.*\? `timm-attn list` shows ours"
    ):
        train.build(Entry('x', 'resnet19'), tiny_data, tiny_settings)
    with pytest.raises(ValueError, match=f"is a folder, and no model of timm: write 'local-dir:{tmp_path}'"):
        train.build(Entry('x', str(tmp_path)), tiny_data, tiny_settings)
    with pytest.raises(ValueError, match="'me/adapter' is no model of timm: write 'hf-hub:me/adapter'"):
        train.build(Entry('x', 'me/adapter'), tiny_data, tiny_settings)
    with pytest.raises(ValueError, match="'vgg11' is no ResNet, so it has no 3x3 stem to choose"):
        train.build(Entry('x', 'vgg11', dict(cifar_stem=True)), tiny_data, tiny_settings)
    with pytest.raises(ValueError, match=r"'epochs' \(=0\)"):
        replace(tiny_settings, epochs=0)
    with pytest.raises(ValueError, match=r"'warmup_epochs' \(=3\) must be less than 'epochs' \(=3\)"):
        replace(tiny_settings, warmup_epochs=3)


def test_processes_that_decode_change_no_bit(
    tiny_data: Data, tiny_settings: Settings, tiny_models: Models, tmp_path: Path
) -> None:
    settings = replace(tiny_settings, epochs=2, warmup_epochs=0)
    arguments = (tiny_models[1], tiny_models[0], tiny_data, settings, 0)
    alone = run(*arguments, tmp_path / '0')
    assert same(run(*arguments, tmp_path / '2', workers=2)) == same(alone)
    # The augmentation is drawn: without it, other weights come out.
    still = replace(tiny_data, augment=dict(no_aug=True))
    assert same(run(tiny_models[1], tiny_models[0], still, settings, 0, tmp_path / 'no')) != same(alone)


def test_augmentation_is_a_function_of_seed_epoch_and_image(tiny_data: Data) -> None:
    images = tiny_data.train
    images.transform = lambda image: (torch.rand(()).item(), random.random(), np.random.rand())
    images.stream = (3, 1)
    state = torch.get_rng_state()
    drawn = [images[i][0] for i in (0, 1, 2, 1, 0)]
    assert drawn == [drawn[0], drawn[1], drawn[2], drawn[1], drawn[0]] and len(set(drawn)) == 3
    assert torch.equal(torch.get_rng_state(), state)
    for stream in ((4, 1), (3, 2)):
        images.stream = stream
        assert images[0][0] not in drawn
