"""Loading policies: Hugging Face folders, hub names, and the embedded reasoner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rpo_lightning.core.errors import ConfigurationError

EMBEDDED_PREFIX = "embedded:"
_EMBEDDED_FOLDERS = {"arithmetic-reasoner": Path(__file__).parent / "arithmetic_reasoner"}


def resolve_policy(name: str) -> str:
    """What ``from_pretrained`` takes for a policy: the folder of an embedded model, or the name itself.

    Args:
        name: A folder, a hub name, or an embedded model (``embedded:arithmetic-reasoner``).

    Raises:
        ConfigurationError: The embedded model or the folder does not exist.
    """
    if name.startswith(EMBEDDED_PREFIX):
        folder = _EMBEDDED_FOLDERS.get(name.removeprefix(EMBEDDED_PREFIX))
        if folder is None:
            known = ", ".join(EMBEDDED_PREFIX + n for n in _EMBEDDED_FOLDERS)
            raise ConfigurationError(f"model.policy={name}: no such embedded model: use {known}")
        return str(folder)
    # A hub name is "name" or "owner/name"; everything else can only be a folder.
    is_folder_name = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_folder_name and not Path(name).expanduser().is_dir():
        raise ConfigurationError(f"model.policy={name}: no such model folder: give one that exists, or a hub name")
    return str(Path(name).expanduser()) if is_folder_name else name


def load_policy(name: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model in torch's default dtype and in training mode.

    Args:
        name: A folder, a hub name, or an embedded model.
        **options: Passed to ``from_pretrained``, such as a quantisation.

    Raises:
        ConfigurationError: No causal language model is found there.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_policy(name), dtype=torch.get_default_dtype(), **options)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model.policy={name}: no causal language model found; give a folder that holds one, or a hub name that "
            "can be reached"
        ) from error
    return model.train()
