"""Upload an image; see labels, and where attentions look. `space.json` names one model, or two side by side."""

import html
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')

import gradio as gr
from PIL import Image

from timm_attn import attn_sites
from timm_attn.explain import draw_explanation, explain_image, figure_image, is_untrained, load_model, percent

HERE = Path(__file__).parent
SPACE: dict[str, Any] = json.loads((HERE / 'space.json').read_text(encoding='utf-8'))
for module in SPACE['imports']:
    importlib.import_module(module)
MODELS = [
    load_model(str(HERE / m['folder']) if m['folder'] else m['model'], pretrained=m['pretrained'])
    for m in SPACE['models']
]


def bars(top: Sequence[tuple[str, float]]) -> str:
    """Labels with their probabilities to a decimal: Gradio's own label rounds them to whole percents, mostly 0."""
    line = (
        '<div style="display: flex; justify-content: space-between; gap: 1em"><span>{}</span><strong>{}</strong></div>'
    )
    meter = '<meter style="width: 100%" value="{:.4f}"></meter>'
    return ''.join(
        (line + meter).format(html.escape(n), html.escape(percent(p)).replace(' ', '&nbsp;'), p) for n, p in top
    )


def look(image: Image.Image | None, whole: bool) -> list[Any]:
    """Of each model: labels with their probabilities, the same to read, the picture of the attentions on one scale."""
    if image is None:
        raise gr.Error('Upload an image first.')
    names = [m['model'] for m in SPACE['models']]
    found = [explain_image(m, image, title=n, crop=not whole) for m, n in zip(MODELS, names, strict=True)]
    return [s for e in found for s in (dict(e.top), bars(e.top), figure_image(draw_explanation(e, beside=found)))]


def about(number: int) -> str:
    """What a model is, and whether its weights are random."""
    model, parameters = MODELS[number], sum(p.numel() for p in MODELS[number].parameters())
    name = html.escape(SPACE['models'][number]['model'])
    text = f'### {name}\n{parameters / 1e6:.2f} M parameters, {len(attn_sites(model))} attentions.'
    return f'{text} **Untrained: its weights are random, and so is what is shown.**' if is_untrained(model) else text


with gr.Blocks(title=SPACE['title']) as demo:
    gr.Markdown(f'# {html.escape(SPACE["title"])}')
    outputs = []
    with gr.Row():
        with gr.Column():
            image = gr.Image(type='pil', label='Image', sources=['upload', 'webcam', 'clipboard'], elem_id='img')
            whole = gr.Checkbox(label='Whole image instead of its centre', elem_id='whole')
            button = gr.Button('Look', variant='primary', elem_id='look')
            gr.Examples([str(p) for p in sorted((HERE / 'examples').iterdir())], inputs=[image])
        for i, end in zip(range(len(MODELS)), ('', '-beside'), strict=False):
            with gr.Column():
                gr.Markdown(about(i), elem_id=f'about{end}')
                outputs.append(gr.Label(num_top_classes=5, visible=False))  # for programs
                outputs.append(gr.HTML(elem_id=f'labels{end}', container=True, padding=True))
    with gr.Row():
        for i, end in zip(range(len(MODELS)), ('', '-beside'), strict=False):
            # Without its label, which would lie on the picture's title.
            picture = gr.Image(
                label='Attention',
                show_label=False,
                type='pil',
                format='png',
                interactive=False,
                min_width=480,
                elem_id=f'attention{end}',
            )
            outputs.insert(3 * i + 2, picture)
    gr.Markdown(
        'Bright is a large gate; all models share a scale. Gates show what the network passes on, not why it decided.'
    )
    button.click(look, [image, whole], outputs, api_name='look')
demo.queue(max_size=16)

if __name__ == '__main__':
    demo.launch()
