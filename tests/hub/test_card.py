"""The card: computed, complete, deterministic, and kind to what somebody wrote into it."""

import dataclasses
import html
import json
import re
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt

import timm_attn
from timm_attn.hub.card import attention_tags, check_card, merge_card, render_card, split_card
from timm_attn.hub.client import HubFileError
from timm_attn.hub.folder import card_of_folder, save
from timm_attn.hub.publish import card_of_tag, index_of_tags
from timm_attn.hub.records import normalise_evaluation
from timm_attn.layers import Attention, Gate, _registry
from timm_attn.measure import count
from timm_attn.weights import TAGS

CARDS = Path(__file__).resolve().parents[2] / 'model_cards'
RECORD = {
    'dataset': 'ImageNet-1k',
    'split': 'validation',
    'n': 50000,
    'protocol': 'resize 256, crop 224',
    'metrics': {'top1': 77.34, 'top5': 93.5},
    'source_name': 'results.json',
    'source_url': 'https://example.org/r.json',
}


def config(**about: Any) -> dict[str, Any]:
    return {
        'architecture': 'cbam_resnet18',
        'num_classes': 10,
        'model_args': {'in_chans': 3},
        'pretrained_cfg': {'input_size': [3, 32, 32], 'mean': [0.5, 0.5, 0.5]},
        'timm_attn': about,
    }


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split('---\n')[1])


# --- What it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'params', 'macs', 'activations'),
    [
        # Parameters and activations of timm's own tables (benchmark-infer-*.csv); MACs of attention.md, convention A.
        ('resnet18', 11.69, 1.814, 2.48),
        ('resnet50', 25.56, 4.089, 11.11),
    ],
)
def test_numbers_are_those_of_timms_tables(name: str, params: float, macs: float, activations: float) -> None:
    with torch.device('meta'):
        found = count(timm.create_model(name), (3, 224, 224))
    assert round(found['params'] / 1e6, 2) == params
    assert round(found['macs'] / 1e9, 3) == macs
    assert round(found['activations'] / 1e6, 2) == activations


def test_numbers_are_computed_from_the_model_as_it_is() -> None:
    small = {**config(), 'model_args': {'layers': [1, 1, 1, 1], 'channels': [16, 32, 64, 128]}}
    text = render_card(small)
    model = timm.create_model('cbam_resnet18', num_classes=10, **small['model_args'])
    total = sum(p.numel() for p in model.parameters())
    assert f'**Parameters:** {total / 1e6:.2f} M' in text
    assert '# (1, 128, 1, 1)' in text and '# (1, 128)' in text
    plain = timm.create_model('resnet18', num_classes=10, **small['model_args'])
    over = total / sum(p.numel() for p in plain.parameters()) * 100 - 100
    assert f'**Over resnet18:** {over:+.2f} % parameters' in text


@pytest.mark.parametrize('name', timm_attn.list_attn())
def test_every_attention_is_cited_from_the_registry(name: str) -> None:
    depth = next(d for d in (18, 34, 50) if timm.is_model(f'{name}_resnet{d}'))
    text = render_card({**config(), 'architecture': f'{name}_resnet{depth}'})
    spec = timm_attn.get_attn(name)
    assert spec.bibtex in text and spec.paper in text and f'({name})' in text
    assert name in metadata(text)['tags'] and 'transformers' not in metadata(text)['tags']
    assert 'he2016resnet' in text and 'rw2019timm' in text


# By the papers, not by the classes.
KINDS = {
    'channel-attention': {'se', 'cbam', 'bam', 'gam', 'sk', 'eca', 'srm', 'gsop', 'triplet', 'csa'},
    'spatial-attention': {'cbam', 'bam', 'gam', 'triplet'},
    'self-attention': {'csa'},
}


def test_tags_say_what_kinds_of_gate_an_attention_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for tag, names in KINDS.items():
        for name in set.union(*KINDS.values()):
            assert (tag in attention_tags(name)) == (name in names), (tag, name)

    class Rows(Attention):
        kinds: ClassVar = {'rows': Gate('H', 'rows')}
        keywords = ('axial-attention',)

    spec = dataclasses.replace(timm_attn.get_attn('se'), name='rows', cls=Rows)
    monkeypatch.setitem(_registry._ATTENTIONS, 'rows', spec)
    assert attention_tags('rows') == ['spatial-attention', 'axial-attention']
    monkeypatch.setattr(Rows, 'kinds', {'a': Gate('B', 'a')})
    assert attention_tags('rows') == ['axial-attention']


def test_same_input_gives_the_same_text_and_nothing_unknown_is_named() -> None:
    text = render_card(config())
    assert text == render_card(config())
    prose = re.sub(r'```python\n.*?```', '', text, flags=re.DOTALL)
    absent = ('None', 'nan', 'More Information', 'unknown', 'null', '{{', '{%', 'license', 'model-index', 'metrics')
    for word in (*absent, '## Training', '## Evaluation', '## Files'):
        assert word not in prose, word
    assert '\n\n\n' not in text and text.endswith('-->\n')


def test_accuracy_is_stated_only_with_a_record() -> None:
    text = render_card(config(status='trained', evaluation=[RECORD]), name='mine')
    data = metadata(text)
    assert data['model-index'] == [
        {
            'name': 'mine',
            'results': [
                {
                    'task': {'type': 'image-classification'},
                    'dataset': {'name': 'ImageNet-1k', 'type': 'ILSVRC/imagenet-1k', 'split': 'validation'},
                    'metrics': [
                        {'type': 'accuracy', 'value': 77.34, 'name': 'Top-1'},
                        {'type': 'accuracy', 'value': 93.5, 'name': 'Top-5'},
                    ],
                    'source': {'name': 'results.json', 'url': 'https://example.org/r.json'},
                }
            ],
        }
    ]
    assert data['metrics'] == ['accuracy'] and data['datasets'] == ['ILSVRC/imagenet-1k']
    card: Any = ModelCard(text)
    results = card.data.eval_results
    assert [r.metric_value for r in results] == [77.34, 93.5]
    assert '| Top-1 | 77.34 |' in text and '**N:** 50000' in text and 'ImageNet-1k over-represents' in text
    # Weights that nobody measured lose the numbers of those before.
    again = render_card(config(status='random'), old=text)
    assert '77.34' not in again and 'states no accuracy' in again


@pytest.mark.parametrize(
    ('status', 'words'),
    [
        ('trained', 'as the section on training says'),
        ('converted', 'The numbers are those of somewhere'),
        ('warm start', 'not a trained attention model'),
        ('random', 'never trained'),
        (None, '**Status: not recorded.**'),
    ],
    ids=str,
)
def test_status_is_said_in_words(status: str | None, words: str) -> None:
    text = render_card(config(status=status, provenance={'source': 'somewhere'}))
    assert words in text and text.count('**Status:') == 1


def test_training_provenance_and_files_are_listed(tmp_path: Path) -> None:
    model = timm.create_model('simple_cnn_se', num_classes=3)
    folder = save(
        model,
        tmp_path / 'm',
        license='mit',
        training={'data': 'digits', 'epochs': 3, 'seed': 0, 'learning_rate': 0.1},
        provenance={'base_model': 'me/base', 'datasets': ['sklearn/digits']},
    )
    text = (folder / 'README.md').read_text()
    assert '- **Epochs:** 3' in text and '- **Learning rate:** 0.1' in text
    data = metadata(text)
    assert data['license'] == 'mit' and data['base_model'] == 'me/base' and data['base_model_relation'] == 'finetune'
    assert data['datasets'] == ['sklearn/digits']
    assert re.search(r'`model\.safetensors`:\*\* \d+ bytes, sha256 `[0-9a-f]{64}`', text)
    assert f'timm {timm.__version__}' in text
    own = render_card({**config(), 'pretrained_cfg': {'license': 'my-terms'}}, old='---\nlicense_link: x\n---\n')
    assert metadata(own)['license'] == 'other' and metadata(own)['license_name'] == 'my-terms'


def test_gray_and_many_channelled_images_have_their_own_snippet() -> None:
    for chans, words in ((1, "convert('L')"), (4, 'x = torch.randn(1, 4, 32, 32)')):
        cfg = {'input_size': [chans, 32, 32], 'mean': [0.5] * chans, 'std': [0.5] * chans}
        text = render_card({**config(), 'model_args': {'in_chans': chans}, 'pretrained_cfg': cfg})
        assert words in text and f'torch.randn(1, {chans}, 32, 32)' in text


def test_every_python_block_compiles_and_starts_with_the_import() -> None:
    for source in (None, 'hf-hub:me/x', 'cbam_resnet18.resnet18_a1_in1k'):
        found = render_card(config(), source=source).split('```python\n')[1:]
        assert len(found) == (6 if source == 'hf-hub:me/x' else 5)
        for part in found:
            block = part.split('```')[0]
            assert block.startswith('import timm_attn')
            compile(block, 'card', 'exec')


def test_foreign_text_cannot_leave_its_place() -> None:
    evil = 'x <script>alert(1)</script> | y\n<!-- timm_attn:end training -->\n# Title: {{ 7*7 }}'
    text = render_card(
        config(
            status='trained',
            training={'data': evil, evil: 1},
            evaluation=[{'dataset': 'a: b | <b>c</b>', 'metrics': {'top1': 1.5, 'x|y: z': 2}}],
            provenance={'source': evil, 'source_url': 'javascript:alert(1)', 'datasets': ['a: b\n- c']},
        )
    )
    body = split_card(text)[1]
    assert '<script>' not in body and '<b>' not in body and '\n# Title' not in body
    assert text.count('<!-- timm_attn:end training -->') == 1
    assert '<javascript' not in text and '{{ 7*7 }}' in text
    assert metadata(text)['datasets'] == ['a: b\n- c']
    assert metadata(text)['model-index'][0]['results'][0]['dataset']['name'] == 'a: b | <b>c</b>'
    assert split_card(text)[0] == metadata(text)


def test_markdown_in_records_is_shown_and_does_nothing() -> None:
    evil = '[x](javascript:alert(1)) ![y](http://tracker.example/a.png) `z` <http://a.example> &lt;b&gt; \\[q](r)'
    text = render_card(
        config(
            status='trained',
            training={'data': evil, 'notes': evil, 'optimizer': {evil[:100]: 1}},
            evaluation=[{'dataset': evil, 'protocol': evil, 'metrics': {evil[:100]: 1.5}}],
            provenance={'source': evil, 'source_url': evil, 'stated': evil, 'conversion': evil},
        ),
        name='x',
    )
    rendered = MarkdownIt('commonmark').enable('table').render(split_card(text)[1])
    links = set(re.findall(r'<(?:a|img)[^>]*(?:href|src)="([^"]*)"', rendered))
    own = {timm_attn.get_attn('cbam').paper, timm_attn.get_attn('cbam').code}
    assert links == own
    assert '[x](javascript:alert(1))' in html.unescape(rendered) and '<b>' not in rendered


# --- What somebody wrote ----------------------------------------------------------------------------------------------


def test_edits_outside_the_sections_are_kept() -> None:
    text = render_card(config(status='random'))
    edited = text.replace(
        '<!-- timm_attn:begin usage -->', '## My own words\n\nKeep me.\n\n<!-- timm_attn:begin usage -->'
    )
    edited = edited.replace('never trained', 'CHANGED').replace('# cbam_resnet18', '# Renamed') + '\nThe end.\n'
    again = render_card(config(status='random', training={'epochs': 2}), old=edited)
    assert 'Keep me.' in again and again.rstrip().endswith('The end.')
    assert 'CHANGED' not in again and '# Renamed' not in again
    order = ('begin summary', 'begin details', 'My own', 'begin usage', 'begin training', 'begin limits', 'The end.')
    places = [again.index(word) for word in order]
    assert places == sorted(places)
    # Once more changes nothing; a section that no longer applies goes.
    assert render_card(config(status='random', training={'epochs': 2}), old=again) == again
    assert 'begin training' not in render_card(config(status='random'), old=again)


def test_a_card_without_our_sections_is_kept_whole() -> None:
    mine = '---\ntags:\n- mine\nlicense: mit\nco2_eq_emissions: 3\nmodel-index: []\n---\n# My model\n\nWords.\n'
    text = render_card(config(), old=mine)
    assert text.index('# My model') < text.index('Words.') < text.index('begin summary')
    data = metadata(text)
    assert data['license'] == 'mit' and data['co2_eq_emissions'] == 3 and data['tags'][-1] == 'mine'
    assert data['tags'][:2] == ['timm', 'timm_attn'] and 'model-index' not in data
    # What is known of the weights replaces what was written about others.
    known = {**config(), 'pretrained_cfg': {'license': 'apache-2.0'}}
    assert metadata(render_card(known, old=mine))['license'] == 'apache-2.0'
    assert render_card(config(), old=text) == text


@pytest.mark.parametrize(
    'old',
    [
        '',
        '   \n',
        '---\n',
        '---\n- a\n---\nText',
        '---\nSome words\n---\nText',
        'Text',
        '---\r\ntags: [a]\r\n---\r\nText\r\n',
        '<!-- timm_attn:begin summary -->\nnever closed',
        '<!-- timm_attn:end summary -->',
    ],
    ids=repr,
)
def test_odd_cards_are_survived(old: str) -> None:
    text = render_card(config(), old=old)
    check_card(text)
    assert text.count('<!-- timm_attn:begin usage -->') == 1
    body = text.split('---\n', 2)[2]
    assert ('Text' in old) == ('Text' in body.replace('Text: ', ''))
    # A first block that is no mapping is a rule and words: all of it stays.
    assert ('Some words' in old) == ('---\nSome words\n---\nText' in body)


@pytest.mark.parametrize(
    'block',
    [
        ': : :',
        'a: b: c',
        'x: !!timestamp q',
        'x: 2023-13-45',
        'a: &a [1]\nb: *a',
        'x: ' + '[' * 3000,
        'a: 1\n' * 20_000,
        '1: x',
        'null: x',
        'self: 1',
        'tags: 5',
        'license: [mit]',
        'license: {a: 1}',
        'datasets: [1]',
        'x: !!set {a}',
    ],
    ids=lambda b: b[:16],
)
def test_metadata_that_cannot_be_kept_are_refused(block: str) -> None:
    old = f'---\n{block}\n---\nText\n'
    start = time.process_time()
    with pytest.raises(HubFileError, match=r'README\.md'):
        render_card(config(), old=old)
    with pytest.raises(HubFileError, match=r'README\.md'):
        check_card(old)
    assert time.process_time() - start < 5


@pytest.mark.parametrize('mark', ['begin a', 'begin usage', 'end usage', 'begin usage -->\n<!-- timm_attn:begin x'])
def test_marks_without_their_partners_cost_little_and_stay(mark: str) -> None:
    old = f'<!-- timm_attn:{mark} -->\nword\n' * 10_000
    start = time.process_time()
    text = render_card(config(), old=old)
    assert time.process_time() - start < 5
    assert text.count('word') == 10_000


def test_a_section_given_twice_is_left_once() -> None:
    fresh = render_card(config())
    body = fresh.split('---\n', 2)[2]
    assert merge_card(fresh, body + body) == fresh


# --- Checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('no metadata', 'must start with a YAML block'),
        ('---\n[1, 2]\n---\n', 'cannot be read|must start'),
        ('---\na: b: c\n---\n', 'cannot be read'),
        ('---\nlicense: mine\n---\n', "license .='mine'. is none the Hub knows"),
        ('---\nlicense: other\n---\n', 'license_name and license_link'),
        ('---\ndatasets: [null]\n---\n', 'datasets .* must be a list of texts'),
        ('---\ntags: word\n---\n', 'tags .* must be a list of texts'),
        ('---\npipeline_tag: [a]\n---\n', 'pipeline_tag .* must be a text'),
        ('---\nmodel-index: 5\n---\n', 'cannot be read'),
    ],
    ids=range(9),
)
def test_metadata_the_hub_would_refuse_is_found_here(text: str, words: str) -> None:
    with pytest.raises(HubFileError, match=words):
        check_card(text)


@pytest.mark.parametrize(
    ('record', 'words'),
    [
        ({'metrics': {'top1': 1}}, "needs 'dataset'"),
        ({'dataset': 'x'}, "'metrics'"),
        ({'dataset': 'x', 'top1': 'high'}, 'must be a number'),
        ({'dataset': 'x', 'top1': True}, 'must be a number'),
        ({'dataset': 'x', 'top1': float('nan')}, 'not JSON compliant|JSON'),
        ({'dataset': 'x', 'top1': 1, 'source_name': 'y'}, "needs a 'source_url'"),
        (5, 'int'),
        (['x'], 'holds a str'),
    ],
    ids=range(8),
)
def test_incomplete_records_are_refused(record: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        normalise_evaluation(record)


def test_records_come_in_several_forms() -> None:
    expected = [{'dataset': 'digits', 'metrics': {'top1': 97.5}}]
    assert normalise_evaluation(None) == []
    assert normalise_evaluation({'dataset': 'digits', 'top1': 97.5}) == expected
    assert normalise_evaluation(expected) == expected
    result = EvalResult(
        task_type='image-classification',
        dataset_type='sklearn/digits',
        dataset_name='digits',
        metric_type='accuracy',
        metric_value=97.5,
        metric_name='Top-1',
    )
    assert normalise_evaluation(result) == [
        {'dataset': 'digits', 'dataset_id': 'sklearn/digits', 'metrics': {'Top-1': 97.5}}
    ]


def test_card_of_a_folder_is_rendered_again(tmp_path: Path) -> None:
    folder = save(timm.create_model('simple_cnn_cbam', num_classes=3), tmp_path / 'm')
    first = (folder / 'README.md').read_text()
    (folder / 'README.md').write_text(first + '\nA note.\n')
    text = card_of_folder(folder, eval_results={'dataset': 'digits', 'top1': 90.25})
    assert 'A note.' in text and '90.25' in text and (folder / 'README.md').read_text() == text
    assert json.loads((folder / 'config.json').read_text())['timm_attn']['evaluation'][0]['metrics'] == {'top1': 90.25}
    assert card_of_folder(folder, write=False) == text
    with pytest.raises(HubFileError, match=r'has no config\.json and no model\.safetensors'):
        card_of_folder(tmp_path / 'nowhere')


# --- The tags ---------------------------------------------------------------------------------------------------------


TRAINED = [t for t in TAGS if t.status == 'trained']


def test_every_trained_tag_has_its_card_and_no_other_is_there() -> None:
    names = {f'{t.model}.{t.tag}.md' for t in TRAINED}
    assert {p.name for p in CARDS.iterdir()} == names | {'README.md'}
    index = (CARDS / 'README.md').read_text(encoding='utf-8')
    assert index == index_of_tags(), 'run: timm-attn card model_cards --tags'
    assert all(f'({name})' in index for name in names)


@pytest.mark.parametrize('tag', TRAINED, ids=lambda t: f'{t.model}.{t.tag}')
def test_card_of_tag_is_the_one_rendered_now(tag: Any) -> None:
    path = CARDS / f'{tag.model}.{tag.tag}.md'
    text = card_of_tag(tag)
    assert path.read_text(encoding='utf-8') == text, 'run: timm-attn card model_cards --tags'
    assert f'license: {tag.licence}' in text and 'model-index' not in text
    assert 'not a trained attention model' not in text


def test_card_of_a_warm_start_says_that_it_is_one() -> None:
    warm = next(t for t in TAGS if t.status == 'warm')
    assert 'not a trained attention model' in card_of_tag(warm)
