"""The least time that an operator or a whole model can take: bytes, FLOP, and what a GPU does.

`operators` counts one call, `models` every call of a forward, a backward and a training step,
`gpus` has the rates. Nothing here runs a kernel, so it works on any machine.
"""

from neobert.floors.gpus import GPUS, Gpu
from neobert.floors.models import ARCHITECTURES, Architecture, Part, forward, training_step
from neobert.floors.operators import Cost

__all__ = [
    "ARCHITECTURES",
    "GPUS",
    "Architecture",
    "Cost",
    "Gpu",
    "Part",
    "forward",
    "training_step",
]
