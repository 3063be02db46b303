"""The public names, written here only: `__init__.py` reads them from this file, and type checkers do."""

from . import data as data
from . import evaluation as evaluation
from . import functional as functional
from . import layers as layers
from . import models as models
from . import routing as routing
from .checkpoints.pretrained import from_pretrained as from_pretrained
from .checkpoints.pretrained import load as load
from .checkpoints.pretrained import load_card as load_card
from .checkpoints.pretrained import save_pretrained as save_pretrained
from .config import Config as Config
from .config import preset as preset
from .errors import Diverged as Diverged
from .errors import InputError as InputError
from .errors import Interrupted as Interrupted
from .evaluation import Evaluation as Evaluation
from .evaluation import evaluate as evaluate
from .functional import lengths as lengths
from .functional import margin_loss as margin_loss
from .functional import mask as mask
from .functional import reconstruction_loss as reconstruction_loss
from .functional import squash as squash
from .functional import votes as votes
from .layers import ClassCapsules as ClassCapsules
from .layers import Decoder as Decoder
from .layers import PrimaryCapsules as PrimaryCapsules
from .models import CapsuleNetwork as CapsuleNetwork
from .models import Network as Network
from .models import Output as Output
from .models import available as available
from .models import create as create
from .models.capsnet import CapsNet as CapsNet
from .prediction import Prediction as Prediction
from .prediction import predict as predict
from .routing import RoutingResult as RoutingResult
from .routing import dynamic_routing as dynamic_routing
from .training.fit import Result as Result
from .training.fit import fit as fit
from .training.fit import resume as resume

__version__: str
__all__: list[str]
