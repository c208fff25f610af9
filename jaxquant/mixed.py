"""Several schemes in one model, for a budget of bytes.

sensitivity   what each weight costs by candidate spec
allocate      the best choice of specs for a budget
refine        that choice, improved by trial
"""

from jaxquant.transform.allocation import allocate, refine
from jaxquant.transform.sensitivity import sensitivity

__all__ = ["allocate", "refine", "sensitivity"]
