"""Loading policies: Hugging Face folders, hub names, and the embedded reasoner.

Nothing is executed that a folder or a hub repository brings, unless ``trust_remote_code`` allows it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rpo_lightning.core.errors import ConfigurationError, one_line

EMBEDDED_PREFIX = "embedded:"
_EMBEDDED_FOLDERS = {"arithmetic-reasoner": Path(__file__).parent / "arithmetic_reasoner"}
_WEIGHTS, _INDEX, _GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
_ADAPTER = "adapter_config.json"


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


def require_no_lone_adapter(name: str) -> None:
    """Check that a folder is no adapter without its policy, which is no policy.

    Args:
        name: A folder, a hub name, or an embedded model.

    Raises:
        ConfigurationError: It is one.
    """
    folder = Path(resolve_policy(name))
    if not (folder / _ADAPTER).is_file() or (folder / "config.json").exists():
        return
    base = _json_object(folder / _ADAPTER).get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    raise ConfigurationError(
        f"model.policy={name}: holds an adapter{of} alone, no policy: merge it (export.merged=true, or PEFT's "
        "merge_and_unload) and name the merged folder; to train the adapter further, resume its run with --ckpt_path"
    )


def load_configuration(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a policy.

    Args:
        name: A folder, a hub name, or an embedded model.
        trust_remote_code: Whether Python code that the folder brings may be executed.

    Raises:
        ConfigurationError: No configuration is found there.
    """
    require_no_lone_adapter(name)
    folder = resolve_policy(name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a bad value raises whatever its use raises
        raise not_loaded(name, "configuration of a language model", error) from error


def require_files(name: str) -> None:
    """Check that the weights in a folder are there and whole. Only headers are read; a hub name is not looked at.

    Args:
        name: A folder, a hub name, or an embedded model.

    Raises:
        ConfigurationError: A file is missing or torn.
    """
    folder = Path(resolve_policy(name))
    if not folder.is_dir():
        return
    if (folder / _GENERATION).exists():  # transformers would go on without it, and without its end-of-sequence tokens
        _json_object(folder / _GENERATION)
    if (folder / _ADAPTER).exists() or list(folder.glob("pytorch_model*.bin")):
        return
    files = [folder / _WEIGHTS]
    if (folder / _INDEX).exists():
        shards = _json_object(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            raise _damaged(folder / _INDEX, ValueError("it has no weight_map of file names"))
        files = [folder / Path(file).name for file in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise ConfigurationError(f"model.policy={name}: {file.name} is missing: copy all files of the model")
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise _damaged(file, error) from error


def _json_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    if not isinstance(found, dict):
        raise _damaged(file, ValueError("it is no JSON object"))
    return found


def load_policy(name: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Load a causal language model in torch's default dtype and in training mode.

    Args:
        name: A folder, a hub name, or an embedded model.
        trust_remote_code: Whether Python code that the folder brings may be executed.
        **options: Passed to ``from_pretrained``, such as a quantisation.

    Raises:
        ConfigurationError: No causal language model is found there, or its weights are not all there.
    """
    require_files(name)
    return _loaded(name, trust_remote_code, **options).train()


def load_outline(name: str, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """A policy's parameters with names and shapes, but without numbers, made from the headers of its weights.

    Args:
        name: A folder, a hub name, or an embedded model.
        trust_remote_code: Whether Python code that the folder brings may be executed.

    Returns:
        The model on torch's ``meta`` device; ``None`` where it takes a download, a quantiser, or ``accelerate`` is
        missing. Loading the policy finds what is wrong then.

    Raises:
        ConfigurationError: No causal language model is found there, or its weights are not all there.
    """
    config = load_configuration(name, trust_remote_code)
    is_quantised = getattr(config, "quantization_config", None) is not None
    if not Path(resolve_policy(name)).is_dir() or is_quantised or find_spec("accelerate") is None:
        return None
    has_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return _loaded(name, trust_remote_code, device_map="meta")
    finally:
        if has_bar:
            transformers_logging.enable_progress_bar()


def _loaded(name: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_policy(name),
            dtype=torch.get_default_dtype(),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a bad value raises whatever its use raises
        raise not_loaded(name, "causal language model", error) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers would draw them at random
        raise ConfigurationError(
            f"model.policy={name}: its weights lack {missing[0]} and {len(missing) - 1} more that config.json asks "
            "for: copy all files of the model"
        )
    return model


def not_loaded(name: str, what: str, error: Exception) -> ConfigurationError:
    """The error for what transformers could not load.

    Args:
        name: The policy.
        what: What was looked for.
        error: The error of transformers.
    """
    whose = f"model.policy={name}"
    if "trust_remote_code" in str(error):
        return ConfigurationError(
            f"{whose}: needs Python code that comes with the model, and that is not executed: read the code, then set "
            "model.trust_remote_code=true"
        )
    if isinstance(error, UnpicklingError):
        return ConfigurationError(
            f"{whose}: its weights hold Python objects, which could run code when they are read: use a copy with "
            "safetensors"
        )
    if "ignore_mismatched_sizes" in str(error):
        return ConfigurationError(
            f"{whose}: its weights have other shapes than config.json says: use the files of one model"
        )
    return ConfigurationError(
        f"{whose}: no {what} found ({one_line(error)}); give a folder that holds one, or a hub name that can be reached"
    )


def _damaged(file: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"{file}: not a whole file ({one_line(error)}): copy it again")
