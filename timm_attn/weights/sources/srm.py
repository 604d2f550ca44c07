"""SRM of its authors.

Code: https://github.com/hyunjaelee410/style-based-recalibration-module @f6221c7 (no licence)
"""

from .base import Source

SOURCE = Source(
    name='srm',
    marks={'srm': r'\.rclb\.cfc$'},
    home='https://github.com/hyunjaelee410/style-based-recalibration-module',
    rules=((r'^(layer\d\.\d+)\.rclb\.', r'\1.se.'),),
)
