"""What a hostile or broken repository may hold, and what happens around a load or a push: rows of docs/reliability.md.

An attack changes the three files of a good repository; `ATTACKS[i].fault['change']` does so.
"""

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from hub_tables import Row

Files = dict[str, bytes]
_REFUSED = 'refused'


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], Files]:
    def apply(files: Files) -> Files:
        config = json.loads(files['config.json'])
        change(config)
        return {**files, 'config.json': json.dumps(config).encode()}

    return apply


def _top(**values: Any) -> Callable[[Files], Files]:
    return _config(lambda c: c.update(values))


def _args(**values: Any) -> Callable[[Files], Files]:
    return _config(lambda c: c['model_args'].update(values))


def _cfg(**values: Any) -> Callable[[Files], Files]:
    return _config(lambda c: c['pretrained_cfg'].update(values))


def _about(**values: Any) -> Callable[[Files], Files]:
    return _config(lambda c: c['timm_attn'].update(values))


def _flat(**values: Any) -> Callable[[Files], Files]:
    """An old config.json without pretrained_cfg, all of which timm takes for one."""

    def change(config: dict[str, Any]) -> None:
        for key in ('pretrained_cfg', 'timm_attn', 'model_args', 'global_pool'):
            config.pop(key, None)
        config.update(values)

    return _config(change)


def _bytes(data: bytes) -> Callable[[Files], Files]:
    return lambda files: {**files, 'config.json': data}


_CONFIGS: tuple[tuple[str, Callable[[Files], Files], str], ...] = (
    ('a list', _bytes(b'[]'), 'must hold a JSON object'),
    ('not JSON', _bytes(b'{"architecture": '), 'no JSON'),
    ('not UTF-8', _bytes(b'{"architecture": "\xff\xfe"}'), 'no JSON'),
    ('empty', _bytes(b''), 'no JSON'),
    ('2 MiB of spaces', _bytes(b' ' * (2 << 20) + b'{}'), 'at most 1048576'),
    ('100 000 nested lists', _bytes(b'[' * 100_000 + b']' * 100_000), 'no JSON'),
    ('a number of 10 000 digits', _bytes(b'{"num_classes": ' + b'9' * 10_000 + b'}'), 'no JSON'),
    ('NaN in it', _bytes(b'{"num_classes": NaN}'), 'no JSON'),
    ('a key twice', _bytes(b'{"architecture": "resnet18", "architecture": "resnet50"}'), 'twice'),
    ('no architecture', _config(lambda c: c.pop('architecture')), 'architecture'),
    ('architecture nobody knows', _top(architecture='evil_net'), 'architecture'),
    ('architecture of another family', _top(architecture='vit_huge_patch14_224'), 'architecture'),
    ('architecture with a source prefix', _top(architecture='hf-hub:evil/model'), 'architecture'),
    ('architecture that is a list', _top(architecture=['resnet18']), 'architecture'),
    ('num_classes missing', _config(lambda c: c.pop('num_classes')), 'num_classes'),
    ('num_classes negative', _top(num_classes=-1), 'num_classes'),
    ('num_classes 10 billion', _top(num_classes=10_000_000_000), 'num_classes'),
    ('num_classes true', _top(num_classes=True), 'num_classes'),
    ('num_classes "3"', _top(num_classes='3'), 'num_classes'),
    ('num_classes given twice, differently', _cfg(num_classes=5), 'num_classes'),
    ('model_args a list', _top(model_args=['x']), 'model_args'),
    ('model_args: 300 layers', _args(layers=[300, 1, 1, 1]), 'layers'),
    ('model_args: channels of a million', _args(channels=[1_000_000, 8]), 'channels'),
    ('model_args: pretrained_strict false', _args(pretrained_strict=False), 'pretrained_strict'),
    ('model_args: features_only', _args(features_only=True), 'features_only'),
    ('model_args: pretrained_cfg', _args(pretrained_cfg={'file': '/etc/passwd'}), 'pretrained_cfg'),
    ('model_args: checkpoint_path', _args(checkpoint_path='/tmp/evil.pth'), 'checkpoint_path'),
    ('model_args: cache_dir', _args(cache_dir='/'), 'cache_dir'),
    ('model_args: a block by name', _args(block='os.system'), 'block'),
    ('model_args: in_chans 10 million', _args(in_chans=10_000_000), 'in_chans'),
    ('model_args: another attention', _args(attn='gsop'), 'attn'),
    ('model_args: an attn_args nobody knows', _args(attn_args={'evil': 1}), 'evil'),
    ('model_args: attn_args of a billion', _args(attn_args={'kernel_size': 1_000_000_001}), 'attn_args'),
    ('model_args: attn_args nested', _args(attn_args={'rd_ratio': {'a': 1}}), 'attn_args'),
    ('model_args: an option the model lacks', _args(cifar_stem=True), 'cannot be built'),
    ('pretrained_cfg a text', _top(pretrained_cfg='x'), 'pretrained_cfg'),
    ('pretrained_cfg: an unknown key', _cfg(evil=1), 'evil'),
    ('pretrained_cfg: hf_hub_filename', _cfg(hf_hub_filename='../../evil.bin'), 'points elsewhere'),
    ('pretrained_cfg: hf_hub_id', _cfg(hf_hub_id='evil/model'), 'points elsewhere'),
    ('pretrained_cfg: file', _cfg(file='/etc/passwd'), 'points elsewhere'),
    ('pretrained_cfg: url', _cfg(url='http://127.0.0.1/evil.pth'), 'points elsewhere'),
    ('pretrained_cfg: state_dict', _cfg(state_dict={'fc.weight': [1]}), 'points elsewhere'),
    ('pretrained_cfg: custom_load', _cfg(custom_load='hf'), 'custom_load'),
    ('pretrained_cfg: a classifier inside the trunk', _cfg(classifier='blocks.0.conv'), 'classifier'),
    ('pretrained_cfg: another first_conv', _cfg(first_conv='blocks.2.conv'), 'first_conv'),
    ('pretrained_cfg: deviation 0', _cfg(std=[0, 0, 0]), 'std'),
    ('pretrained_cfg: images of a million pixels a side', _cfg(input_size=[3, 1_000_000, 1_000_000]), 'input_size'),
    ('pretrained_cfg: other channels than the model', _cfg(input_size=[4, 32, 32]), 'input_size'),
    ('label_names of another length', _top(label_names=['a']), 'label_names'),
    ('label_names of a megabyte each', _top(label_names=['a', 'b', 'c' * 5000]), 'label_names'),
    ('timm_attn a list', _top(timm_attn=[1]), 'timm_attn'),
    ('model_args null', _top(model_args=None), 'model_args'),
    ('pretrained_cfg null', _top(pretrained_cfg=None), 'pretrained_cfg'),
    ('pretrained_cfg false', _top(pretrained_cfg=False), 'pretrained_cfg'),
    ('pretrained_cfg an empty text', _top(pretrained_cfg=''), 'pretrained_cfg'),
    ('pretrained_cfg an empty list', _top(pretrained_cfg=[]), 'pretrained_cfg'),
    ('flat: images of a million pixels a side', _flat(input_size=[3, 1_000_000, 1_000_000]), 'input_size'),
    ('flat: deviation 0', _flat(std=[0, 0, 0]), 'std'),
    ('flat: an unknown key', _flat(evil=1), 'evil'),
    ('flat: a file elsewhere', _flat(file='/etc/passwd'), 'points elsewhere'),
    ('label_names by name', _top(label_names={'a': 0, 'b': 1, 'c': 2}), 'class indices 0 to 2'),
    ('label_names with a gap', _top(label_names={'0': 'a', '1': 'b', '3': 'c'}), 'class indices 0 to 2'),
    ('label_names with an index twice', _top(label_names={'0': 'a', '00': 'b', '1': 'c'}), 'class indices 0 to 2'),
    ('label_names a text', _top(label_names='abc'), 'label_names'),
    ('label_descriptions of no class', _top(label_descriptions={'z': 'last'}), 'label_descriptions'),
    ('the sha256 of other weights', _about(weights_sha256='0' * 64), 'belongs to other weights'),
    ('the sha256 a number', _about(weights_sha256=0), 'weights_sha256'),
    ('an unknown status', _about(status='best'), 'status'),
    ('a status that is a list', _about(status=[]), 'status'),
    ('provenance a list', _about(provenance=['x']), 'provenance'),
    ('provenance.datasets a number', _about(provenance={'datasets': 5}), 'datasets'),
    ('provenance.source an object', _about(provenance={'source': {}}), 'source'),
    ('training a text', _about(training='long'), 'training'),
    ('training nested deep', _about(training={'x': {'y': {'z': 1}}}), 'training'),
    ('evaluation a number', _about(evaluation=5), 'evaluation'),
    ('evaluation without metrics', _about(evaluation=[{'dataset': 'x'}]), 'metrics'),
    ('evaluation with a metric in words', _about(evaluation=[{'dataset': 'x', 'metrics': {'a': 'b'}}]), 'metric'),
    ('versions a list of objects', _about(versions=[{}]), 'versions'),
)


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack('<Q', data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + body


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], Files]:
    def apply(files: Files) -> Files:
        header, body = _split(files['model.safetensors'])
        header = copy.deepcopy(header)
        change(header)
        return {**files, 'model.safetensors': _join(header, body)}

    return apply


def _weights(make: Callable[[bytes], bytes]) -> Callable[[Files], Files]:
    return lambda files: {**files, 'model.safetensors': make(files['model.safetensors'])}


def _fill(value: bytes) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        header, body = _split(data)
        start = header['blocks.2.conv.weight']['data_offsets'][0]
        return _join(header, body[:start] + value + body[start + len(value) :])

    return apply


def _float64(value: float, name: str = 'blocks.2.conv.weight') -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        tensors[name] = torch.full_like(tensors[name], value, dtype=torch.float64)
        return safetensors.torch.save(tensors)

    return apply


def _changed(name: str, value: float) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        tensors[name].fill_(value)
        return safetensors.torch.save(tensors)

    return apply


def _many(data: bytes) -> bytes:
    empty = {f'x{i}': {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]} for i in range(200_000)}
    return _join(empty, b'')


def _repeated(data: bytes) -> bytes:
    length = struct.unpack('<Q', data[:8])[0]
    header = data[8 : 8 + length].rstrip()
    name = b'"head.fc.bias":'
    start = header.index(name)
    entry = header[start : header.index(b'}', start) + 1]
    return _join(header[:-1] + b',' + entry + b'}', data[8 + length :])


def _metadata(value: Any) -> Callable[[Files], Files]:
    return _header(lambda h: h.update(__metadata__=value))


def _empty(files: Files) -> Files:
    return {**files, 'model.safetensors': _join({}, b'')}


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.update({new: header.pop(old)})


_WEIGHTS: tuple[tuple[str, Callable[[Files], Files], str], ...] = (
    ('cut short by a byte', _weights(lambda d: d[:-1]), 'no intact safetensors file: it is cut short'),
    ('a byte left over', _weights(lambda d: d + b'\0'), 'left over'),
    ('empty', _weights(lambda d: b''), 'no safetensors file'),
    ('a header of 2^60 bytes', _weights(lambda d: struct.pack('<Q', 1 << 60) + d[8:]), 'no safetensors file'),
    ('a header of 30 MB', _weights(lambda d: struct.pack('<Q', 30 << 20) + b' ' * (30 << 20)), 'at most'),
    ('a header that is no JSON', _weights(lambda d: _join(b'{' * 100, b'')), 'no JSON'),
    ('a header that is a list', _weights(lambda d: _join(b'[]', b'')), 'no JSON object'),
    ('a tensor with another shape', _header(lambda h: h['head.fc.bias'].update(shape=[1, 3])), 'another shape'),
    (
        'a tensor that overlaps another',
        _header(lambda h: h['head.fc.bias'].update(data_offsets=[0, 12])),
        'no intact safetensors file',
    ),
    (
        'offsets that run backwards',
        _header(lambda h: h['head.fc.bias'].update(data_offsets=[12, 0])),
        'no intact safetensors file',
    ),
    ('a negative shape', _header(lambda h: h['head.fc.bias'].update(shape=[-3])), 'no intact safetensors file'),
    (
        'a dtype nobody trains in',
        _header(lambda h: h['head.fc.bias'].update(dtype='F8_E4M3')),
        'no intact safetensors file',
    ),
    ('integers for weights', _weights(lambda d: d.replace(b'"F32"', b'"I32"')), 'dtype'),
    ('a tensor missing', _header(_rename('head.fc.bias', 'other')), '1 missing: head.fc.bias'),
    ('no tensors at all', _empty, 'missing'),
    ('NaN', _weights(_fill(b'\x00\x00\xc0\x7f')), 'NaN or infinite'),
    ('infinity', _weights(_fill(b'\x00\x00\x80\x7f')), 'NaN or infinite'),
    ('1e300, which float32 does not hold', _weights(_float64(1e300)), 'NaN or infinite values once they are float32'),
    (
        'a variance below 0',
        _weights(_changed('blocks.0.se.bn.running_var', -1)),
        'is negative .-1., and a variance is not',
    ),
    ('a count below 0', _weights(_changed('blocks.0.se.bn.num_batches_tracked', -5)), 'counts batches'),
    ('200 000 empty tensors', _weights(_many), '200000 that do not belong'),
    ('a name twice', _weights(_repeated), 'twice'),
    ('a dtype that is a list', _header(lambda h: h['head.fc.bias'].update(dtype=['F32'])), 'no intact safetensors'),
    ('__metadata__ of numbers', _metadata({'format': 5}), '__metadata__'),
    ('__metadata__ a list', _metadata(['pt']), '__metadata__'),
    ('__metadata__ a text', _metadata('pt'), '__metadata__'),
    ('__metadata__ null', _metadata(None), '__metadata__'),
    ('__metadata__ with half a character', _metadata({'format': '\ud800'}), 'no intact safetensors|no JSON'),
    ('a pickle by that name', _weights(lambda d: b'\x80\x02cos\nsystem\nq\x00.'), 'no safetensors file'),
)


class _Boom:
    """Pickled, it would write a file when read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ('PWNED', 'w'))


def _pickle(files: Files) -> Files:
    import pickle

    return {**files, 'pytorch_model.bin': pickle.dumps(_Boom())}


def _pickle_only(files: Files) -> Files:
    return {k: v for k, v in _pickle(files).items() if k != 'model.safetensors'}


def _attack(step: str, what: str, change: Callable[[Files], Files], match: str, outcome: str = _REFUSED) -> Row:
    name = f'{step} {what}'.replace(' ', '_')
    return Row(name, what, outcome, step, fault={'change': change}, match=match)


_NEVER = 'refused: no pickle is ever read'
ATTACKS = [
    *(_attack('config.json', *c) for c in _CONFIGS),
    *(_attack('model.safetensors', *w) for w in _WEIGHTS),
    _attack('files', 'no config.json', lambda f: {k: v for k, v in f.items() if k != 'config.json'}, 'config.json'),
    _attack('files', 'a pickle in place of safetensors', _pickle_only, 'never loaded', _NEVER),
    _attack('files', 'a pickle beside safetensors', _pickle, '', 'done: the pickle is not fetched'),
]

# A process that dies at each of its file operations below the folder, and at least how many there are.
KILLS = [
    Row(_id.replace(' ', '_'), _id, outcome, 'kill', fault={'at_least': least})
    for _id, outcome, least in (
        ('save', 'none or all of the new; run again', 10),
        ('save over', 'all of the old or all of the new; run again', 20),
        ('pull', 'none or all of the new; run again', 10),
        ('pull over', 'all of the old or all of the new; run again', 20),
        ('convert', 'none or all of the new; run again', 10),
        ('convert over', 'all of the old or all of the new; run again', 20),
        ('quickstart', 'none or all of the new, without or with its pictures; run again', 20),
        ('card', 'the old card or the new one, each with its config; run again', 10),
        ('push', 'folder and repository stay whole; run again', 3),
    )
]

EVENTS = [
    Row(
        'two_pushers',
        'two pushes of other weights at once',
        'the first is done; the later one is refused and names its commit',
        'push',
    ),
    Row(
        'other_weights_in_between',
        'somebody commits other weights between our look and our commit',
        'refused: the message names their commit; force=True replaces them',
        'push',
    ),
    Row('edit_in_between', 'somebody edits the card between our look and our commit', 'done: the edit is kept', 'push'),
    Row(
        'commits_all_the_time', 'somebody commits before each of our attempts', 'error; their commits are kept', 'push'
    ),
    Row(
        'killed_at_each_request',
        'the process dies at any request, before or after it took effect',
        'done: run again',
        'push',
    ),
    Row('sigkill_in_the_upload', 'SIGKILL during the upload', 'done: run again', 'push'),
    Row(
        'sigkill_after_the_commit',
        'SIGKILL before the answer to the commit',
        'done: run again, no second commit',
        'push',
    ),
    Row('server_gone', 'the Hub is down', 'error at once; done when it is back', 'push'),
    Row('same_push_twice', 'the same push again', 'done: no commit, no upload', 'push'),
    Row(
        'upload_corrupted', 'a bit flips on the way to the storage', 'done: the storage refuses it, sent again', 'push'
    ),
    Row('no_token', 'nobody is logged in', 'error before the first request', 'push'),
    Row('read_only_token', 'a token without write access', 'error; nothing created', 'push'),
    Row('foreign_namespace', "somebody else's namespace", 'error; nothing created', 'push'),
    Row('token_stays_on_the_hub', 'the storage is another host', 'done: it never sees the token', 'push'),
    Row('token_in_an_error', 'the Hub echoes the token in an error', 'error without the token, traceback too', 'push'),
    Row('nan_weights', 'the model holds NaN', 'refused before the first request', 'push'),
    Row(
        'card_with_a_wrong_licence',
        'a licence the Hub does not know, without name and link',
        'refused before the first request',
        'push',
    ),
    Row('card_the_hub_refuses', "the Hub's own check refuses the card", 'error; no repository is created', 'push'),
    Row('another_architecture', 'the repository holds another architecture', 'refused; force=True replaces it', 'push'),
    Row(
        'unreadable_config_there',
        'the repository holds a config.json that is no JSON',
        'refused; force=True replaces it',
        'push',
    ),
    Row('missing_branch', 'the branch does not exist', 'done: created from main', 'push'),
    Row('commit_as_revision', 'a commit is named as the branch', 'ValueError before the first request', 'push'),
    Row('pull_request', 'a pull request instead of a commit', 'done: main stays as it is', 'push'),
    Row(
        'answer_to_pull_request_lost',
        'the answer to the pull request is lost',
        'error: look first; no second one',
        'push',
    ),
    Row(
        'wrapped_models',
        'channels_last, torch.compile, DataParallel, bfloat16',
        'done: plain contiguous weights',
        'push',
    ),
    Row('old_pickle_there', 'the repository holds an old pytorch_model.bin', 'done: removed, and said', 'push'),
    Row('labels_of_another_model', 'the repository describes classes of other names', 'done: they go', 'push'),
    Row('links_in_the_folder', 'a link out of the folder, a pipe, a device, a folder', 'refused: nothing sent', 'push'),
    Row('redirects', 'the Hub redirects to another host, or says something else', 'error: check HF_ENDPOINT', 'push'),
    Row(
        'stalls_all_the_time', 'the Hub answers the first request and then no more', 'error after 100 s in all', 'push'
    ),
    Row('stalls_while_loading', 'the same', 'error after 100 s in all', 'load'),
    Row(
        'drips_while_pushing',
        'an answer comes byte by byte, for ever',
        'error after 100 s with less than 1000 bytes a second',
        'push',
    ),
    Row('drips_while_loading', 'the same', 'error after 100 s with less than 1000 bytes a second', 'load'),
    Row('token_in_an_error_of_a_load', 'the Hub echoes the token', 'error without the token, traceback too', 'load'),
    Row(
        'swapped_after_the_check',
        'other weights, NaN or a pickle take the place of a checked file',
        'done: what was checked is loaded',
        'load',
    ),
    Row('flat_config', 'an old config.json without pretrained_cfg', 'done: mean, std and size are kept', 'load'),
    Row('one_door', 'the same files as folder, local-dir: and hf-hub:', 'done or refused alike', 'load'),
    Row('moved_main', 'main moves on between two loads', 'done: the pinned commit stays', 'load'),
    Row('main_moves_during_a_load', 'main moves on between config and weights', 'done: both from one commit', 'load'),
    Row('poisoned_blob', 'a blob in the cache was altered', 'done: deleted and fetched again', 'load'),
    Row('poisoned_blob_offline', 'the same, offline', 'refused; deleted', 'load'),
    Row('offline_with_cache', 'HF_HUB_OFFLINE=1 and a warm cache', 'done: a warning names the commit', 'load'),
    Row('offline_without_cache', 'HF_HUB_OFFLINE=1 and a cold cache', 'error', 'load'),
    Row('server_gone_with_cache', 'the Hub is down, warm cache', 'done: a warning names the commit', 'load'),
    Row('denied_with_cache', 'the Hub says 401 or 403, warm cache', 'error, not the cached copy', 'load'),
    Row(
        'downgrade_to_a_pickle',
        'safetensors answers 503 and a pickle lies beside it',
        'error; the pickle is not asked for',
        'load',
    ),
    Row('four_loaders', 'four processes load at once into one cache', 'done: all the same', 'load'),
    Row('private_repository', 'a private repository without a token', 'error: log in', 'load'),
    Row('gated_repository', 'a gated repository', 'error: accept the conditions', 'load'),
    Row('missing_revision', 'a revision that does not exist', 'error', 'load'),
    Row(
        'names_that_are_no_repository', "'..', a path, a url as the name", 'ValueError before the first request', 'load'
    ),
    Row('xet_round_trip', 'push and load over Xet', 'done: equal bits, plain HTTP reads it too', 'Xet'),
    Row('xet_push_twice', 'the same push again over Xet', 'done: no commit, no upload', 'Xet'),
    Row('xet_unavailable_once', '503 from the content store once', 'done: retried', 'Xet'),
    Row('xet_denied', '403 from the content store', 'error; nothing committed', 'Xet'),
    Row('xet_flipped_bit', 'a bit flips in a stored chunk', 'refused: the sha256 differs', 'Xet'),
]
