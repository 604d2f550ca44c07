"""What may happen around a push or a load: each test is the row of its name in docs/reliability.md."""

import json
import logging
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import timm
import torch
from hub_attacks import EVENTS
from hub_client import Clock
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import nn

from timm_attn.explain import load_model, write_space
from timm_attn.hub import client, folder, load
from timm_attn.hub.client import HubError, HubFileError
from timm_attn.hub.folder import check_model, save
from timm_attn.hub.load import load_from_hub, open_model, pull
from timm_attn.hub.push import push_to_hub

TOKEN = 'hf_me_write'


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, 'SETTINGS', client.Settings(timeout=5, tries=3, attempts=3))
    monkeypatch.setattr(client, 'time', Clock())


def make_model(seed: int = 0, num_classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model('simple_cnn_cbam', num_classes=num_classes).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(2, 3, 16, 16)
    return torch.equal(a.eval()(x), b.eval()(x))


def sent(hub: Any, *methods: str) -> list[str]:
    return [str(r) for r in hub.log if not methods or r.method in methods]


def test_every_row_is_a_test() -> None:
    tests = {name.removeprefix('test_') for name in globals() if name.startswith('test_')}
    assert tests - {'every_row_is_a_test'} == {r.id for r in EVENTS}


# --- Push -------------------------------------------------------------------------------------------------------------


def test_two_pushers(hub_client: Any) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x')
    # Both have looked at the repository before either commits.
    both = threading.Barrier(2, timeout=30)
    hub.fault('POST', '/preupload/', times=2, call=both.wait)
    results: list[Any] = []
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            results.append(push_to_hub(make_model(seed), 'me/x', commit_message=f'model {seed}'))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (result,), (error,) = results, errors
    assert isinstance(error, HubError) and f'(commit {result.commit})' in str(error)
    assert len([r for r in hub.log if r.status == 412]) == 1
    assert hub.head('me/x') == result.commit and len(hub.commits('me/x')) == 3


def test_other_weights_in_between(hub_client: Any, tmp_path: Path) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x')
    theirs = {p.name: p.read_bytes() for p in save(make_model(5), tmp_path / 'theirs').iterdir()}
    for repo in ('me/x', 'me/new'):
        fault = hub.fault('POST', f'{repo}/commit/', call=lambda repo=repo: hub.commit(repo, theirs))
        with pytest.raises(HubError, match=r'Somebody else committed other weights') as caught:
            push_to_hub(make_model(1), repo)
        assert fault.hits == 1 and hub.head(repo) in str(caught.value)
        assert same(load_from_hub(repo), make_model(5))
    again = {**theirs, 'model.safetensors': (save(make_model(6), tmp_path / 'n') / 'model.safetensors').read_bytes()}
    hub.fault('POST', '/commit/', call=lambda: hub.commit('me/x', again))
    push_to_hub(make_model(1), 'me/x', force=True)
    assert same(load_from_hub('me/x'), make_model(1))
    # The same weights from somebody else are no reason to stop.
    ours = (save(make_model(2), tmp_path / 'ours') / 'model.safetensors').read_bytes()
    hub.fault('POST', '/commit/', call=lambda: hub.commit('me/x', {'model.safetensors': ours}))
    push_to_hub(make_model(2), 'me/x')
    assert same(load_from_hub('me/x'), make_model(2))


def test_edit_in_between(hub_client: Any) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x', label_names=['a', 'b', 'c'])

    def edit() -> None:
        text = hub.files('me/x')['README.md'] + b'\n## A note\n\nKeep me.\n'
        hub.commit('me/x', {'README.md': text, 'notes.txt': b'mine'})

    hub.fault('POST', '/commit/', call=edit)
    push_to_hub(make_model(1), 'me/x')
    files = hub.files('me/x')
    assert b'Keep me.' in files['README.md']
    assert files['notes.txt'] == b'mine'
    assert json.loads(files['config.json'])['label_names'] == ['a', 'b', 'c']
    assert same(load_from_hub('me/x'), make_model(1))


def test_commits_all_the_time(hub_client: Any) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x')
    count = iter(range(100))
    hub.fault('POST', '/commit/', times=None, call=lambda: hub.commit('me/x', {'n.txt': str(next(count)).encode()}))
    with pytest.raises(HubError, match=r'changed while we worked'):
        push_to_hub(make_model(1), 'me/x')
    assert len(hub.commits('me/x')) == 2 + 3
    assert same(load_from_hub('me/x'), make_model(0))


class Killed(BaseException):
    """The end of the process, as far as the Hub can see it."""


def _die_at(number: int, after: bool) -> Iterator[None]:
    """The client dies with its n-th request: before it is sent, or before its answer is read."""
    seen = 0

    def before(request: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number and not after:
            raise Killed

    def done(response: Any) -> None:
        if seen == number and after:
            raise Killed

    hook = huggingface_hub.utils._http.hf_request_event_hook
    huggingface_hub.set_client_factory(
        lambda: httpx2.Client(
            event_hooks={'request': [hook, before], 'response': [done]}, follow_redirects=True, timeout=None
        )
    )
    yield
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


@pytest.mark.parametrize('after', [False, True], ids=['before', 'after'])
def test_killed_at_each_request(hub_client: Any, after: bool, tmp_path: Path) -> None:
    hub = hub_client.hub
    folder = save(make_model(0), tmp_path / 'folder')
    finished = False
    for number in range(1, 30):
        repo = f'me/x{number}'
        dying = _die_at(number, after)
        next(dying)
        try:
            push_to_hub(folder, repo)
            finished = True
        except Killed:
            pass
        finally:
            next(dying, None)
        push_to_hub(folder, repo)
        assert same(load_from_hub(repo), make_model(0))
        assert len(hub.commits(repo)) == 2
        if finished:
            break
    assert finished and number > 8


def _sigkill(hub: Any, start_client: Any, folder: Path, method: str, path: str, after: bool) -> None:
    process = start_client(
        f'import timm_attn\nfrom timm_attn.hub import push_to_hub\npush_to_hub({str(folder)!r}, "me/x")\n'
    )
    hub.fault(method, path, after=after, stall=True, call=lambda: os.kill(process.pid, signal.SIGKILL))
    assert process.wait(120) == -signal.SIGKILL
    hub.clear_faults()
    hub.release()


def test_sigkill_in_the_upload(hub_client: Any, start_client: Any, tmp_path: Path) -> None:
    folder = save(make_model(0), tmp_path / 'folder')
    _sigkill(hub_client.hub, start_client, folder, 'PUT', '^/repos/', False)
    assert set(hub_client.hub.files('me/x')) == {'.gitattributes'}
    push_to_hub(folder, 'me/x')
    assert same(load_from_hub('me/x'), make_model(0))


def test_sigkill_after_the_commit(hub_client: Any, start_client: Any, tmp_path: Path) -> None:
    folder = save(make_model(0), tmp_path / 'folder')
    _sigkill(hub_client.hub, start_client, folder, 'POST', '/commit/', True)
    head = hub_client.hub.head('me/x')
    result = push_to_hub(folder, 'me/x')
    assert result.changed == () and result.commit == head
    assert same(load_from_hub('me/x'), make_model(0))


def test_server_gone(hub_client: Any) -> None:
    hub_client.hub.stop()
    with pytest.raises(HubError, match=r'connection|Gave up'):
        push_to_hub(make_model(), 'me/x')
    hub_client.hub.start()
    push_to_hub(make_model(), 'me/x')
    assert same(load_from_hub('me/x'), make_model())


def test_same_push_twice(hub_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    hub = hub_client.hub
    first = push_to_hub(make_model(), 'me/x')
    hub.clear_log()
    with caplog.at_level(logging.INFO, 'timm_attn'):
        again = push_to_hub(make_model(), 'me/x')
    assert again.commit == first.commit and again.changed == ()
    assert 'no commit made' in str(again) and 'no commit made' in caplog.text
    assert not [s for s in sent(hub, 'PUT', 'POST') if 'paths-info' not in s]
    assert len(hub.commits('me/x')) == 2


def test_upload_corrupted(hub_client: Any) -> None:
    hub = hub_client.hub
    fault = hub.fault('PUT', '^/repos/', corrupt=True)
    try:
        push_to_hub(make_model(), 'me/x')
    except HubError:
        push_to_hub(make_model(), 'me/x')
    assert fault.hits == 1
    assert same(load_from_hub('me/x'), make_model())


def test_no_token(hub_client: Any) -> None:
    hub_client.login(None)
    with pytest.raises(HubError, match=r'There is no token.*hf auth login'):
        push_to_hub(make_model(), 'me/x')
    assert not hub_client.hub.log


def test_read_only_token(hub_client: Any) -> None:
    with pytest.raises(HubError, match=r'write access') as caught:
        push_to_hub(make_model(), 'me/x', token='hf_me_read')
    assert caught.value.status == 403 and not hub_client.hub.repos


def test_foreign_namespace(hub_client: Any) -> None:
    with pytest.raises(HubError, match=r'write access'):
        push_to_hub(make_model(), 'other/x')
    assert not hub_client.hub.repos


def test_token_stays_on_the_hub(hub_client: Any) -> None:
    push_to_hub(make_model(), 'me/x', private=True)
    load_from_hub('me/x')
    storage = [r for r in hub_client.hub.log if r.listener == 'storage']
    assert {r.method for r in storage} == {'PUT', 'GET'}
    assert not [r for r in storage if TOKEN in str(r.headers)]
    assert [r for r in hub_client.hub.log if r.listener == 'hub' and TOKEN in str(r.headers)]


def test_token_in_an_error(hub_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    hub_client.hub.fault('POST', '/commit/', times=None, status=400, headers={'X-Error-Message': f'no {TOKEN} here'})
    with caplog.at_level(logging.DEBUG), pytest.raises(HubError, match=r'\(token\)') as caught:
        push_to_hub(make_model(), 'me/x')
    assert TOKEN not in _printed(caught.value)
    assert TOKEN not in ' '.join(r.getMessage() for r in caplog.records if r.name.startswith('timm_attn'))


def _printed(error: BaseException | None) -> str:
    """An error and every other one that it leads to, as a traceback, a logger or a debugger may show them."""
    text = '' if error is None else ''.join(traceback.format_exception(error)) + repr(error.args)
    return text if error is None else text + _printed(error.__cause__) + _printed(error.__context__)


def test_token_in_an_error_of_a_load(hub_client: Any) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(), 'me/x')
    for method, path, status in (('GET', '/api/models', 400), ('POST', 'paths-info', 503), ('HEAD', 'config', 403)):
        hub.fault(method, path, times=None, status=status, headers={'X-Error-Message': f'no {TOKEN} here'})
        with pytest.raises(HubError) as caught:
            load_from_hub('me/x')
        assert TOKEN not in _printed(caught.value)
        hub.clear_faults()


def test_old_pickle_there(hub_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x')
    hub.commit('me/x', {'pytorch_model.bin': b'\x80\x02.', 'notes.txt': b'mine'})
    result = push_to_hub(make_model(1), 'me/x')
    assert result.removed == ('pytorch_model.bin',) and 'removed the old pytorch_model.bin' in str(result)
    assert 'pytorch_model.bin' in caplog.text
    files = hub.files('me/x')
    assert 'pytorch_model.bin' not in files and files['notes.txt'] == b'mine'
    # Also where nothing else is new.
    hub.commit('me/x', {'pytorch_model.bin': b'\x80\x02.'})
    assert push_to_hub(make_model(1), 'me/x').changed == ()
    assert 'pytorch_model.bin' not in hub.files('me/x')
    assert push_to_hub(make_model(1), 'me/x').commit == hub.head('me/x') and len(hub.commits('me/x')) == 6


def test_labels_of_another_model(hub_client: Any, tmp_path: Path) -> None:
    hub = hub_client.hub
    described = {'cat': 'a pet', 'dog': 'a friend', 'fox': 'a thief'}

    def config() -> dict[str, Any]:
        return json.loads(hub.files('me/x')['config.json'])

    push_to_hub(make_model(0), 'me/x', label_names={2: 'fox', 0: 'cat', '1': 'dog'})
    assert config()['label_names'] == ['cat', 'dog', 'fox']
    hub.commit('me/x', {'config.json': json.dumps({**config(), 'label_descriptions': described}).encode()})
    # With their names they stay: through a load, a save and a push, and through a push of a model without names.
    loaded: Any = load_from_hub('me/x')
    assert loaded.pretrained_cfg['label_descriptions'] == described
    push_to_hub(save(loaded, tmp_path / 'loaded'), 'me/x')
    assert config()['label_descriptions'] == described
    push_to_hub(make_model(1), 'me/x')
    assert config()['label_names'] == ['cat', 'dog', 'fox'] and config()['label_descriptions'] == described
    push_to_hub(make_model(1), 'me/x', label_names=['cat', 'dog', 'fox'])
    assert config()['label_descriptions'] == described
    # Without them they go.
    push_to_hub(save(loaded, tmp_path / 'other', label_names=['x', 'y', 'z']), 'me/x')
    assert config()['label_names'] == ['x', 'y', 'z'] and 'label_descriptions' not in config()
    push_to_hub(tmp_path / 'loaded', 'me/y', label_names=['x', 'y', 'z'])
    assert 'label_descriptions' not in json.loads(hub.files('me/y')['config.json'])


def test_links_in_the_folder(hub_client: Any, tmp_path: Path) -> None:
    secret = tmp_path / 'secret'
    secret.write_text('the token')
    good = save(make_model(), tmp_path / 'good')
    makers: list[tuple[str, Any, str]] = [
        *((name, lambda p: p.symlink_to(secret), 'leads out of its folder') for name in ('plot.png', 'recipe.yaml')),
        *((name, lambda p: p.symlink_to(secret), 'leads out of its folder') for name in (*_MODEL, 'README.md')),
        ('plot.png', lambda p: p.symlink_to('nowhere'), 'leads nowhere'),
        ('README.md', lambda p: p.symlink_to('README.md'), 'leads nowhere|Symlink loop|symbolic links'),
        ('plot.png', os.mkfifo, 'no regular file'),
        ('README.md', os.mkfifo, 'no regular file'),
        ('config.json', os.mkfifo, 'no regular file'),
        ('plot.png', lambda p: p.symlink_to('/dev/zero'), 'leads out of its folder'),
        ('model.safetensors', lambda p: p.symlink_to('/dev/zero'), 'leads out of its folder'),
        ('plot.png', Path.mkdir, 'no regular file'),
    ]
    for i, (name, make, words) in enumerate(makers):
        folder = tmp_path / f'hostile{i}'
        shutil.copytree(good, folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(HubFileError, match=words):
            push_to_hub(folder, 'me/x')
        with pytest.raises(HubFileError, match=words):
            write_space(str(folder), tmp_path / 'space')
        with pytest.raises(HubFileError, match=words):
            open_model(folder)
    assert not hub_client.hub.log and not (tmp_path / 'space').exists()
    # A folder that is a link itself, and links inside it, are somebody's way to order files.
    (good / 'curves.png').write_bytes(b'a picture')
    (good / 'plot.png').symlink_to('curves.png')
    (tmp_path / 'link').symlink_to(good)
    push_to_hub(tmp_path / 'link', 'me/x')
    assert hub_client.hub.files('me/x')['plot.png'] == b'a picture'
    # What is written over a link takes its place.
    (good / 'README.md').unlink()
    shutil.copy(tmp_path / 'good' / 'config.json', tmp_path / 'outside.json')
    (good / 'config.json').unlink()
    (good / 'config.json').symlink_to(tmp_path / 'outside.json')
    before = (tmp_path / 'outside.json').read_bytes()
    save(make_model(1), good, overwrite=True)
    assert not (good / 'config.json').is_symlink() and (tmp_path / 'outside.json').read_bytes() == before


_MODEL = ('model.safetensors', 'config.json')


@pytest.mark.parametrize(
    'answer',
    [
        {'status': 302, 'headers': {'Location': 'http://127.0.0.1:1/login'}},
        {'status': 301, 'headers': {'Location': '/login'}},
        {'status': 200, 'body': b'{}'},
        {'status': 200, 'body': b'[]'},
        {'status': 200, 'body': b'null'},
        {'status': 200, 'body': b'<html>log in</html>'},
    ],
    ids=str,
)
def test_redirects(answer: dict[str, Any], hub_client: Any) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x')
    steps = [('GET', '^/api/models/me/x', 'me/x'), ('POST', '/preupload/', 'me/x'), ('POST', '/commit/', 'me/x')]
    for method, path, repo in [*steps, ('POST', '^/api/repos/create', 'me/new')]:
        hub.fault(method, path, times=None, **answer)
        with pytest.raises(HubError):
            push_to_hub(make_model(1), repo)
        if method == 'GET':
            with pytest.raises(HubError):
                load_from_hub('me/x')
        hub.clear_faults()
    assert same(load_from_hub('me/x'), make_model(0))


def _stalls(hub: Any, monkeypatch: pytest.MonkeyPatch, path: str, work: Any) -> None:
    settings = client.Settings(timeout=0.3, tries=100, attempts=100, wait=0, patience=1.2)
    monkeypatch.setattr(client, 'SETTINGS', settings)
    hub.fault('*', path, times=None, stall=True)
    start = time.monotonic()
    with pytest.raises(HubError, match=r'without progress|did not answer|reached'):
        work()
    assert 1 < time.monotonic() - start < 6
    hub.clear_faults()
    hub.release()


def test_stalls_all_the_time(hub_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.Settings().patience == 100
    push_to_hub(make_model(0), 'me/x')
    for path in ('/paths-info/', '^/repos/', '/commit/'):
        _stalls(hub_client.hub, monkeypatch, path, lambda: push_to_hub(make_model(1), 'me/x'))
    push_to_hub(make_model(1), 'me/x')


def test_stalls_while_loading(hub_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(make_model(0), 'me/x')
    for path in ('/paths-info/', '/resolve/', '^/repos/'):
        _stalls(hub_client.hub, monkeypatch, path, lambda: load_from_hub('me/x'))
    assert same(load_from_hub('me/x'), make_model(0))


def _drips(hub: Any, monkeypatch: pytest.MonkeyPatch, path: str, work: Any) -> None:
    monkeypatch.setattr(client, 'SETTINGS', client.Settings(timeout=5, wait=0, patience=0.5))
    hub.fault('*', path, times=None, drip=0.02)
    with pytest.raises(HubError, match=r'Gave up after \d s in which .* less than 1000 bytes a second'):
        work()
    assert sum(f.hits for f in hub._faults) <= 2, 'HEAD and GET, and no second try'
    hub.clear_faults()
    hub.release()


def test_drips_while_pushing(hub_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.Settings().patience == 100
    push_to_hub(make_model(0), 'me/x')
    for path in ('^/api/models/me/x', '/paths-info/', '/resolve/'):
        _drips(hub_client.hub, monkeypatch, path, lambda: push_to_hub(make_model(1), 'me/x'))
    push_to_hub(make_model(1), 'me/x')


def test_drips_while_loading(hub_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(make_model(0), 'me/x')
    for path in ('/paths-info/', '/resolve/.*config', '^/repos/'):
        _drips(hub_client.hub, monkeypatch, path, lambda: load_from_hub('me/x'))
    assert same(load_from_hub('me/x'), make_model(0))


def test_nan_weights(hub_client: Any) -> None:
    model = make_model()
    next(model.parameters()).data[0] = torch.nan
    with pytest.raises(HubFileError, match=r'NaN'):
        push_to_hub(model, 'me/x')
    assert not hub_client.hub.log


def test_card_with_a_wrong_licence(hub_client: Any) -> None:
    with pytest.raises(HubFileError, match=r'license_name and license_link'):
        push_to_hub(make_model(), 'me/x', license='my-own-terms')
    assert not hub_client.hub.log


def test_card_the_hub_refuses(hub_client: Any) -> None:
    body = b'{"errors": [{"message": "the rules have changed"}], "warnings": []}'
    hub_client.hub.fault('POST', '/api/validate-yaml', times=None, status=400, body=body)
    with pytest.raises(HubError, match=r'the rules have changed'):
        push_to_hub(make_model(), 'me/x')
    assert not hub_client.hub.repos


def test_another_architecture(hub_client: Any) -> None:
    push_to_hub(make_model(), 'me/x')
    other = timm.create_model('simple_cnn', num_classes=3)
    with pytest.raises(HubError, match=r'holds a simple_cnn_cbam, not a simple_cnn: .*force'):
        push_to_hub(other, 'me/x')
    assert same(load_from_hub('me/x'), make_model())
    push_to_hub(other, 'me/x', force=True)
    assert same(load_from_hub('me/x'), other)


def test_unreadable_config_there(hub_client: Any) -> None:
    hub_client.hub.create_repo('me/x')
    hub_client.hub.commit('me/x', {'config.json': b'[]'})
    with pytest.raises(HubError, match=r'must hold a JSON object.*force'):
        push_to_hub(make_model(), 'me/x')
    push_to_hub(make_model(), 'me/x', force=True)
    assert same(load_from_hub('me/x'), make_model())


def test_missing_branch(hub_client: Any) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x')
    main = hub.head('me/x')
    push_to_hub(make_model(1), 'me/x', revision='dev')
    assert hub.head('me/x') == main
    assert same(load_from_hub('me/x', 'dev'), make_model(1))
    # A repository that does not exist either.
    push_to_hub(make_model(1), 'me/y', revision='dev')
    assert same(load_from_hub('me/y@dev'), make_model(1))
    with pytest.raises(HubError, match=r'create_pr=True'):
        push_to_hub(make_model(1), 'me/x', revision='refs/pr/7')


def test_commit_as_revision(hub_client: Any) -> None:
    with pytest.raises(ValueError, match=r'is a commit.*name a branch'):
        push_to_hub(make_model(), 'me/x', revision='0' * 40)
    with pytest.raises(ValueError, match=r'leave revision'):
        push_to_hub(make_model(), 'me/x', revision='dev', create_pr=True)
    assert not hub_client.hub.log


def test_pull_request(hub_client: Any) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x')
    main = hub.head('me/x')
    result = push_to_hub(make_model(1), 'me/x', create_pr=True)
    assert hub.head('me/x') == main
    assert result.pull_request and 'pull request' in str(result)
    assert same(load_from_hub('me/x', 'refs/pr/1'), make_model(1))


def test_answer_to_pull_request_lost(hub_client: Any) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x')
    hub.fault('POST', '/commit/', drop=True, after=True)
    with pytest.raises(HubError, match=r'/discussions has the pull request already'):
        push_to_hub(make_model(1), 'me/x', create_pr=True)
    assert len(hub.repos['me/x'].discussions) == 1


def test_wrapped_models(hub_client: Any) -> None:
    plain = make_model()
    wrapped: tuple[Any, ...] = (
        lambda m: m.to(memory_format=torch.channels_last),
        torch.compile,
        nn.DataParallel,
        _compiled_inside,
    )
    for wrap in wrapped:
        result = push_to_hub(wrap(make_model()), 'me/x')
        assert same(load_from_hub('me/x', result.commit), plain)
    # One file for all of them: the same numbers, the same bytes.
    assert len(hub_client.hub.commits('me/x')) == 2
    push_to_hub(make_model().to(torch.bfloat16), 'me/half')
    assert same(load_from_hub('me/half'), make_model().to(torch.bfloat16).float())


def _compiled_inside(model: Any) -> nn.Module:
    model.blocks[0] = torch.compile(model.blocks[0])
    return model


# --- Load -------------------------------------------------------------------------------------------------------------


def _swap(path: Path, how: str, tmp_path: Path) -> None:
    """Puts something else in the place of a file that was checked."""
    folder = path.parent
    path.unlink()
    if how == 'a pickle':
        torch.save(make_model(7).state_dict(), folder / 'pytorch_model.bin')
        return
    other = make_model(7)
    if how == 'NaN':
        next(other.parameters()).data.fill_(torch.nan)
    save_file(other.state_dict(), path)


@pytest.mark.parametrize('how', ['other weights', 'NaN', 'a pickle'])
def test_swapped_after_the_check(how: str, hub_client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    push_to_hub(make_model(), 'me/x')
    saved = save(make_model(), tmp_path / 'model', card=False)  # which checks what it writes, too
    where: list[Path] = []

    def then_swap(*args: Any, **kwargs: Any) -> Any:
        found = check_model(*args, **kwargs)
        where[:] = where or [next(hub_client.cache.rglob('snapshots/*/model.safetensors'))]
        _swap(where[0], how, tmp_path)
        return found

    monkeypatch.setattr(load, 'check_model', then_swap)
    monkeypatch.setattr(folder, 'check_model', then_swap)
    assert same(load_from_hub('me/x'), make_model())
    assert not where[0].exists() or how != 'a pickle'
    where[:] = [saved / 'model.safetensors']
    assert same(open_model(tmp_path / 'model'), make_model())


def test_flat_config(hub_client: Any, tmp_path: Path) -> None:
    files = {p.name: p.read_bytes() for p in save(make_model(), tmp_path / 'model').iterdir()}
    flat = {
        'architecture': 'simple_cnn_cbam',
        'num_classes': 3,
        'num_features': 64,
        'mean': [0.1, 0.2, 0.3],
        'std': [0.4, 0.5, 0.6],
        'input_size': [3, 48, 64],
        'labels': ['a', 'b', 'c'],
    }
    hub_client.hub.create_repo('me/x')
    hub_client.hub.commit('me/x', {**files, 'config.json': json.dumps(flat).encode()})
    pull('me/x', tmp_path / 'out')
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(flat))
    models: list[Any] = [
        load_from_hub('me/x'),
        open_model(tmp_path / 'out'),
        open_model(tmp_path / 'model'),
        timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True),
    ]
    for model in models:
        cfg = resolve_model_data_config(model)
        found = [tuple(cfg[k]) for k in ('mean', 'std', 'input_size')]
        assert found == [(0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (3, 48, 64)]
        assert list(model.pretrained_cfg['label_names']) == ['a', 'b', 'c'] and same(model, make_model())


def test_one_door(hub_client: Any, tmp_path: Path) -> None:
    hub = hub_client.hub
    good = save(make_model(), tmp_path / 'good')
    bad = save(make_model(), tmp_path / 'bad')
    weights = make_model()
    next(weights.parameters()).data.fill_(torch.inf)
    save_file(weights.state_dict(), bad / 'model.safetensors')
    pickled = tmp_path / 'pickled'
    pickled.mkdir()
    (pickled / 'config.json').write_bytes((good / 'config.json').read_bytes())
    torch.save(make_model().state_dict(), pickled / 'pytorch_model.bin')
    for where in (good, bad, pickled):
        hub.create_repo(f'me/{where.name}')
        hub.commit(f'me/{where.name}', {p.name: p.read_bytes() for p in where.iterdir()})
        for source in (str(where), f'local-dir:{where}', f'hf-hub:me/{where.name}', f'me/{where.name}'):
            for way in (open_model, load_model):
                if where is good:
                    assert same(way(source), make_model())
                else:
                    with pytest.raises(HubFileError):
                        way(source)
    with pytest.raises(ValueError, match=r'pretrained_strict.*cannot be given'):
        open_model(good, pretrained_strict=False)
    with pytest.raises(HubFileError, match=r'is no folder'):
        open_model('local-dir:nowhere')
    assert open_model(good, num_classes=7).num_classes == 7
    huge = make_model()
    next(huge.parameters()).data.fill_(1e6)
    with pytest.raises(HubFileError, match=r'once they are float16'):
        open_model(save(huge, tmp_path / 'huge'), dtype=torch.float16)


def test_moved_main(hub_client: Any) -> None:
    first = push_to_hub(make_model(0), 'me/x').commit
    load_from_hub('me/x')
    push_to_hub(make_model(1), 'me/x')
    assert same(load_from_hub('me/x'), make_model(1))
    assert same(load_from_hub('me/x', first), make_model(0))
    pinned: Any = load_from_hub(f'hf-hub:me/x@{first}')
    assert pinned.pretrained_cfg['hf_hub_id'] == f'me/x@{first}'


def test_main_moves_during_a_load(hub_client: Any, tmp_path: Path) -> None:
    hub = hub_client.hub
    push_to_hub(make_model(0), 'me/x')
    other = save(make_model(1, num_classes=5), tmp_path / 'other')
    move = {p.name: p.read_bytes() for p in other.iterdir()}
    hub.fault('GET', '^/api/models/me/x', after=True, call=lambda: hub.commit('me/x', move))
    assert same(load_from_hub('me/x'), make_model(0))
    assert same(load_from_hub('me/x'), make_model(1, num_classes=5))


def _blob(cache: Path, name: str) -> Path:
    return next(cache.glob(f'models--me--x/snapshots/*/{name}')).resolve()


def _poison(cache: Path) -> Path:
    blob = _blob(cache, 'model.safetensors')
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    return blob


def test_poisoned_blob(hub_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    push_to_hub(make_model(), 'me/x')
    load_from_hub('me/x')
    _poison(hub_client.cache)
    assert same(load_from_hub('me/x'), make_model())
    assert 'fetching it again' in caplog.text


def test_poisoned_blob_offline(hub_client: Any) -> None:
    push_to_hub(make_model(), 'me/x')
    load_from_hub('me/x')
    blob = _poison(hub_client.cache)
    hub_client.offline()
    with pytest.raises(HubFileError, match=r'checksum.*deleted from the cache'):
        load_from_hub('me/x')
    assert not blob.exists()


def test_offline_with_cache(hub_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    commit = push_to_hub(make_model(), 'me/x').commit
    load_from_hub('me/x')
    hub_client.hub.clear_log()
    hub_client.offline()
    assert same(load_from_hub('me/x'), make_model())
    assert 'HF_HUB_OFFLINE is set' in caplog.text and commit in caplog.text
    assert same(load_from_hub('me/x', commit), make_model())
    assert not hub_client.hub.log


def test_offline_without_cache(hub_client: Any) -> None:
    push_to_hub(make_model(), 'me/x')
    hub_client.offline()
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set and the cache does not hold 'me/x'"):
        load_from_hub('me/x')


def test_server_gone_with_cache(hub_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    commit = push_to_hub(make_model(), 'me/x').commit
    load_from_hub('me/x')
    hub_client.hub.stop()
    assert same(load_from_hub('me/x'), make_model())
    assert 'cannot be asked' in caplog.text and commit in caplog.text
    hub_client.hub.start()
    hub_client.hub.fault('GET', '/api/models', times=None, status=503)
    assert same(load_from_hub('me/x'), make_model())


def test_denied_with_cache(hub_client: Any) -> None:
    push_to_hub(make_model(), 'me/x')
    load_from_hub('me/x')
    for status in (401, 403):
        hub_client.hub.fault('*', '.', times=None, status=status)
        with pytest.raises(HubError) as caught:
            load_from_hub('me/x')
        assert caught.value.status == status
        hub_client.hub.clear_faults()


def test_downgrade_to_a_pickle(hub_client: Any) -> None:
    push_to_hub(make_model(), 'me/x')
    hub_client.hub.commit('me/x', {'pytorch_model.bin': b'\x80\x02.'})
    hub_client.hub.fault('HEAD', r'model\.safetensors', times=None, status=503)
    with pytest.raises(HubError, match=r'503'):
        load_from_hub('me/x')
    assert not [s for s in sent(hub_client.hub) if 'pytorch_model' in s]


_FOUR = """
import os, sys
import torch, timm_attn
from timm_attn.hub import load_from_hub
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        total = sum((float(v.double().sum()) for v in load_from_hub('me/x').state_dict().values()), 0.0)
        os.write(1, f'{total.hex()}\\n'.encode())
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitpid(c, 0)[1] for c in children) > 0)
"""


def test_four_loaders(hub_client: Any, run_client: Any) -> None:
    push_to_hub(make_model(), 'me/x')
    found = run_client(_FOUR).stdout.split()
    total = sum((float(v.double().sum()) for v in make_model().state_dict().values()), 0.0)
    assert found == [total.hex()] * 4


def test_private_repository(hub_client: Any) -> None:
    push_to_hub(make_model(), 'me/x', private=True)
    assert same(load_from_hub('me/x'), make_model())
    hub_client.login(None)
    with pytest.raises(HubError, match=r'or it is private.*hf auth login'):
        load_from_hub('me/x')


def test_gated_repository(hub_client: Any) -> None:
    push_to_hub(make_model(), 'me/x')
    hub_client.hub.repos['me/x'].gated = 'manual'
    hub_client.login('hf_other_write')
    with pytest.raises(HubError, match=r'accept its conditions'):
        load_from_hub('me/x')


def test_missing_revision(hub_client: Any) -> None:
    push_to_hub(make_model(), 'me/x')
    with pytest.raises(HubError, match=r'no such revision'):
        load_from_hub('me/x', 'v9')
    with pytest.raises(HubError, match=r"There is no repository 'me/y'"):
        load_from_hub('me/y')


@pytest.mark.filterwarnings('error')
def test_names_that_are_no_repository(hub_client: Any) -> None:
    for name in ('..', '../x', '/etc/passwd', 'me', 'me/x/y', 'https://huggingface.co/me/x', 'me/..', 'me/x y', ''):
        with pytest.raises(ValueError, match=r'must be .NAMESPACE/NAME'):
            load_from_hub(name)
        with pytest.raises(ValueError, match=r'must be .NAMESPACE/NAME'):
            push_to_hub(make_model(), name)
    with pytest.raises(ValueError, match=r'Two revisions'):
        load_from_hub('me/x@a', 'b')
    with pytest.raises(ValueError, match=r'pretrained_strict.*cannot be given'):
        load_from_hub('me/x', pretrained_strict=False)
    assert not hub_client.hub.log


# --- Xet --------------------------------------------------------------------------------------------------------------


def big_model(seed: int = 0) -> nn.Module:
    # Chunks of the content store have about 64 KiB: several of them.
    torch.manual_seed(seed)
    return timm.create_model('cbam_resnet18', num_classes=3, channels=(16, 32, 64, 128)).eval()


def test_xet_round_trip(xet_client: Any, run_client: Any) -> None:
    push_to_hub(big_model(), 'me/x')
    assert [r for r in xet_client.hub.log if r.listener == 'cas' and r.method == 'POST']
    assert same(load_from_hub('me/x'), big_model())
    plain = run_client(
        'import timm_attn\nfrom timm_attn.hub import load_from_hub\nload_from_hub("me/x")\n',
        server=xet_client.hub,
        env={'HF_HUB_DISABLE_XET': '1'},
    )
    assert plain.returncode == 0


def test_xet_push_twice(xet_client: Any) -> None:
    push_to_hub(big_model(), 'me/x')
    xet_client.hub.clear_log()
    assert push_to_hub(big_model(), 'me/x').changed == ()
    assert not [s for s in sent(xet_client.hub, 'PUT', 'POST') if 'paths-info' not in s]


def test_xet_unavailable_once(xet_client: Any) -> None:
    xet_client.hub.fault('*', 'xorb', status=503)
    push_to_hub(big_model(), 'me/x')
    assert same(load_from_hub('me/x'), big_model())


def test_xet_denied(xet_client: Any) -> None:
    xet_client.hub.fault('*', 'xorb', times=None, status=403)
    with pytest.raises(HubError):
        push_to_hub(big_model(), 'me/x')
    assert set(xet_client.hub.files('me/x')) == {'.gitattributes'}
    xet_client.hub.clear_faults()
    push_to_hub(big_model(), 'me/x')
    assert same(load_from_hub('me/x'), big_model())


def test_xet_flipped_bit(xet_client: Any) -> None:
    push_to_hub(big_model(), 'me/x')
    xet_client.hub.fault('GET', r'xorb', times=None, corrupt=True)
    with pytest.raises(HubError):
        load_from_hub('me/x')
    xet_client.hub.clear_faults()
