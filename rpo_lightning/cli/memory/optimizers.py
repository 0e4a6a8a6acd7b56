"""What optimizers keep for every parameter.

Torch's own keep tensors of the parameter's dtype (``torch/optim``: ``zeros_like(p)``). The 8-bit ones of bitsandbytes
keep a byte and, for every 256 of them, an fp32 scale (``bitsandbytes/optim/optimizer.py``; parameters below 4,096
numbers keep fp32, which is left out here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BLOCK = 256


@dataclass(frozen=True)
class OptimizerState:
    """States of an optimizer.

    Attributes:
        name: Its class.
        tensors: Tensors like the parameter.
        eight_bit: Whether their numbers are bytes with a scale for each block.
        temporaries: Further tensors like the parameters while a step is made on a GPU.
        is_known: Whether this is what the class keeps, rather than AdamW's in its place.
    """

    name: str
    tensors: int
    eight_bit: bool = False
    temporaries: int = 0
    is_known: bool = True

    def bytes_per_parameter(self, held: int) -> float:
        """Bytes a parameter.

        Args:
            held: Bytes of the parameter itself.
        """
        return self.tensors * (1 + 4 / _BLOCK if self.eight_bit else held)


# Torch's "foreach" step makes the square roots of all second moments at once (torch/optim/adamw.py).
ADAMW = OptimizerState("AdamW", 2, temporaries=1)

_TENSORS = {
    "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Lamb": 2, "DeepSpeedCPUAdam": 2, "FusedAdam": 2,
    "Adagrad": 1, "RMSprop": 1, "Lion": 1,
}  # fmt: skip
_FOREACH = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop")


def optimizer_state(class_path: str, arguments: Mapping[str, Any] | None = None) -> OptimizerState:
    """States of an optimizer by its class path and constructor arguments; those of AdamW for an unknown class."""
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
