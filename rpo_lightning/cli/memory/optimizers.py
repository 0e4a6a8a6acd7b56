"""Memory of optimizer states.

Torch's optimizers hold tensors of the parameter's dtype (``torch/optim``: ``zeros_like(p)``). The 8-bit optimizers of
bitsandbytes hold a byte for each number, and an fp32 scale for every 256 numbers (``bitsandbytes/optim/optimizer.py``).
They hold fp32 for parameters below 4,096 numbers, which is not counted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BLOCK = 256


@dataclass(frozen=True)
class OptimizerState:
    """The states of an optimizer.

    Attributes:
        name: Its class.
        tensors: Number of state tensors with the parameter's shape.
        eight_bit: Whether their numbers are bytes with a scale for each block.
        temporaries: Number of further tensors with the parameter's shape during a step on a GPU.
        is_known: Whether the class is known. If not, the states are AdamW's.
    """

    name: str
    tensors: int
    eight_bit: bool = False
    temporaries: int = 0
    is_known: bool = True

    def bytes_per_parameter(self, held: int) -> float:
        """Bytes of states for each number of a parameter.

        Args:
            held: Bytes of a number of the parameter itself.
        """
        return self.tensors * (1 + 4 / _BLOCK if self.eight_bit else held)


# The temporary is the square roots of the second moments: torch's "foreach" step computes all of them at once
# (torch/optim/adamw.py).
ADAMW = OptimizerState("AdamW", 2, temporaries=1)

_TENSORS = {
    "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Lamb": 2, "DeepSpeedCPUAdam": 2, "FusedAdam": 2,
    "Adagrad": 1, "RMSprop": 1, "Lion": 1,
}  # fmt: skip
_FOREACH = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop")


def optimizer_state(class_path: str, arguments: Mapping[str, Any] | None = None) -> OptimizerState:
    """The states of an optimizer, by its class path and constructor arguments. Unknown classes count as AdamW."""
    arguments = arguments or {}
    module, _, name = class_path.rpartition(".")
    base = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    is_torch = module.startswith("torch") or not module
    if base == "SGD":
        count = 1 if arguments.get("momentum") else 0
    elif base in _TENSORS:
        count = _TENSORS[base] + bool(arguments.get("amsgrad")) + bool(arguments.get("centered"))
        count += base == "RMSprop" and bool(arguments.get("momentum"))
    else:
        return OptimizerState(name, ADAMW.tensors, temporaries=ADAMW.temporaries, is_known=False)
    one_by_one = arguments.get("fused") or arguments.get("foreach") is False
    temporaries = int(is_torch and base in _FOREACH and not one_by_one)
    return OptimizerState(name, int(count), name.endswith("8bit"), temporaries)
