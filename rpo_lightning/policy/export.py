"""Writes policies as ordinary Hugging Face folders.

Sharded parameters are gathered one by one onto the first rank. Adapters are merged, or saved alone as PEFT does.
Quantised weights are saved in the precision that they are computed in.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, modeling_utils

from rpo_lightning.core.errors import ConfigurationError, one_line
from rpo_lightning.core.files import put_on_disk
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.policy.lora import has_adapter
from rpo_lightning.policy.weights import empty_model, gathered, named_weights, require_plain_names, underlying_model


def export_policy(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, merged: bool, ranks: Ranks
) -> None:
    """Write a policy and its tokenizer. All ranks must call this; the first one writes.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        folder: Where to. A policy that is there is replaced once the new one is whole; other files stay.
        merged: Whether to merge an adapter into the weights; if not, it is saved alone.
        ranks: The ranks that call this.

    Raises:
        ConfigurationError: The folder holds an adapter and a whole policy is to be saved, or the reverse.
    """
    require_room(policy, folder, merged, ranks)
    alone = has_adapter(policy) and not merged
    if not alone:
        require_plain_names(policy)
    weights = _adapter_weights(policy) if alone else named_weights(policy)
    tied = set() if alone else _tied_names(policy)
    # Every rank takes part in gathering; only the first one stores the weights.
    state = {name: w.cpu() for name, w in weights if ranks.rank == 0 and name not in tied}
    if ranks.rank:
        return
    model: Any = policy if alone else empty_model(policy)
    with writing_policy(folder) as partial:
        _save_unwrapped(model, partial, state_dict=state)
        tokenizer.save_pretrained(partial)


def require_room(policy: PreTrainedModel, folder: str | Path, merged: bool, ranks: Ranks) -> None:
    """Check that ``export_policy`` may write to a folder. All ranks must call this.

    Raises:
        ConfigurationError: The folder holds an adapter and a whole policy is to be saved, or the reverse.
    """
    alone = has_adapter(policy) and not merged
    others = ("config.json", "model*.safetensors", "pytorch_model*.bin") if alone else ("adapter_config.json",)
    found = [str(path) for pattern in others for path in Path(folder).glob(pattern)]
    seen = [path for paths in ranks.gather(found) for path in paths]
    if seen:
        raise ConfigurationError(
            f"{seen[0]} exists; {'the adapter and another policy' if alone else 'the policy and an adapter'} "
            "would be loaded together: save into another folder"
        )


def _save_unwrapped(model: Any, folder: Path, **options: Any) -> None:
    """Save a model that has no wrapper. Transformers would look for one, and import DeepSpeed for it if installed."""
    library: Any = modeling_utils
    original = library.unwrap_model
    library.unwrap_model = lambda model: model
    try:
        model.save_pretrained(folder, **options)
    finally:
        library.unwrap_model = original


def _adapter_weights(policy: Any) -> Any:
    return ((name, gathered(p)) for name, p in policy.named_parameters() if p.requires_grad)


def _tied_names(policy: Any) -> set[str]:
    """Names that repeat a parameter of another name."""
    model = underlying_model(policy)
    if not model.config.get_text_config().tie_word_embeddings:
        return set()
    tied = getattr(model, "_tied_weights_keys", None) or {}
    return set(tied)


def save_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write an ordinary Hugging Face folder. Other files in it stay."""
    with writing_policy(folder) as partial:
        _save_unwrapped(policy, partial)
        tokenizer.save_pretrained(partial)
    return Path(folder)


# Weights in any number of files, and other files that loading a policy or its tokenizer looks for.
_OF_A_POLICY = re.compile(
    r"(adapter_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|generation_config|chat_template)\.json"
    r"|chat_template\.jinja|tokenizer\.model|spiece\.model|vocab\.txt|merges\.txt"
)

# Safetensors and tokenizers write in Rust, and raise errors of their own.
_ERROR_OF_RUST = re.compile(r"\(os error (\d+)\)")


@contextmanager
def writing_policy(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder for a policy, and move its files to ``folder`` when the block ends without an error.

    A new folder appears whole. In a folder that exists:

    * Files of the same name are replaced one by one, except a model card (``README.md``).
    * Weights and tokenizer files that the new policy does not have are removed.
    * Everything else stays.
    """
    folder = Path(folder).resolve()
    is_new = not folder.exists()
    # On the same file system as the folder, which may be a mount point: files can then be renamed.
    partial = folder.with_name(folder.name + ".partial") if is_new else folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            put_on_disk(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        number = _ERROR_OF_RUST.search(str(error))
        if number:
            raise OSError(int(number[1]), one_line(error)) from error
        raise
    if is_new:
        partial.replace(folder)
        put_on_disk(folder.parent)
    else:
        _replace_files(folder, partial)


def _replace_files(folder: Path, partial: Path) -> None:
    written = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
    for name in written:
        if name == Path("README.md") and (folder / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(folder / name)
    for path in folder.iterdir():
        if _OF_A_POLICY.fullmatch(path.name) and Path(path.name) not in written:
            path.unlink()
    shutil.rmtree(partial)
    put_on_disk(folder)
