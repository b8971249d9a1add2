"""Potentials `Phi` with their conjugates, links and output Hessians (docs/theory.md, section 0).

One file per family; a potential of your own derives from `Potential`.
"""

from conjopt.potentials.base import LossBounds, Potential
from conjopt.potentials.entmax import Entmax, Sparsemax
from conjopt.potentials.logistic import Logistic
from conjopt.potentials.poisson import Poisson
from conjopt.potentials.softmax import Softmax
from conjopt.potentials.squared import Squared

__all__ = [
    "Entmax",
    "Logistic",
    "LossBounds",
    "Poisson",
    "Potential",
    "Softmax",
    "Sparsemax",
    "Squared",
]
