"""Models as folders, and to and from the Hugging Face Hub."""

from .client import SETTINGS as SETTINGS
from .client import HubError as HubError
from .client import HubFileError as HubFileError
from .client import Settings as Settings
from .folder import card_of_folder as card_of_folder
from .folder import read_folder as read_folder
from .folder import save as save
from .load import load_from_hub as load_from_hub
from .load import open_model as open_model
from .load import pull as pull
from .push import PushResult as PushResult
from .push import push_to_hub as push_to_hub
from .records import STATUSES as STATUSES
from .records import Evaluation as Evaluation
from .records import Provenance as Provenance
from .records import Training as Training
