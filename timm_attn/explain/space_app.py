"""Upload an image; see the model's labels and where its attentions look. `space.json` names the model."""

import html
import importlib
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')

import gradio as gr
from PIL import Image

from timm_attn import attn_sites
from timm_attn.explain import draw_explanation, explain_image, figure_image, is_untrained, load_model

HERE = Path(__file__).parent
SPACE: dict[str, Any] = json.loads((HERE / 'space.json').read_text(encoding='utf-8'))
for module in SPACE['imports']:
    importlib.import_module(module)
MODEL = load_model(str(HERE / 'model') if SPACE['folder'] else SPACE['model'], pretrained=SPACE['pretrained'])


def look(image: Image.Image | None, whole: bool) -> tuple[dict[str, float], Image.Image]:
    """Labels with their probabilities, and the picture of the attentions."""
    if image is None:
        raise gr.Error('Upload an image first.')
    found = explain_image(MODEL, image, crop=not whole, cam=False)
    return dict(found.top), figure_image(draw_explanation(found))


with gr.Blocks(title=SPACE['title']) as demo:
    gr.Markdown(f'# {html.escape(SPACE["title"])}')
    with gr.Row():
        with gr.Column(scale=1):
            image = gr.Image(type='pil', label='Image', elem_id='img')
            whole = gr.Checkbox(label='Whole image instead of its centre', elem_id='whole')
            button = gr.Button('Look', variant='primary', elem_id='look')
            labels = gr.Label(num_top_classes=5, label='Labels', elem_id='labels')
            gr.Examples([str(p) for p in sorted((HERE / 'examples').iterdir())], inputs=[image])
        with gr.Column(scale=2):
            # Without its label, which would lie on the picture's title.
            picture = gr.Image(
                label='Attention', show_label=False, type='pil', format='png', interactive=False, elem_id='attention'
            )
            parameters = sum(p.numel() for p in MODEL.parameters())
            gr.Markdown(
                f'{parameters / 1e6:.2f} M parameters, {len(attn_sites(MODEL))} attentions. '
                f'{"The weights are random: this model is untrained. " if is_untrained(MODEL) else ""}'
                'Bright is a large gate. Gates show what the network passes on, not why it decided.'
            )
    button.click(look, [image, whole], [labels, picture], api_name='look')
demo.queue(max_size=16)

if __name__ == '__main__':
    demo.launch()
