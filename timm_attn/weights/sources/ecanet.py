"""ECA-Net of its authors.

Code: https://github.com/BangguWu/ECANet @b332f6b (MIT)
"""

from .base import HostedFile, Source, padded

SOURCE = Source(
    name='ecanet',
    marks={'eca': r'\.eca\.conv\.weight$'},
    home='https://github.com/BangguWu/ECANet',
    licence='mit',
    rules=((r'^(layer\d\.\d+)\.eca\.', r'\1.se.'),),
    values=((r'\.eca\.conv\.weight$', padded),),
    files=(
        HostedFile('eca_resnet18', 'eca_resnet18', '1LMRFRTyzVifGBi2MUpTuYEWW44S8mwyl', 70.92),
        HostedFile('eca_resnet34', 'eca_resnet34', '15LV5Jkea3GPzvLP5__H7Gg88oNQUxBDE', 74.21),
        HostedFile('eca_resnet50', 'eca_resnet50', '1670rce333c_lyMWFzBlNZoVUvtxbCF_U', 77.42),
        HostedFile('eca_resnet101', 'eca_resnet101', '1b5FQ8yDFnZ_UhvWT9txmjI_LjbKkgnvC', 78.65),
        HostedFile('eca_resnet152', 'eca_resnet152', '1_bYnaOg9ptsILC_iC7uQ5Izv-u2rjYG5', 78.92),
    ),
)
