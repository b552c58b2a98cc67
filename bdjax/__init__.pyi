"""The public face: what a user needs. `bdjax/__init__.py` imports each name when it is first asked
for, from where this file says.
"""

from bdjax import datasets as datasets
from bdjax import metrics as metrics
from bdjax import types as types
from bdjax.attacks.base import Attack as Attack
from bdjax.audits import audit as audit
from bdjax.changes import changed as changed
from bdjax.changes import varied as varied
from bdjax.checkpoints import load_model as load_model
from bdjax.checkpoints import save_model as save_model
from bdjax.datasets.base import Source as Source
from bdjax.defenses.base import InputFilter as InputFilter
from bdjax.defenses.base import Inversion as Inversion
from bdjax.defenses.base import Judge as Judge
from bdjax.defenses.base import Repair as Repair
from bdjax.defenses.base import SampleFilter as SampleFilter
from bdjax.defenses.base import Training as Training
from bdjax.defenses.base import judge as judge
from bdjax.experiment import run as run
from bdjax.exports import export_net as export_net
from bdjax.foreign.flax import net as net
from bdjax.imports import load_net as load_net
from bdjax.imports import save_net as save_net
from bdjax.models.layers import Net as Net
from bdjax.models.layers import build as build
from bdjax.plugins import load_plugins as load_plugins
from bdjax.poison import write_poisoned as write_poisoned
from bdjax.registry import attack as attack
from bdjax.registry import dataset as dataset
from bdjax.registry import defense as defense
from bdjax.registry import entries as entries
from bdjax.registry import leaf as leaf
from bdjax.registry import make as make
from bdjax.registry import model as model
from bdjax.registry import pytree as pytree
from bdjax.registry import static as static
from bdjax.rows import Rows as Rows
from bdjax.studies import crossed as crossed
from bdjax.study import Cell as Cell
from bdjax.study import chain as chain
from bdjax.study import grid as grid
from bdjax.study import sample as sample
from bdjax.study import zipped as zipped
from bdjax.train import Recipe as Recipe
from bdjax.train import evaluate as evaluate
from bdjax.train import fit as fit
from bdjax.train import poisoned_set as poisoned_set
from bdjax.train import predict as predict
from bdjax.train import stamped as stamped
from bdjax.types import BadInput as BadInput
from bdjax.types import Dataset as Dataset
from bdjax.types import Judgement as Judgement
from bdjax.types import Metric as Metric
from bdjax.types import Model as Model
from bdjax.types import Plan as Plan
from bdjax.types import Repaired as Repaired
from bdjax.types import Scores as Scores
from bdjax.types import Split as Split
from bdjax.types import Splits as Splits
from bdjax.types import Suspects as Suspects
from bdjax.types import Verdict as Verdict
from bdjax.types import Victim as Victim

__version__: str
__all__: list[str]
