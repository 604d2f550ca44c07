"""Adapters: attention without its base, for the very base that it was trained on; as folders and on the Hub."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

import timm_attn
from timm_attn.hub.adapter import ADAPTER, digest
from timm_attn.hub.client import HubError, HubFileError
from timm_attn.hub.load import load_from_hub, open_model, pull
from timm_attn.hub.push import push_to_hub
from timm_attn.layers import attn_sites

SMALL: dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(32, 32, 64, 64))


def plain(seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model('resnet18', **SMALL, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.75, 1.25)
    return model.eval()


def trained(head: int = 5) -> Any:
    """Attention and head after two steps, the backbone frozen."""
    model: Any = timm.create_model('resnet18', **SMALL)
    model.load_state_dict(plain().state_dict())
    model.reset_classifier(head)
    timm_attn.inject(timm_attn.inject(model, 'eca'), 'se', at='layer2', rd_ratio=0.25)
    timm_attn.freeze_backbone(model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    model = trained()
    return model, timm_attn.save(model, tmp_path / 'adapter', adapter=True, base=plain())


def test_adapter_holds_attention_and_head_and_gives_the_model_back(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    held = safetensors.torch.load_file(folder / ADAPTER)
    sites = tuple(attn_sites(model))
    assert {k for k in held if not k.startswith(sites)} == {'fc.weight', 'fc.bias'}
    assert not (folder / 'model.safetensors').exists()
    x = torch.randn(2, 3, 64, 64)
    file = tmp_path / 'base.safetensors'
    safetensors.torch.save_file(plain().state_dict(), file)
    with torch.no_grad():
        for base in (plain(), file):
            again = timm_attn.load(folder, base=base)
            assert torch.equal(again.eval()(x), model(x))
        # What was loaded can be saved as a whole, and read again.
        whole = timm_attn.save(again, tmp_path / 'whole')
        assert torch.equal(timm_attn.load(whole).eval()(x), model(x))
    with pytest.raises(ValueError, match='is no adapter but a whole model: leave out `base`'):
        timm_attn.load(whole, base=plain())


@pytest.mark.parametrize('key', ['layer1.0.conv1.weight', 'bn1.running_mean', 'bn1.num_batches_tracked'])
def test_base_that_has_moved_is_refused(key: str, tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.state_dict()[key].view(-1)[0].add_(1)
    with pytest.raises(ValueError, match=rf'1 tensors of the base .* have moved.*: {key}.*freeze_backbone'):
        timm_attn.save(model, tmp_path / 'adapter', adapter=True, base=plain())
    assert not (tmp_path / 'adapter').exists()


def test_training_without_freezing_moves_statistics(tmp_path: Path) -> None:
    model = timm_attn.inject(plain(), 'eca').train()
    model(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r'tensors of the base resnet18.*have moved.*bn1\.running_mean'):
        timm_attn.save(model, tmp_path / 'adapter', adapter=True, base=plain())


def test_other_base_is_refused(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    other = plain()
    with torch.no_grad():
        other.bn1.running_var[3] = 1.5
    for base in (plain(seed=1), other):
        with pytest.raises(HubFileError, match=r"weights of the base 'resnet18.a1_in1k' are not those"):
            timm_attn.load(folder, base=base)


def test_base_that_cannot_be_had_is_named(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError('no route to host')

    _, folder = saved
    real = timm.create_model
    monkeypatch.setattr(
        timm, 'create_model', lambda name, **kw: offline() if kw.get('pretrained') else real(name, **kw)
    )
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)  # no connection is tried before
    with pytest.raises(ValueError, match=r'cannot be had from its source \(OSError: no route.*Offline, pass base='):
        timm_attn.load(folder)


def test_timm_alone_is_told_what_loads_an_adapter(saved: tuple[Any, Path]) -> None:
    with pytest.raises(ValueError, match=r'missing .*those of an adapter: timm_attn\.load\(DIRECTORY\)'):
        timm.create_model(f'local-dir:{saved[1]}', pretrained=True)


def test_adapter_must_not_hold_the_base(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    held = safetensors.torch.load((folder / ADAPTER).read_bytes())
    safetensors.torch.save_file({**held, 'conv1.weight': torch.zeros(64, 3, 7, 7)}, folder / ADAPTER)
    with pytest.raises(HubFileError, match=r'holds tensors of the base.*conv1\.weight'):
        timm_attn.load(folder, base=plain())
    (folder / ADAPTER).write_bytes(b'x' * 100)
    with pytest.raises(HubFileError, match='is no safetensors file, or cut short'):
        timm_attn.load(folder, base=plain())
    safetensors.torch.save_file(
        {k: v * float('nan') if k == 'fc.bias' else v for k, v in held.items()}, folder / ADAPTER
    )
    with pytest.raises(HubFileError, match='NaN'):
        timm_attn.load(folder, base=plain())
    del held['layer2.1.fc1.weight']
    safetensors.torch.save_file(held, folder / ADAPTER)
    with pytest.raises(HubFileError, match=r'does not fit.*layer2\.1\.fc1\.weight'):
        timm_attn.load(folder, base=plain())
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    del config['timm_attn']['adapter']
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    with pytest.raises(HubFileError, match='does not say which base'):
        timm_attn.load(folder, base=plain())


def test_nothing_to_adapt_is_refused(tmp_path: Path, saved: tuple[Any, Path]) -> None:
    with pytest.raises(ValueError, match='put there: there is no adapter to save'):
        timm_attn.save(plain(), tmp_path / 'x', adapter=True, base=plain())
    model, folder = saved
    with pytest.raises(ValueError, match=f'already holds {ADAPTER}'):
        timm_attn.save(model, folder, adapter=True, base=plain())


def test_digest_is_of_numbers_names_types_and_shapes() -> None:
    a = torch.arange(6.0)
    found = {digest(d) for d in ({'a': a}, {'b': a}, {'a': a.double()}, {'a': a.view(2, 3)}, {'a': a + 1}, {})}
    assert len(found) == 6
    assert digest({'a': a, 'b': a}) == digest({'b': a.clone(), 'a': a[:]})


# On the Hub.


def put_base(hub: Any, model: nn.Module) -> None:
    """Has the Hub hold the base where timm looks for it."""
    if 'timm/resnet18.a1_in1k' not in hub.repos:
        hub.create_repo('timm/resnet18.a1_in1k')
    hub.commit('timm/resnet18.a1_in1k', {'model.safetensors': safetensors.torch.save(model.state_dict())})


def test_an_adapter_goes_to_the_hub_and_back_and_its_card_runs(
    hub_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, model = hub_client.hub, trained()
    put_base(hub, plain())
    records: dict[str, Any] = dict(status='trained', label_names=list('abcde'))
    result = push_to_hub(model, 'me/adapter', adapter=True, **records)
    files = hub.files('me/adapter')
    assert {'adapter.safetensors', 'config.json', 'README.md'} == {n for n in files if not n.startswith('.')}
    assert result.changed and push_to_hub(model, 'me/adapter', adapter=True, **records).changed == ()
    x = torch.randn(2, 3, 64, 64)
    folder = tmp_path / 'pulled'
    pull('me/adapter', folder)
    with torch.no_grad():
        want = model(x)
        for again in (
            load_from_hub('me/adapter'),
            load_from_hub('me/adapter', result.commit, base=plain()),
            open_model('hf-hub:me/adapter'),
            timm_attn.load(folder),
        ):
            assert torch.equal(again.eval()(x), want)
        assert torch.equal(
            load_from_hub('me/adapter', num_classes=0).eval()(x),
            model.forward_head(model.forward_features(x), pre_logits=True),
        )
    last: Any = again
    assert last.pretrained_cfg['label_names'] == list('abcde')
    # Pushed from its folder, it is the same.
    assert push_to_hub(folder, 'me/again').changed
    assert hub.files('me/again')['adapter.safetensors'] == files['adapter.safetensors']
    card = files['README.md'].decode()
    for text in ("model = timm_attn.load_from_hub('me/adapter')", 'base_model_relation: adapter', '- adapter\n'):
        assert text in card, text
    assert re.search(r'base_model: timm/resnet18\.a1_in1k|base_model:\n- timm/resnet18\.a1_in1k', card)
    assert "timm.create_model('hf-hub:me/adapter'" not in card
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (40, 50), (200, 30, 90)).save('photo.jpg')
    for block in [part.split('```')[0] for part in card.split('```python\n')[1:]]:
        exec(compile(block, 'card', 'exec'), {})


def test_a_base_that_changed_at_its_source_or_cannot_be_had(hub_client: Any, tmp_path: Path) -> None:
    hub = hub_client.hub
    put_base(hub, plain())
    push_to_hub(trained(), 'me/adapter', adapter=True)
    assert load_from_hub('me/adapter')
    hub_client.offline()
    assert load_from_hub('me/adapter')  # both are in the cache
    hub_client.offline(False)
    put_base(hub, plain(seed=1))
    with pytest.raises(HubFileError, match=r"base 'resnet18.a1_in1k' are not those.*'me/adapter' at \w+ was made on"):
        load_from_hub('me/adapter')
    assert load_from_hub('me/adapter', base=plain())
    del hub.repos['timm/resnet18.a1_in1k']
    hub_client.set('HF_HUB_CACHE', str(tmp_path / 'empty'))
    with pytest.raises(
        ValueError, match=r"base 'resnet18.a1_in1k' .* cannot be had from its source .*pass base=.*compare"
    ):
        load_from_hub('me/adapter')
    with pytest.raises(ValueError, match=r"cannot be had from '.*none\.safetensors'"):
        load_from_hub('me/adapter', base=tmp_path / 'none.safetensors')


def test_adapter_and_whole_model_do_not_replace_one_another_unasked(
    saved: tuple[Any, Path], hub_client: Any, tmp_path: Path
) -> None:
    model, folder = saved
    whole = timm_attn.save(model, tmp_path / 'whole')
    hub = hub_client.hub
    push_to_hub(whole, 'me/x')
    with pytest.raises(HubError, match=r'holds model\.safetensors, which a push of adapter\.safetensors would remove'):
        push_to_hub(folder, 'me/x')
    assert push_to_hub(folder, 'me/x', force=True).removed == ('model.safetensors',)
    with pytest.raises(HubError, match=r'holds adapter\.safetensors, which a push of model\.safetensors would remove'):
        push_to_hub(whole, 'me/x')
    assert 'model.safetensors' not in hub.files('me/x')
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    for write in (
        lambda: pull('me/x', whole, overwrite=True),
        lambda: timm_attn.save(model, whole, adapter=True, base=plain(), overwrite=True),
    ):
        with pytest.raises(ValueError, match=r"holds model\.safetensors, which would be taken for this model's"):
            write()
    with pytest.raises(ValueError, match=r'holds adapter\.safetensors, which would be taken'):
        timm_attn.save(model, folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before
    wrong: list[dict[str, Any]] = [{'adapter': True}, {'base': plain()}]
    for given in wrong:
        with pytest.raises(ValueError, match='are for a model; a folder is pushed as it is'):
            push_to_hub(whole, 'me/y', **given)
    # A folder that holds both is neither.
    (whole / ADAPTER).write_bytes((folder / ADAPTER).read_bytes())
    (whole / 'config.json').write_bytes((folder / 'config.json').read_bytes())
    with pytest.raises(HubFileError, match=r"is an adapter's, but model\.safetensors holds a whole model"):
        timm_attn.load(whole)


def _set(config: Any, path: str, value: Any) -> None:
    *parents, last = path.split('/')
    for key in parents:
        config = config[int(key) if isinstance(config, list) else key]
    config[last] = value


HOSTILE: dict[str, tuple[str, Any, str]] = {
    'another base': ('model_args/base', 'resnet34.a1_in1k', r'names two bases'),
    'a repository as base': ('model_args/base', 'hf-hub:me/evil', r'model_args\.base .*must be the name of a model'),
    'itself as base': ('model_args/base', 'injected', r'model_args\.base .*must be the name of a model'),
    'a file for its base': ('model_args/base_args', {'checkpoint_path': '/etc/passwd'}, r'base_args .*must be'),
    'no digest': ('timm_attn/adapter', {'base': 'resnet18'}, r"adapter must be an object with 'base'.* and 'sha256'"),
    'a list': ('timm_attn/adapter', [1], r"adapter must be an object with 'base'"),
    'a text for numbers': ('timm_attn/adapter/numbers', '<script>', r'adapter\.numbers must be an integer'),
    'another digest': ('timm_attn/adapter/sha256', '0' * 64, r'are not those .*expected 000000000000'),
    'other weights': ('timm_attn/weights_sha256', '0' * 64, r'belongs to other weights'),
    'a registered model': ('architecture', 'cbam_resnet18', r'config\.json'),
    'other places': ('model_args/injections/0/at', ['layer9'], r'cannot be built .*matches no module'),
}


@pytest.mark.parametrize(('path', 'value', 'match'), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_adapters_are_refused(
    path: str, value: Any, match: str, saved: tuple[Any, Path], hub_client: Any
) -> None:
    _, folder = saved
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    _set(config, path, value)
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    with pytest.raises(HubFileError, match=match):
        timm_attn.load(folder, base=plain())
    hub = hub_client.hub
    hub.create_repo('me/x')
    hub.commit('me/x', {p.name: p.read_bytes() for p in folder.iterdir()})
    with pytest.raises(HubFileError, match=match):
        load_from_hub('me/x', base=plain())
