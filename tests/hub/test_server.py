"""The loopback Hub itself: what the real client sees of it, and that it refuses what the real Hub refuses."""

import hashlib
import http.client
import json
import random
import shutil
import struct
import subprocess
import urllib.parse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from hub_client import Client, RunClient, StartClient
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    create_branch,
    create_commit,
    create_repo,
    create_tag,
    delete_file,
    file_exists,
    hf_hub_download,
    list_repo_commits,
    list_repo_files,
    list_repo_refs,
    list_repo_tree,
    model_info,
    repo_exists,
    snapshot_download,
    upload_file,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

WEIGHTS = bytes(range(256)) * 40
CARD = b'---\nlicense: apache-2.0\nlibrary_name: timm\ntags: [timm]\n---\n# Model\n'


def calls(client: Client) -> list[str]:
    """The request log as method and path without query."""
    return [f'{r.method} {r.path.split("?")[0]}' for r in client.hub.log]


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=data)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def listed(repo_id: str) -> dict[str, RepoFile]:
    """All files of a repository as the client lists them."""
    return {e.path: e for e in list_repo_tree(repo_id, recursive=True) if isinstance(e, RepoFile)}


def unix_time(date: str) -> float:
    return huggingface_hub.utils.parse_datetime(date).timestamp()


# --- Round trips ------------------------------------------------------------------------------------------------------


def test_files_come_back_as_they_were_sent(hub_client: Client):
    url = create_repo('me/x')
    assert url.repo_id == 'me/x' and url.endpoint == hub_client.hub.endpoint
    upload_file(path_or_fileobj=WEIGHTS, path_in_repo='model.safetensors', repo_id='me/x')
    info = upload_file(path_or_fileobj=b'{}', path_in_repo='config.json', repo_id='me/x')
    assert info.oid == hub_client.hub.head('me/x')
    assert read(hf_hub_download('me/x', 'model.safetensors')) == WEIGHTS
    assert read(hf_hub_download('me/x', 'config.json')) == b'{}'
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert Path(hf_hub_download('me/x', 'model.safetensors')).resolve().name == sha256
    assert hub_client.hub.files('me/x')['model.safetensors'] == WEIGHTS


def test_a_folder_is_one_commit_and_the_snapshot_is_equal(hub_client: Client, tmp_path: Path):
    folder = tmp_path / 'model'
    (folder / 'sub').mkdir(parents=True)
    contents = {'README.md': CARD, 'config.json': b'{}', 'w.safetensors': WEIGHTS, 'sub/a b.txt': b'x', 'empty': b''}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    create_repo('me/x')
    upload_folder(repo_id='me/x', folder_path=folder)
    titles = [c.title for c in hub_client.hub.commits('me/x')]
    assert titles == ['Upload folder using huggingface_hub', 'initial commit']
    found = Path(snapshot_download('me/x'))
    assert {str(p.relative_to(found)): p.read_bytes() for p in found.rglob('*') if p.is_file()} == {
        **contents,
        '.gitattributes': hub_client.hub.files('me/x')['.gitattributes'],
    }


def test_pushing_the_same_again_makes_no_commit(hub_client: Client):
    create_repo('me/x')
    operations = [('config.json', b'{}'), ('model.safetensors', WEIGHTS)]
    first = create_commit('me/x', [add(*o) for o in operations], commit_message='one')
    hub_client.hub.clear_log()
    second = create_commit('me/x', [add(*o) for o in operations], commit_message='two')
    assert second.oid == first.oid
    assert not [r for r in hub_client.hub.log if r.method == 'PUT' or '/commit/' in r.path]


def test_objects_and_commits_have_the_ids_git_gives_them(hub_client: Client, tmp_path: Path):
    git = shutil.which('git')
    if git is None:
        pytest.skip('compares with git, which is not installed')
    create_repo('me/x')
    files = {'a-b': b'1', 'a.txt': b'2', 'a/c': b'3', 'a/b/d': b'4'}
    create_commit('me/x', [add(p, d) for p, d in files.items()], commit_message='subject', commit_description='body')

    def run(*args: str, **env: str) -> str:
        command = [git, '-c', 'core.autocrlf=false', *args]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    run('init', '-q', '.')
    for path, data in hub_client.hub.files('me/x').items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    run('add', *hub_client.hub.files('me/x'))
    tree = run('write-tree')
    commit = hub_client.hub.commits('me/x')[0]
    seconds = str(int(unix_time(commit.date)))
    who = {'NAME': 'me', 'EMAIL': 'me@users.noreply.huggingface.co', 'DATE': f'{seconds} +0000'}
    env = {f'GIT_{role}_{k}': v for role in ('AUTHOR', 'COMMITTER') for k, v in who.items()}
    # hash-object does not ask whether the parent exists here.
    text = f'tree {tree}\nparent {commit.parent}\nauthor {who["NAME"]} <{who["EMAIL"]}> {who["DATE"]}\n'
    text += f'committer {who["NAME"]} <{who["EMAIL"]}> {who["DATE"]}\n\nsubject\n\nbody\n'
    (tmp_path / 'commit').write_text(text)
    assert run('hash-object', '-t', 'commit', 'commit', **env) == commit.sha
    assert listed('me/x')['a/b/d'].blob_id == run('hash-object', 'a/b/d')
    folders = {e.path: e.tree_id for e in list_repo_tree('me/x', recursive=True) if isinstance(e, RepoFolder)}
    assert folders == {'a': run('rev-parse', f'{tree}:a'), 'a/b': run('rev-parse', f'{tree}:a/b')}


def test_large_files_are_chosen_as_the_hub_does(hub_client: Client):
    create_repo('me/x')
    operations = {
        'by-attribute.safetensors': b'text',
        'saved_model/variables/v': b'text',
        'by-nul': b'a\0b',
        'by-size.txt': b'a' * (10 * 2**20),
        'regular.txt': b'a' * 1000,
        'empty.bin': b'',
    }
    create_commit('me/x', [add(p, d) for p, d in operations.items()], commit_message='all')
    lfs = {path: file.lfs is not None for path, file in listed('me/x').items()}
    assert lfs == {**{p: p not in ('regular.txt', 'empty.bin') for p in operations}, '.gitattributes': False}
    hub_client.hub.commit('me/x', {'.gitattributes': b'*.txt filter=lfs diff=lfs merge=lfs -text\n*.onnx -filter\n'})
    create_commit('me/x', [add('b.txt', b'now large'), add('c.bin', b'now small')], commit_message='rules changed')
    lfs = {path: file.lfs is not None for path, file in listed('me/x').items()}
    assert (lfs['b.txt'], lfs['c.bin']) == (True, False)


def test_large_uploads_go_in_parts_when_asked_for(hub_client: Client):
    hub_client.hub.part_size = 3000
    create_repo('me/x')
    upload_file(path_or_fileobj=WEIGHTS, path_in_repo='model.safetensors', repo_id='me/x')
    puts = [r for r in hub_client.hub.log if r.method == 'PUT']
    assert [r.size for r in puts] == [3000, 3000, 3000, len(WEIGHTS) - 9000]
    assert [r.path.split('?')[0][-6:] for r in puts] == ['part/1', 'part/2', 'part/3', 'part/4']
    assert hub_client.hub.files('me/x')['model.safetensors'] == WEIGHTS


def test_history_branches_and_tags(hub_client: Client):
    create_repo('me/x')
    first = upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='me/x', commit_message='first').oid
    create_tag('me/x', tag='v1')
    create_branch('me/x', branch='dev/two')
    second = upload_file(path_or_fileobj=b'2', path_in_repo='a', repo_id='me/x', revision='dev/two').oid
    for revision, data in {'v1': b'1', 'dev/two': b'2', first: b'1', second: b'2', second[:9]: b'2'}.items():
        assert read(hf_hub_download('me/x', 'a', revision=revision)) == data
    refs = list_repo_refs('me/x')
    assert {b.name: b.target_commit for b in refs.branches} == {'main': first, 'dev/two': second}
    assert [(t.ref, t.target_commit) for t in refs.tags] == [('refs/tags/v1', first)]
    assert [c.title for c in list_repo_commits('me/x')] == ['first', 'initial commit']
    with pytest.raises(HfHubHTTPError, match='409') as error:
        create_tag('me/x', tag='v1')
    assert error.value.response.status_code == 409
    create_tag('me/x', tag='v1', exist_ok=True)
    with pytest.raises(HfHubHTTPError, match='409'):
        create_branch('me/x', branch='dev/two')
    create_branch('me/x', branch='dev/two', exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        upload_file(path_or_fileobj=b'3', path_in_repo='a', repo_id='me/x', revision='nowhere')
    with pytest.raises(RevisionNotFoundError):
        upload_file(path_or_fileobj=b'3', path_in_repo='a', repo_id='me/x', revision='v1')
    huggingface_hub.delete_tag('me/x', tag='v1')
    huggingface_hub.delete_branch('me/x', branch='dev/two')
    assert [b.name for b in list_repo_refs('me/x').branches] == ['main']


def test_deleting_files_and_folders(hub_client: Client):
    create_repo('me/x')
    hub_client.hub.commit('me/x', {'a': b'1', 'd/b': b'2', 'd/c': b'3'})
    delete_file('a', 'me/x')
    operation = CommitOperationDelete('d/', is_folder=True)
    create_commit('me/x', [operation], commit_message='folder')
    assert list_repo_files('me/x') == ['.gitattributes']
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        delete_file('a', 'me/x')


def test_listings_come_in_pages(hub_client: Client):
    hub_client.hub.page_size = 3
    hub_client.hub.create_repo('me/x')
    hub_client.hub.commit('me/x', {f'd{i}/f{i}': b'x' for i in range(5)})
    assert len(list(list_repo_tree('me/x', recursive=True))) == 11
    assert [e.path for e in list_repo_tree('me/x', 'd3')] == ['d3/f3']
    assert len(list_repo_commits('me/x')) == 2
    assert calls(hub_client).count('GET /api/models/me/x/tree/main') == 4
    expanded = list(list_repo_tree('me/x', 'd3', expand=True))
    assert expanded[0].last_commit and expanded[0].last_commit.oid == hub_client.hub.head('me/x')


def test_model_info_and_paths_info(hub_client: Client):
    api = HfApi()
    hub_client.hub.create_repo('me/x', private=True)
    header = json.dumps({'w': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]}}).encode()
    weights = len(header).to_bytes(8, 'little') + header + bytes(24)
    sha = hub_client.hub.commit('me/x', {'README.md': CARD, 'model.safetensors': weights, 'd/f': b'1'})
    info = model_info('me/x', files_metadata=True, securityStatus=True)
    assert (info.sha, info.private, info.gated, info.author) == (sha, True, False, 'me')
    assert info.card_data and info.card_data.license == 'apache-2.0'
    assert info.library_name == 'timm' and info.tags == ['timm']
    assert info.safetensors and info.safetensors.parameters == {'F32': 6}
    lfs = {s.rfilename: s.lfs for s in info.siblings or []}['model.safetensors']
    assert lfs and (lfs.sha256, lfs.size) == (hashlib.sha256(weights).hexdigest(), len(weights))
    found = api.get_paths_info('me/x', ['model.safetensors', 'd', 'missing'], revision=sha)
    assert [e.path for e in found] == ['model.safetensors', 'd']
    assert model_info('me/x', expand=['sha']).author is None
    assert file_exists('me/x', 'd/f') and not file_exists('me/x', 'd/g')
    assert [m.id for m in api.list_models(author='me')] == ['me/x']
    metadata = huggingface_hub.get_safetensors_metadata('me/x')
    assert metadata.parameter_count == {'F32': 6}


def test_who_am_i(hub_client: Client):
    found = whoami()
    assert found['name'] == 'me' and [o['name'] for o in found['orgs']] == ['org']
    hub_client.login('hf_unknown')
    with pytest.raises(HfHubHTTPError, match='Invalid user token'):
        whoami()


# --- Concurrent commits and pull requests -----------------------------------------------------------------------------


def test_a_stale_parent_is_refused(hub_client: Client):
    create_repo('me/x')
    parent = hub_client.hub.head('me/x')
    create_commit('me/x', [add('a', b'1')], commit_message='one', parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match='A commit has happened since') as error:
        create_commit('me/x', [add('a', b'2')], commit_message='two', parent_commit=parent)
    assert error.value.response.status_code == 412
    short = hub_client.hub.head('me/x')[:7]
    create_commit('me/x', [add('a', b'3')], commit_message='three', parent_commit=short)
    assert hub_client.hub.files('me/x')['a'] == b'3'


def test_another_commit_can_slip_in_at_a_given_request(hub_client: Client):
    create_repo('me/x')
    parent = hub_client.hub.head('me/x')
    fault = hub_client.hub.fault('POST', r'/commit/main', call=lambda: hub_client.hub.commit('me/x', {'b': b'other'}))
    with pytest.raises(HfHubHTTPError, match='412'):
        create_commit('me/x', [add('a', b'1')], commit_message='one', parent_commit=parent)
    assert fault.hits == 1
    assert 'a' not in hub_client.hub.files('me/x')


def test_pull_requests_leave_main_alone_until_merged(hub_client: Client):
    hub, api = hub_client.hub, HfApi()
    hub.create_repo('me/x')
    hub_client.login('hf_other_write')
    with pytest.raises(HfHubHTTPError, match='create_pr=1'):
        create_commit('me/x', [add('a', b'1')], commit_message='push')
    info = create_commit('me/x', [add('a', b'1'), add('w.bin', WEIGHTS)], commit_message='offer', create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, 'refs/pr/1')
    assert 'a' not in hub.files('me/x')
    upload_file(path_or_fileobj=b'2', path_in_repo='b', repo_id='me/x', revision='refs/pr/1')
    assert read(hf_hub_download('me/x', 'b', revision='refs/pr/1')) == b'2'
    with pytest.raises(HfHubHTTPError, match='403'):
        api.merge_pull_request('me/x', 1)
    hub_client.login('hf_me_write')
    hub.commit('me/x', {'c': b'meanwhile'})
    api.merge_pull_request('me/x', 1)
    assert {'a': b'1', 'b': b'2', 'c': b'meanwhile', 'w.bin': WEIGHTS}.items() <= hub.files('me/x').items()
    assert api.get_discussion_details('me/x', 1).status == 'merged'
    draft = api.create_pull_request('me/x', 'title')
    api.comment_discussion('me/x', draft.num, 'text')
    api.change_discussion_status('me/x', draft.num, 'closed')
    assert [d.status for d in api.get_repo_discussions('me/x')] == ['closed', 'merged']
    assert [p.ref for p in list_repo_refs('me/x', include_pull_requests=True).pull_requests or []] == [
        'refs/pr/1',
        'refs/pr/2',
    ]


# --- Who may do what --------------------------------------------------------------------------------------------------


def test_private_repositories_do_not_exist_for_others(hub_client: Client):
    hub_client.hub.create_repo('me/x', private=True)
    hub_client.hub.commit('me/x', {'a': b'1'})
    assert repo_exists('me/x') and read(hf_hub_download('me/x', 'a')) == b'1'
    for token, status in {'hf_other_write': 404, None: 401}.items():
        hub_client.login(token)
        with pytest.raises(RepositoryNotFoundError) as error:
            hf_hub_download('me/x', 'a', cache_dir=hub_client.home / str(status))
        assert error.value.response.status_code == status
        assert not repo_exists('me/x') and not repo_exists('me/nothing')
        with pytest.raises(RepositoryNotFoundError):
            upload_file(path_or_fileobj=b'2', path_in_repo='a', repo_id='me/x')


def test_gated_repositories_are_seen_but_not_read(hub_client: Client):
    hub_client.hub.create_repo('me/x', gated='manual')
    hub_client.hub.commit('me/x', {'a': b'1'})
    for token, status in {'hf_other_write': 403, None: 401}.items():
        hub_client.login(token)
        assert repo_exists('me/x') and model_info('me/x').gated == 'manual'
        with pytest.raises(GatedRepoError, match=r'Access to model me/x is restricted') as error:
            hf_hub_download('me/x', 'a')
        assert error.value.response.status_code == status
    hub_client.hub.repos['me/x'].allowed.add('other')
    hub_client.login('hf_other_write')
    assert read(hf_hub_download('me/x', 'a')) == b'1'


def test_disabled_repositories(hub_client: Client):
    hub_client.hub.create_repo('me/x', disabled=True)
    with pytest.raises(DisabledRepoError):
        model_info('me/x')


def test_tokens_that_may_not_write(hub_client: Client):
    hub_client.hub.create_repo('me/x')
    hub_client.login('hf_me_read')
    with pytest.raises(HfHubHTTPError, match=r'403 Forbidden: .*write token'):
        upload_file(path_or_fileobj=b'2', path_in_repo='a', repo_id='me/x')
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: You don't have the rights to create a model"):
        create_repo('me/y')
    hub_client.login('hf_other_write')
    with pytest.raises(HfHubHTTPError, match='namespace "org"'):
        create_repo('org/y')
    hub_client.login('hf_unknown')
    for call in (lambda: model_info('me/x'), lambda: create_repo('me/y')):
        with pytest.raises(HfHubHTTPError, match='Invalid credentials in Authorization header') as error:
            call()
        assert error.value.response.status_code == 401
    hub_client.login(None)
    with pytest.raises(HfHubHTTPError, match='401'):
        create_repo('me/y')


def test_creating_again_is_a_conflict_unless_allowed(hub_client: Client):
    create_repo('org/x', private=True)
    assert hub_client.hub.repos['org/x'].private
    with pytest.raises(HfHubHTTPError, match='already created') as error:
        create_repo('org/x')
    assert error.value.response.status_code == 409
    assert create_repo('org/x', exist_ok=True).repo_id == 'org/x'
    HfApi().update_repo_settings('org/x', visibility='public', gated='auto')
    assert (hub_client.hub.repos['org/x'].private, hub_client.hub.repos['org/x'].gated) == (False, 'auto')
    huggingface_hub.delete_repo('org/x')
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.delete_repo('org/x')


def test_missing_things(hub_client: Client):
    hub_client.hub.create_repo('me/x')
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download('me/x', 'a')
    sha = hub_client.hub.head('me/x')
    assert (hub_client.cache / 'models--me--x' / '.no_exist' / sha / 'a').exists()
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download('me/x', '.gitattributes', revision='nowhere')
    with pytest.raises(RevisionNotFoundError):
        model_info('me/x', revision='nowhere')
    with pytest.raises(RepositoryNotFoundError):
        HfApi().get_repo_discussions('me/nothing').__next__()
    with pytest.raises(RemoteEntryNotFoundError):
        list(list_repo_tree('me/x', 'nothing'))


def test_the_token_never_reaches_the_storage(hub_client: Client):
    create_repo('me/x')
    upload_file(path_or_fileobj=WEIGHTS, path_in_repo='model.safetensors', repo_id='me/x')
    hf_hub_download('me/x', 'model.safetensors')
    by_listener = {'hub': [], 'storage': []}
    for record in hub_client.hub.log:
        by_listener[record.listener].append('authorization' in record.headers)
    assert by_listener['storage'] == [False, False] and all(by_listener['hub'])
    assert not [r for r in hub_client.hub.log if 'hf_me_write' in r.path]
    url = hub_client.hub.sign(f'/repos/me/x/{hashlib.sha256(WEIGHTS).hexdigest()}')
    assert httpx2.get(url).content == WEIGHTS
    assert httpx2.get(url, headers={'authorization': 'Bearer hf_me_write'}).status_code == 400
    assert httpx2.get(url.split('?')[0]).status_code == 403


@pytest.mark.parametrize(
    ('request_line', 'token', 'status', 'code', 'message'),
    [
        ('GET /api/models/me/private', None, 401, 'RepoNotFound', 'Invalid username or password.'),
        ('GET /api/models/me/private', 'hf_other_write', 404, 'RepoNotFound', 'Repository not found'),
        ('GET /api/models/me/nothing/tree/main', 'hf_me_write', 404, 'RepoNotFound', 'Repository not found'),
        ('GET /api/models/me/nothing/what/ever', 'hf_me_write', 404, 'RepoNotFound', 'Repository not found'),
        ('GET /api/models/plain-name', 'hf_me_write', 404, 'RepoNotFound', 'Repository not found'),
        ('GET /api/models/me/x', 'hf_bad', 401, None, 'Invalid credentials in Authorization header'),
        ('GET /api/models/me/disabled', 'hf_me_write', 403, None, 'Access to this resource is disabled.'),
        ('GET /api/models/me/x/revision/no', None, 404, 'RevisionNotFound', 'Invalid rev id: no'),
        ('GET /api/models/me/x/commits/no', None, 404, 'RevisionNotFound', 'Invalid rev id: no'),
        ('HEAD /me/x/resolve/no/a', None, 404, 'RevisionNotFound', 'Invalid rev id: no'),
        ('HEAD /me/x/resolve/main/a', None, 404, 'EntryNotFound', 'Entry not found'),
        ('HEAD /me/gated/resolve/main/a', None, 401, 'GatedRepo', 'Access to model me/gated is restricted.'),
        ('HEAD /me/gated/resolve/main/a', 'hf_other_write', 403, 'GatedRepo', 'Access to model me/gated is restricted'),
        ('POST /api/models/me/x/preupload/main', None, 401, None, 'Invalid username or password.'),
        ('POST /api/models/me/x/preupload/main', 'hf_me_read', 403, None, 'Forbidden: you must use a write token'),
        ('POST /api/models/me/x/preupload/main', 'hf_other_write', 403, None, 'Forbidden: pass `create_pr=1`'),
        ('POST /api/models/me/x/preupload/no', 'hf_me_write', 404, 'RevisionNotFound', 'Invalid rev id: no'),
        ('POST /api/models/me/x/preupload/main', 'hf_me_write', 400, None, 'Invalid JSON body'),
        ('POST /api/models/me/x/commit/main', 'hf_me_write', 400, None, 'Commits are sent as application/x-ndjson'),
        ('POST /me/x.git/info/lfs/objects/batch', 'hf_me_read', 403, None, 'Forbidden: you must use a write token'),
        ('POST /api/models/me/x/branch/a..b', 'hf_me_write', 400, None, 'Invalid reference name'),
        ('DELETE /api/models/me/x/branch/main', 'hf_me_write', 403, None, 'Cannot delete the default branch'),
        ('DELETE /api/models/me/x/tag/no', 'hf_me_write', 404, 'RevisionNotFound', 'Invalid rev id: no'),
        ('GET /api/models/me/x/xet-read-token/main', None, 404, None, 'Xet is not enabled'),
        ('GET /api/elsewhere', None, 404, None, 'Sorry, we cannot find the page'),
    ],
)
def test_errors_are_told_as_the_hub_tells_them(
    hub: HubServer, request_line: str, token: str | None, status: int, code: str | None, message: str
):
    hub.create_repo('me/x')
    hub.create_repo('me/private', private=True)
    hub.create_repo('me/gated', gated=True)
    hub.create_repo('me/disabled', disabled=True)
    method, path = request_line.split(' ', 1)
    headers = {'authorization': f'Bearer {token}'} if token else {}
    answer = httpx2.request(method, hub.endpoint + path, headers=headers, trust_env=False)
    assert (answer.status_code, answer.headers.get('X-Error-Code')) == (status, code)
    assert answer.headers['X-Error-Message'].startswith(message)
    assert method == 'HEAD' or answer.json()['error'].startswith(message)
    assert (code == 'EntryNotFound') == ('X-Repo-Commit' in answer.headers)


# --- What a commit may hold -------------------------------------------------------------------------------------------


def post_commit(client: Client, *operations: dict[str, Any], header: dict[str, Any] | None = None) -> httpx2.Response:
    lines = [{'key': 'header', 'value': {'summary': 's'} if header is None else header}, *operations]
    return httpx2.post(
        f'{client.hub.endpoint}/api/models/me/x/commit/main',
        content='\n'.join(map(json.dumps, lines)).encode(),
        headers={'authorization': 'Bearer hf_me_write', 'content-type': 'application/x-ndjson'},
    )


def file_line(path: str, content: str = 'YQ==') -> dict[str, Any]:
    return {'key': 'file', 'value': {'path': path, 'content': content, 'encoding': 'base64'}}


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (file_line('../a'), 'Invalid path'),
        (file_line('a/./b'), 'Invalid path'),
        (file_line('/a'), 'Invalid path'),
        (file_line('a/.git/config'), 'Invalid path'),
        (file_line('a\nb'), 'Invalid path'),
        (file_line('.gitattributes/a'), 'same name'),
        (file_line('a', '***'), 'Invalid content'),
        (file_line('a', 'AAAA'), 'binary files'),
        (file_line('a', 'YWFh' * (10 * 2**20 // 3 + 1)), 'larger than 10 MiB'),
        (file_line('README.md', 'LS0tCmxpY2Vuc2U6IG1pbmUKLS0tCg=='), 'Invalid metadata'),
        ({'key': 'lfsFile', 'value': {'path': 'a', 'algo': 'sha256', 'oid': '0' * 64, 'size': 1}}, 'does not exist'),
        ({'key': 'mystery', 'value': {'path': 'a'}}, 'Unknown operation'),
    ],
)
def test_bad_commits_are_refused(hub_client: Client, line: dict[str, Any], message: str):
    hub_client.hub.create_repo('me/x')
    before = hub_client.hub.head('me/x')
    answer = post_commit(hub_client, file_line('good'), line)
    assert answer.status_code == 400 and message in answer.headers['X-Error-Message']
    assert hub_client.hub.head('me/x') == before


def test_commits_without_a_header_are_refused(hub_client: Client):
    hub_client.hub.create_repo('me/x')
    assert post_commit(hub_client, file_line('a'), header={}).status_code == 400
    assert post_commit(hub_client, file_line('a')).status_code == 200


def test_uploads_must_have_the_promised_sha256(hub_client: Client):
    create_repo('me/x')
    fault = hub_client.hub.fault('PUT', r'/repos/me/x/', corrupt=True)
    with pytest.raises(RuntimeError, match=r'Error while uploading') as error:
        upload_file(path_or_fileobj=WEIGHTS, path_in_repo='model.safetensors', repo_id='me/x')
    assert isinstance(error.value.__cause__, BadRequestError) and 'BadDigest' in str(error.value.__cause__)
    assert fault.hits == 1 and not hub_client.hub.objects
    upload_file(path_or_fileobj=WEIGHTS, path_in_repo='model.safetensors', repo_id='me/x')


@pytest.mark.parametrize(
    ('card', 'message'),
    [
        ('license: mine', '"license" must be one of'),
        ('license: gpl-3.0-or-later', '"license" must be one of'),
        ('a: [', 'Invalid YAML'),
        ('license: mit\nlicense: mit', 'duplicated mapping key'),
        ('just text', '"metadata" must be of type object'),
        ('tags: 3', '"tags" must be one of'),
        ('datasets: [null]', '"datasets\\[0\\]" must be a string'),
        ('datasets: [a b]', 'fails to match the required pattern'),
        ('base_model: https://example.com/a', 'fails to match the required pattern'),
        ('base_model_relation: cousin', '"base_model_relation" must be one of'),
        ('library_name: [timm]', '"library_name" must be a string'),
        ('widget: {}', '"widget" must be an array'),
        ('co2_eq_emissions: much', '"co2_eq_emissions" must be one of'),
        ('model-index: {}', '"model-index" must be an array'),
        ('model-index: [{results: []}]', r'model-index\[0\]\.name" is required'),
        ('model-index: [{name: a}]', r'results" must be an array'),
        ('model-index: [{name: a, results: [{dataset: {type: a, name: b}}]}]', r'task" must be of type object'),
        ('model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d}, metrics: [{type: m}]}]}]',
         r'dataset\.name" is required(?s:.*)metrics\[0\]\.value" is required'),
        ('model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: d}, '
         'metrics: [{type: m, value: 1}], source: {name: n}}]}]', r'source\.url" is required'),
    ],
)  # fmt: skip
def test_bad_cards_are_refused(hub_client: Client, card: str, message: str):
    create_repo('me/x')
    text = f'---\n{card}\n---\n# Title\n'
    with pytest.raises(ValueError, match=f'Invalid metadata in README.md(?s:.*){message}'):
        upload_file(path_or_fileobj=text.encode(), path_in_repo='README.md', repo_id='me/x')
    answer = httpx2.post(
        f'{hub_client.hub.endpoint}/api/validate-yaml',
        json={'content': text, 'repoType': 'model'},
        headers={'accept': 'text/plain'},
    )
    assert answer.status_code == 400 and answer.text.startswith('- Error: ')


def test_good_cards_are_taken(hub_client: Client):
    create_repo('me/x')
    data = huggingface_hub.ModelCardData(
        license='other',
        license_name='mine',
        license_link='LICENSE',
        library_name='timm',
        datasets=['ILSVRC/imagenet-1k'],
        model_name='x',
        eval_results=[
            huggingface_hub.EvalResult(
                task_type='image-classification',
                dataset_type='ILSVRC/imagenet-1k',
                dataset_name='ImageNet-1k',
                metric_type='accuracy',
                metric_value=70.1,
                metric_name='Top-1',
                source_name='a',
                source_url='https://example.com',
            )
        ],
    )
    card = ModelCard(f'---\n{data.to_yaml()}\n---\n# Title\n')
    card.validate()
    card.push_to_hub('me/x')
    assert hub_client.hub.files('me/x')['README.md'].decode() == str(card)
    assert ModelCard.load('me/x').data.to_dict() == data.to_dict()
    with pytest.warns(UserWarning, match='empty or missing yaml metadata'):
        upload_file(path_or_fileobj=b'# Title\n', path_in_repo='README.md', repo_id='me/x')


def test_ignored_files_are_left_out(hub_client: Client):
    hub_client.hub.create_repo('me/x')
    hub_client.hub.commit('me/x', {'.gitignore': b'*.log\nbuild/\n!keep.log\n'})
    names = ['a.log', 'keep.log', 'build/x', 'b.txt']
    create_commit('me/x', [add(n, b'1') for n in names], commit_message='some')
    assert {*hub_client.hub.files('me/x')} == {'.gitattributes', '.gitignore', 'keep.log', 'b.txt'}


# --- Faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('status', [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize('path', ['/preupload/', '/info/lfs/objects/batch', '/repos/me/x', '/objects/verify'])
def test_the_client_outlasts_short_failures(hub_client: Client, status: int, path: str):
    create_repo('me/x')
    fault = hub_client.hub.fault('*', path, times=2, status=status)
    upload_file(path_or_fileobj=WEIGHTS, path_in_repo='model.safetensors', repo_id='me/x')
    assert fault.hits == 2 and hub_client.sleeps == [1, 2]
    assert hub_client.hub.files('me/x')['model.safetensors'] == WEIGHTS


def test_the_client_gives_up_after_five_more_tries(hub_client: Client):
    create_repo('me/x')
    fault = hub_client.hub.fault('POST', '/preupload/', times=None, status=503)
    with pytest.raises(HfHubHTTPError, match='Injected failure 503'):
        upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='me/x')
    assert fault.hits == 6 and hub_client.sleeps == [1, 2, 4, 8, 8]
    hub_client.hub.clear_faults()
    upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='me/x')


@pytest.mark.parametrize(
    ('headers', 'sleeps'), [({'Retry-After': '7'}, 8.0), ({'RateLimit': '"api";r=0;t=11'}, 12.0), ({}, 1)]
)
def test_too_many_requests_wait_as_the_server_says(hub_client: Client, headers: dict[str, str], sleeps: float):
    create_repo('me/x')
    hub_client.hub.fault('POST', '/preupload/', status=429, headers=headers)
    upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='me/x')
    assert hub_client.sleeps == [sleeps]


def test_a_failed_commit_is_not_repeated_but_the_upload_is_kept(hub_client: Client):
    create_repo('me/x')
    hub_client.hub.fault('POST', '/commit/', status=500)
    with pytest.raises(HfHubHTTPError, match='500'):
        upload_file(path_or_fileobj=WEIGHTS, path_in_repo='model.safetensors', repo_id='me/x')
    hub_client.hub.clear_log()
    upload_file(path_or_fileobj=WEIGHTS, path_in_repo='model.safetensors', repo_id='me/x')
    assert not [r for r in hub_client.hub.log if r.method == 'PUT']


def test_a_dropped_connection(hub_client: Client):
    create_repo('me/x')
    hub_client.hub.fault('PUT', '/repos/me/x', drop=True)
    upload_file(path_or_fileobj=WEIGHTS, path_in_repo='model.safetensors', repo_id='me/x')
    assert hub_client.hub.files('me/x')['model.safetensors'] == WEIGHTS and hub_client.sleeps == [1]
    hub_client.hub.fault('POST', '/commit/', drop=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='me/x')
    assert 'a' not in hub_client.hub.files('me/x')
    hub_client.hub.fault('POST', '/commit/', drop=True, after=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='me/x')
    assert hub_client.hub.files('me/x')['a'] == b'1'


def test_a_connection_cut_in_the_middle_of_an_upload(hub_client: Client):
    hub, data = hub_client.hub, random.Random(0).randbytes(8 * 2**20)
    create_repo('me/x')
    fault = hub.fault('PUT', '/repos/me/x', times=2, drop=True, truncate=1000)
    upload_file(path_or_fileobj=data, path_in_repo='model.safetensors', repo_id='me/x')
    assert fault.hits == 2 and hub_client.sleeps == [1, 2]
    assert [(r.size, r.status) for r in hub.log if r.method == 'PUT'] == [(0, None), (0, None), (len(data), 200)]
    assert hub.files('me/x')['model.safetensors'] == data
    hub.fault('POST', '/commit/', drop=True, truncate=0)
    # Which of the two depends on whether the client was still writing.
    with pytest.raises((httpx2.ReadError, httpx2.RemoteProtocolError)):
        upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='me/x')


def test_a_cut_download_is_resumed_by_range(hub_client: Client):
    hub_client.hub.create_repo('me/x')
    hub_client.hub.commit('me/x', {'model.safetensors': WEIGHTS, 'a.txt': b'0123456789' * 20})
    # What came since the last full chunk (10 MiB by default) is dropped and fetched again.
    hub_client.set('DOWNLOAD_CHUNK_SIZE', 100)
    hub_client.hub.fault('GET', '/repos/me/x', truncate=1050)
    hub_client.hub.fault('GET', '/resolve/main/a.txt', truncate=150)
    assert read(hf_hub_download('me/x', 'model.safetensors')) == WEIGHTS
    assert read(hf_hub_download('me/x', 'a.txt')) == b'0123456789' * 20
    gets = [(r.headers.get('range'), r.status) for r in hub_client.hub.log if r.method == 'GET']
    assert gets == [(None, 200), ('bytes=1000-', 206), (None, 200), ('bytes=100-', 206)]


def test_a_short_answer_that_says_so_is_noticed(hub_client: Client):
    hub_client.hub.create_repo('me/x')
    hub_client.hub.commit('me/x', {'model.safetensors': WEIGHTS})
    hub_client.hub.fault('GET', '/repos/me/x', truncate=1000, honest=True)
    with pytest.raises(OSError, match='Consistency check failed'):
        hf_hub_download('me/x', 'model.safetensors')


def test_corrupted_and_exchanged_contents_pass_the_client(hub_client: Client):
    hub_client.hub.create_repo('me/x')
    hub_client.hub.commit('me/x', {'model.safetensors': WEIGHTS, 'b.safetensors': WEIGHTS[1:]})
    hub_client.hub.fault('GET', '/repos/me/x', corrupt=True)
    found = read(hf_hub_download('me/x', 'model.safetensors'))
    assert len(found) == len(WEIGHTS) and sum(a != b for a, b in zip(found, WEIGHTS, strict=True)) == 1
    hub_client.hub.tamper('me/x', 'b.safetensors', b'other bytes' + WEIGHTS[12:])
    assert read(hf_hub_download('me/x', 'b.safetensors')).startswith(b'other')
    etag = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url('me/x', 'b.safetensors')).etag
    assert etag == hashlib.sha256(WEIGHTS[1:]).hexdigest()


def test_a_stalled_request_holds_until_released(hub_client: Client):
    hub_client.hub.create_repo('me/x')
    hub_client.hub.commit('me/x', {'a': b'1'})
    fault = hub_client.hub.fault('HEAD', '/resolve/', times=None, stall=True)
    with httpx2.Client(timeout=0.2) as client, pytest.raises(httpx2.ReadTimeout):
        client.head(f'{hub_client.hub.endpoint}/me/x/resolve/main/a')
    assert hub_client.hub.wait_for('HEAD', '/resolve/').status is None
    hub_client.timeouts(0.2)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download('me/x', 'a', etag_timeout=0.2, local_files_only=True)
    assert fault.hits == 1
    port = urllib.parse.urlsplit(hub_client.hub.endpoint).port
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
    connection.request('HEAD', '/me/x/resolve/main/a')
    hub_client.hub.wait_for('HEAD', '/resolve/', count=2)
    hub_client.hub.release()
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()


def test_a_server_that_went_away_and_came_back(hub_client: Client):
    create_repo('me/x')
    upload_file(path_or_fileobj=b'1', path_in_repo='a', repo_id='me/x')
    hf_hub_download('me/x', 'a')
    hub_client.hub.stop()
    assert read(hf_hub_download('me/x', 'a')) == b'1'
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download('me/x', 'b')
    with pytest.raises(httpx2.ConnectError):
        upload_file(path_or_fileobj=b'2', path_in_repo='a', repo_id='me/x')
    hub_client.hub.start()
    upload_file(path_or_fileobj=b'2', path_in_repo='a', repo_id='me/x')
    assert read(hf_hub_download('me/x', 'a')) == b'2'


def test_offline_sends_nothing(hub_client: Client):
    hub_client.hub.create_repo('me/x')
    hub_client.hub.commit('me/x', {'a': b'1'})
    path = hf_hub_download('me/x', 'a')
    hub_client.hub.clear_log()
    hub_client.offline()
    assert hf_hub_download('me/x', 'a') == path
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download('me/x', 'b')
    assert hub_client.hub.log == []


def test_a_mistake_of_the_server_fails_the_test(hub: HubServer):
    hub.create_repo('me/x')
    del hub.repos['me/x'].branches['main']
    hub.repos['me/x'].branches['main'] = 'no commit'
    assert httpx2.get(f'{hub.endpoint}/api/models/me/x', trust_env=False).status_code == 500
    with pytest.raises(RuntimeError, match='loopback Hub itself failed'):
        hub.close()
    hub._bugs.clear()


def test_mistakes_of_a_test_are_told(hub_client: Client):
    hub = hub_client.hub
    hub.create_repo('me/x')
    with pytest.raises(ValueError, match='me/x exists already'):
        hub.create_repo('me/x')
    with pytest.raises(ValueError, match='nowhere is no branch of me/x'):
        hub.commit('me/x', {'a': b'1'}, revision='nowhere')
    with pytest.raises(ValueError, match='me/x has no revision nowhere'):
        hub.files('me/x', 'nowhere')
    with pytest.raises(ValueError, match='me/x has no revision nowhere'):
        hub.head('me/x', 'nowhere')
    with pytest.raises(ValueError, match=r'\.gitattributes is no large file at main of me/x'):
        hub.tamper('me/x', '.gitattributes', b'')
    with pytest.raises(TimeoutError, match=r"No POST 'nothing' within 0.01 s; came: nothing"):
        hub.wait_for('POST', 'nothing', timeout=0.01)
    with pytest.raises(AttributeError, match='no constant HF_ENDPOINTS'):
        hub_client.set('HF_ENDPOINTS', '')


# --- Xet --------------------------------------------------------------------------------------------------------------


def floats(count: int, seed: int) -> bytes:
    """Weights, which Xet packs in groups of bytes."""
    generator = random.Random(seed)
    return struct.pack(f'<{count}f', *(generator.gauss(0, 0.02) for _ in range(count)))


@pytest.mark.parametrize(
    'data',
    [b'\0', b'a' * 400_000, bytes(range(256)) * 999, random.Random(0).randbytes(300_001), floats(100_003, 0)],
    ids=['one byte', 'repeated', 'cycle', 'noise', 'floats'],
)
def test_xet_files_come_back_as_they_were_sent(xet_client: Client, data: bytes):
    hub = xet_client.hub
    create_repo('me/x')
    upload_file(path_or_fileobj=data, path_in_repo='w.safetensors', repo_id='me/x')
    assert hub.files('me/x')['w.safetensors'] == data
    assert read(hf_hub_download('me/x', 'w.safetensors')) == data
    assert not [r for r in hub.log if '/info/lfs/' in r.path or r.path.startswith('/repos/')]
    assert [listed('me/x')['w.safetensors'].xet_hash] == [*hub.cas.files]
    assert list((xet_client.home / 'xet').iterdir())
    # A client without Xet reads the same file from storage.
    xet_client.set('HF_HUB_DISABLE_XET', True)
    assert read(hf_hub_download('me/x', 'w.safetensors', cache_dir=xet_client.home / 'plain')) == data


def test_xet_folders_and_snapshots(xet_client: Client, tmp_path: Path):
    folder = tmp_path / 'model'
    folder.mkdir()
    contents = {'README.md': CARD, 'a.safetensors': floats(50_000, 1), 'b.safetensors': floats(70_000, 2)}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    create_repo('me/x')
    upload_folder(repo_id='me/x', folder_path=folder)
    assert len(xet_client.hub.commits('me/x')) == 2
    found = Path(snapshot_download('me/x'))
    assert {name: (found / name).read_bytes() for name in contents} == contents
    (folder / 'README.md').write_bytes(CARD + b'more\n')
    info = upload_folder(repo_id='me/x', folder_path=folder, create_pr=True)
    assert info.pr_revision == 'refs/pr/1'
    assert xet_client.hub.files('me/x', 'refs/pr/1')['README.md'].endswith(b'more\n')
    assert xet_client.hub.files('me/x')['README.md'] == CARD


def test_xet_files_that_the_server_was_given(xet_client: Client):
    hub, data = xet_client.hub, random.Random(4).randbytes(200_001)
    hub.create_repo('me/x')
    hub.commit('me/x', {'w.bin': data})
    assert read(hf_hub_download('me/x', 'w.bin')) == data
    assert [c.split('/')[1] for c in calls(xet_client)] == ['me', 'api', 'v2', 'xorbs']
    xet_client.new_xet_session(xet_client.home / 'other')
    hub.tamper('me/x', 'w.bin', data[::-1])
    assert read(hf_hub_download('me/x', 'w.bin', cache_dir=xet_client.home / 'tampered')) == data[::-1]
    # The hash is the one that hf_xet gives the same file.
    create_repo('me/y')
    upload_file(path_or_fileobj=data, path_in_repo='w.bin', repo_id='me/y')
    assert listed('me/y')['w.bin'].xet_hash == listed('me/x')['w.bin'].xet_hash


def test_xet_sends_nothing_that_is_there(xet_client: Client):
    hub, data = xet_client.hub, floats(300_000, 3)
    for repo_id in ('me/x', 'me/y'):
        create_repo(repo_id)
        upload_file(path_or_fileobj=data, path_in_repo='w.safetensors', repo_id=repo_id)
    assert len([r for r in hub.log if r.method == 'PUT']) == 1
    # The next client knows nothing of the first one's uploads but what the server says of their chunks.
    xet_client.new_xet_session(xet_client.home / 'other')
    create_repo('me/z')
    hub.clear_log()
    upload_file(path_or_fileobj=data, path_in_repo='w.safetensors', repo_id='me/z')
    assert not [r for r in hub.log if r.method == 'PUT']
    assert [r.status for r in hub.log if '/v1/chunks/' in r.path][:1] == [200]
    assert hub.files('me/z')['w.safetensors'] == data


def test_xet_tokens_stay_where_they_belong(xet_client: Client):
    hub = xet_client.hub
    create_repo('me/x')
    upload_file(path_or_fileobj=floats(1000, 4), path_in_repo='w.safetensors', repo_id='me/x')
    hf_hub_download('me/x', 'w.safetensors')
    tokens = {name: {r.headers.get('authorization', '')[:11] for r in hub.log if r.listener == name} for name in
              ('hub', 'storage', 'cas')}  # fmt: skip
    assert tokens == {'hub': {'Bearer hf_m'}, 'storage': {''}, 'cas': {'Bearer xet_'}}
    place = next(r for r in hub.log if r.path.startswith('/xorbs/'))
    assert httpx2.get(hub.storage_endpoint + place.path).status_code == 403
    file_hash = next(iter(hub.cas.files))
    url = f'{hub.cas_endpoint}/v1/reconstructions/{file_hash}'
    assert httpx2.get(url, headers={'authorization': 'Bearer hf_me_write'}).status_code == 401
    token, _ = hub.cas.grant(hub.repos['me/x'], None, 'read')
    answer = httpx2.post(f'{hub.cas_endpoint}/v1/shards', headers={'authorization': f'Bearer {token}'})
    assert answer.status_code == 403


def test_xet_without_a_store_is_an_error(hub_client: Client):
    create_repo('me/x')
    hub_client.set('HF_HUB_DISABLE_XET', False)
    with pytest.raises(ConnectionError):
        upload_file(path_or_fileobj=WEIGHTS, path_in_repo='w.safetensors', repo_id='me/x')


@pytest.mark.parametrize(
    'path', ['/xet-write-token/', '/xorb-grants/', '/xorb-uploads/', '/xorb-commits/', '/shards', '/xet-read-token/',
             '/reconstructions/', '/xorbs/']
)  # fmt: skip
def test_xet_outlasts_short_failures(xet_client: Client, path: str):
    fault = xet_client.hub.fault('*', path, times=2, status=503)
    data = floats(10_000, 5)
    create_repo('me/x')
    upload_file(path_or_fileobj=data, path_in_repo='w.safetensors', repo_id='me/x')
    assert read(hf_hub_download('me/x', 'w.safetensors')) == data
    assert fault.hits == 2


def test_xet_falls_back_to_the_first_version(xet_client: Client):
    hub = xet_client.hub
    faults = [hub.fault('*', path, times=None, status=404) for path in ('/xorb-grants/', '/v2/shards', '/v2/recon')]
    data = floats(10_000, 6)
    create_repo('me/x')
    upload_file(path_or_fileobj=data, path_in_repo='w.safetensors', repo_id='me/x')
    assert read(hf_hub_download('me/x', 'w.safetensors')) == data
    assert all(f.hits for f in faults)
    used = ('POST /v1/xorbs/default/', 'POST /v1/shards', 'GET /v1/reconstructions/')
    assert all(any(c.startswith(u) for c in calls(xet_client)) for u in used)


def test_xet_shows_a_refused_token(xet_client: Client):
    create_repo('me/x')
    xet_client.hub.fault('GET', '/xet-write-token/', times=None, status=403)
    with pytest.raises(ConnectionError, match='403 Forbidden'):
        upload_file(path_or_fileobj=WEIGHTS, path_in_repo='w.safetensors', repo_id='me/x')


def test_xet_uploads_must_have_the_promised_sha256(xet_client: Client):
    create_repo('me/x')
    fault = xet_client.hub.fault('PUT', '/xorb-uploads/', corrupt=True)
    with pytest.raises(ConnectionError, match='400'):
        upload_file(path_or_fileobj=random.Random(1).randbytes(99_999), path_in_repo='w.bin', repo_id='me/x')
    assert fault.hits == 1 and list(xet_client.hub.files('me/x')) == ['.gitattributes']


def test_xet_downloads_that_break(xet_client: Client):
    hub, data = xet_client.hub, random.Random(2).randbytes(300_000)
    create_repo('me/x')
    upload_file(path_or_fileobj=data, path_in_repo='w.bin', repo_id='me/x')
    for i, fault in enumerate([hub.fault('GET', '/xorbs/', drop=True), hub.fault('GET', '/xorbs/', truncate=1000)]):
        xet_client.new_xet_session(xet_client.home / f'xet{i}')
        assert read(hf_hub_download('me/x', 'w.bin', cache_dir=xet_client.home / str(i))) == data
        assert fault.hits == 1
    xet_client.new_xet_session(xet_client.home / 'xet_corrupt')
    hub.fault('GET', '/xorbs/', corrupt=True)
    found = read(hf_hub_download('me/x', 'w.bin', cache_dir=xet_client.home / 'corrupt'))
    assert len(found) == len(data) and sum(a != b for a, b in zip(found, data, strict=True)) == 1


def test_xet_reads_a_part_of_a_file(xet_client: Client):
    hub, data = xet_client.hub, random.Random(3).randbytes(500_000)
    create_repo('me/x')
    upload_file(path_or_fileobj=data[:200_000], path_in_repo='a.bin', repo_id='me/x')
    upload_file(path_or_fileobj=data[:200_000] + b'between' + data, path_in_repo='b.bin', repo_id='me/x')
    whole, name = hub.files('me/x')['b.bin'], [*hub.cas.files][1]
    token, _ = hub.cas.grant(hub.repos['me/x'], None, 'read')
    for start, end in [(0, 9), (150_000, 250_000), (600_000, 10**9)]:
        headers = {'authorization': f'Bearer {token}', 'range': f'bytes={start}-{end}'}
        found = httpx2.get(f'{hub.cas_endpoint}/v2/reconstructions/{name}', headers=headers).json()
        parts = [hub.cas.xorbs[t['hash']].chunks[t['range']['start'] : t['range']['end']] for t in found['terms']]
        unpacked = b''.join(map(b''.join, parts))[found['offset_into_first_range'] :]
        assert unpacked[: end + 1 - start] == whole[start : end + 1]
    headers = {'authorization': f'Bearer {token}', 'range': f'bytes={len(whole)}-'}
    assert httpx2.get(f'{hub.cas_endpoint}/v2/reconstructions/{name}', headers=headers).status_code == 416


def test_xet_in_another_process(xet_hub: HubServer, run_client: RunClient):
    assert run_client(push_and_pull, 'me/x', server=xet_hub).value == xet_hub.endpoint
    assert xet_hub.cas.xorbs


# --- The fixtures -----------------------------------------------------------------------------------------------------


def switches() -> dict[str, Any]:
    return {k: v for k, v in vars(constants).items() if k.isupper()}


BEFORE = switches()


def test_the_client_in_this_process_is_pointed_at_the_server(hub_client: Client):
    hub = hub_client.hub
    assert str(hub_client.cache) == constants.HF_HUB_CACHE
    uses: dict[str, Callable[[], object]] = {
        'bound function': lambda: model_info('me/x'),
        'HfApi': lambda: HfApi().model_info('me/x'),
        'url': lambda: huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url('me/x', 'README.md')),
        'download': lambda: hf_hub_download('me/x', 'README.md'),
        'snapshot': lambda: snapshot_download('me/x'),
        'card': lambda: ModelCard.load('me/x').validate(),
        'file system': lambda: huggingface_hub.HfFileSystem(skip_instance_cache=True).ls('me/x', detail=False),
        'whoami': whoami,
    }
    hub.create_repo('me/x')
    hub.commit('me/x', {'README.md': CARD})
    for use, call in uses.items():
        hub.clear_log()
        call()
        assert hub.log, f'{use} did not reach the server'


def test_the_client_in_this_process_is_put_back(hub: HubServer):
    # Runs in any order with the test above: nothing of any earlier server is left.
    assert switches() == BEFORE
    assert huggingface_hub.hf_api.api.endpoint == BEFORE['ENDPOINT']
    assert huggingface_hub.hf_hub_url('a/b', 'c') == f'{BEFORE["ENDPOINT"]}/a/b/resolve/main/c'


def test_timm_talks_to_the_server(hub_client: Client, monkeypatch: pytest.MonkeyPatch):
    timm = pytest.importorskip('timm')
    torch = pytest.importorskip('torch')
    model = timm.create_model('test_resnet', num_classes=5).eval()
    timm.models.push_to_hf_hub(model, 'me/x', safe_serialization=True)
    again = timm.create_model('hf-hub:me/x', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert {*hub_client.hub.files('me/x')} == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}
    assert hub_client.hub.log[0].headers['user-agent'].startswith('timm/')


def push_and_pull(repo_id: str) -> str:
    import huggingface_hub

    huggingface_hub.create_repo(repo_id)
    huggingface_hub.upload_file(path_or_fileobj=b'\0' * 99, path_in_repo='w.bin', repo_id=repo_id)
    with open(huggingface_hub.hf_hub_download(repo_id, 'w.bin'), 'rb') as file:
        assert file.read() == b'\0' * 99
    return huggingface_hub.constants.ENDPOINT


def test_the_client_in_another_process(hub: HubServer, run_client: RunClient):
    assert run_client(push_and_pull, 'me/x').value == hub.endpoint
    assert hub.files('me/x')['w.bin'] == bytes(99)
    failed = run_client('raise SystemExit(3)', check=False)
    assert failed.returncode == 3


def test_a_client_killed_while_its_request_is_held(hub: HubServer, start_client: StartClient):
    hub.fault('POST', '/commit/', stall=True)
    process = start_client(push_and_pull, 'me/x')
    hub.wait_for('POST', '/commit/', timeout=60)
    process.kill()
    assert process.wait() != 0
    hub.release()
    assert list(hub.files('me/x')) == ['.gitattributes']
    assert len(hub.objects) == 1


def test_nothing_is_warned_about(hub_client: Client):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', "Use 'content=", DeprecationWarning)
        create_repo('me/x')
        upload_file(path_or_fileobj=CARD, path_in_repo='README.md', repo_id='me/x')
