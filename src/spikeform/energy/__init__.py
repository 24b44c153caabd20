"""Energy: spikes counted from the trains, priced under named cost models, two baselines by the same rules.

The package itself can be called: ``spikeform.energy(model, ids)`` is :func:`spikeform.energy.report.energy`.
"""

import sys
from types import ModuleType

from spikeform.energy.count import Counter
from spikeform.energy.models import COST_MODELS, CostModel
from spikeform.energy.report import EnergyReport, energy

__all__ = ["COST_MODELS", "CostModel", "Counter", "EnergyReport", "energy"]


class _CallablePackage(ModuleType):
    # Python binds the name ``spikeform.energy`` to this package as soon as anyone imports from it, so the
    # package has to answer the call that the function of the same name promises.
    __call__ = staticmethod(energy)


sys.modules[__name__].__class__ = _CallablePackage
