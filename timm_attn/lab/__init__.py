"""Training and comparing models: `compare`, `quickstart`, and what they are made of, one module each."""

from . import stats as stats
from .data import Data as Data
from .data import load_data as load_data
