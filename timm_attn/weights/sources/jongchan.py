"""CBAM and BAM of their authors; PytorchInsight's nets of the two have the same keys.

Code: https://github.com/Jongchan/attention-module @459efad (MIT)
"""

from .base import HostedFile, Source, check_product

SOURCE = Source(
    name='jongchan',
    marks={'cbam': r'\.cbam\.ChannelGate\.', 'bam': r'^bam[123]\.'},
    home='https://github.com/Jongchan/attention-module',
    licence='mit',
    rules=(
        (r'\.cbam\.ChannelGate\.mlp\.1\.', '.se.fc1.'),
        (r'\.cbam\.ChannelGate\.mlp\.3\.', '.se.fc2.'),
        (r'\.cbam\.SpatialGate\.spatial\.', '.se.'),
        (r'^bam(\d)\.', r'layer\1.END.'),
        (r'\.channel_att\.gate_c\.gate_c_fc_0\.', '.fc1.'),
        (r'\.channel_att\.gate_c\.gate_c_bn_1\.', '.bn1.'),
        (r'\.channel_att\.gate_c\.gate_c_fc_final\.', '.fc2.'),
        (r'\.spatial_att\.gate_s\.gate_s_(conv|bn)_reduce0\.', r'.\1_reduce.'),
        (r'\.spatial_att\.gate_s\.gate_s_(conv|bn)_di_0\.', r'.\1_dil1.'),
        (r'\.spatial_att\.gate_s\.gate_s_(conv|bn)_di_1\.', r'.\1_dil2.'),
        (r'\.spatial_att\.gate_s\.gate_s_conv_final\.', '.conv_final.'),
    ),
    checks=(check_product,),
    alias={'cbam': ('insight',), 'bam': ('insight',)},
    files=(
        HostedFile('cbam_resnet50', 'cbam_resnet50', '1mvAVvhLR_2XY_bPYxh-SEz4vDmGzSArO', 77.622),
        HostedFile('bam_resnet50', 'bam_resnet50', '1auVf70gfL0ol40bvaX5rlbpn9cKIxhAL', 76.860),
    ),
)
