"""All pruning criteria by the name that `prune.criterion` gives.

The table itself is in no key: `pruning/stage.py` imports it by name and puts the module of the criterion that was
chosen into its key. So a new criterion makes no earlier result again.
"""

from __future__ import annotations

from edgemin.errors import UserError
from edgemin.pruning.criteria.activations import Activation
from edgemin.pruning.criteria.base import Criterion
from edgemin.pruning.criteria.fisher import Fisher
from edgemin.pruning.criteria.gradients import GradientNorm, Taylor
from edgemin.pruning.criteria.kwon import Kwon
from edgemin.pruning.criteria.random import Random
from edgemin.pruning.criteria.weights import Magnitude, WeightProduct
from edgemin.pruning.criteria.ziplm import ZipLM
from edgemin.pruning.structures import StructureName

CRITERIA: dict[str, type[Criterion]] = {
    "gradient_norm": GradientNorm,
    "taylor": Taylor,
    "magnitude": Magnitude,
    "weight_product": WeightProduct,
    "activation": Activation,
    "fisher": Fisher,
    "kwon": Kwon,
    "ziplm": ZipLM,
    "random": Random,
}


def find(name: str, *structures: StructureName) -> Criterion:
    """The criterion of this name for structures that are scored together.

    Raises:
        UserError: there is none; the line lists those that the structures have.
    """
    known = [known for known, criterion in CRITERIA.items() if {*structures} <= {*criterion.structures}]
    if name not in known:
        these = " and ".join(structures)
        raise UserError(f"criterion: expected one of {', '.join(known)} for {these}, given {name!r}")
    return CRITERIA[name]()
