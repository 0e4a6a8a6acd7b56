"""Bad model folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rpo_lightning.policy import load
from tests.faults.bad_inputs.case import BadInput, run

_REASONER = Path(load.__file__).parent / "arithmetic_reasoner"
_FIT = run("fit", "--model.policy ./model")
_MEMORY = run("memory", "--model.policy ./model")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# A file that is there afterwards tells that code was executed.
EXECUTED = "executed"


class Executes:
    """Makes a file when pickle reads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {EXECUTED}",)


def folder(*changes: Callable[[Path], object]) -> Callable[[], None]:
    """A function that writes a changed copy of the embedded reasoner."""

    def make() -> None:
        shutil.copytree(_REASONER, "model")
        for change in changes:
            change(Path("model"))

    return make


def _without(*names: str) -> Callable[[Path], object]:
    return lambda model: [(model / name).unlink() for name in names]


def _written(name: str, content: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(content)


def edited(name: str, **values: Any) -> Callable[[Path], object]:
    """A change of some values of a JSON file."""

    def change(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _torn(model: Path) -> None:
    path = model / _WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(model: Path) -> None:
    torch.save({"model.norm.weight": Executes()}, model / "pytorch_model.bin")


# A model and a tokenizer whose classes are in the folder.
_CODE = _written("mine.py", f"open({EXECUTED!r}, 'w').close()\n")
_OWN_MODEL = edited(
    "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
)
_OWN_TOKENIZER = edited("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["mine.Own", None]})

# fmt: off
POLICIES = [
    BadInput("a missing model folder", _FIT,
             line="model.policy=./model: no such model folder: give one that exists, or a hub name"),
    BadInput("an embedded model that there is not", run("fit", "--model.policy embedded:nothing"),
             line="model.policy=embedded:nothing: no such embedded model: use embedded:arithmetic-reasoner"),
    BadInput("a hub name that cannot be reached", run("fit", "--model.policy nobody/nothing"),
             line="model.policy=nobody/nothing: no tokenizer found (…); give a folder that holds one, or a hub name that can be reached"),
    BadInput("a folder without a model", _FIT, files={"model/notes.md": ""},
             line="model.policy=./model: no tokenizer found (…); give a folder that holds one, or a hub name that can be reached"),
    BadInput("an adapter without its policy", _FIT,
             files={"model/adapter_config.json": '{"base_model_name_or_path": "some/base"}', "model/adapter_model.safetensors": ""},
             line="model.policy=./model: holds an adapter of some/base alone, no policy: merge it (export.merged=true, or PEFT's merge_and_unload) and name the merged folder; to train the adapter further, resume its run with --ckpt_path"),
    BadInput("an adapter with a tokenizer, where only memory is estimated", _MEMORY,
             make=folder(_without("config.json", _WEIGHTS), _written("adapter_config.json", "{}")),
             line="model.policy=./model: holds an adapter alone, no policy: merge it (export.merged=true, or PEFT's merge_and_unload) and name the merged folder; to train the adapter further, resume its run with --ckpt_path"),
    BadInput("no config.json", _FIT, make=folder(_without("config.json")),
             line="model.policy=./model: no configuration of a language model found (…); give a folder that holds one, or a hub name that can be reached"),
    BadInput("a config.json that is no JSON", _FIT, make=folder(_written("config.json", "{")),
             line="model.policy=./model: no tokenizer found (…); give a folder that holds one, or a hub name that can be reached"),
    BadInput("a kind of model that is not known", _FIT, make=folder(edited("config.json", model_type="nothing")),
             line="model.policy=./model: no configuration of a language model found (…); give a folder that holds one, or a hub name that can be reached"),
    BadInput("text for a width", _FIT, make=folder(edited("config.json", hidden_size="wide")),
             line="model.policy=./model: no tokenizer found (…); give a folder that holds one, or a hub name that can be reached"),
    BadInput("a model of pictures", _MEMORY, make=folder(edited("config.json", model_type="vit")),
             line="model.policy=./model: no causal language model found (…); give a folder that holds one, or a hub name that can be reached"),
    BadInput("no weights", _FIT, make=folder(_without(_WEIGHTS)),
             line="model.policy=./model: model.safetensors is missing: copy all files of the model"),
    BadInput("torn weights", _FIT, make=folder(_torn),
             line="model/model.safetensors: not a whole file (…): copy it again"),
    BadInput("empty weights", _FIT, make=folder(_written(_WEIGHTS, "")),
             line="model/model.safetensors: not a whole file (…): copy it again"),
    BadInput("an index that names no files", _FIT, make=folder(_without(_WEIGHTS), _written(_INDEX, "{}")),
             line="model/model.safetensors.index.json: not a whole file (…): copy it again"),
    BadInput("an index that names a file elsewhere", _FIT,
             make=folder(_without(_WEIGHTS), _written(_INDEX, '{"weight_map": {"a": "../../../etc/passwd"}}')),
             line="model.policy=./model: passwd is missing: copy all files of the model"),
    BadInput("weights of fewer layers", _FIT, make=folder(edited("config.json", num_hidden_layers=9)),
             line="model.policy=./model: its weights lack model.layers.3.input_layernorm.weight and 53 more that config.json asks for: copy all files of the model"),
    BadInput("weights of another vocabulary", _FIT, make=folder(edited("config.json", vocab_size=50)),
             line="model.policy=./model: its weights have other shapes than config.json says: use the files of one model"),
    BadInput("pickled weights with code", _FIT, make=folder(_without(_WEIGHTS), _pickled),
             line="model.policy=./model: its weights hold Python objects, which could run code when they are read: use a copy with safetensors"),
    BadInput("a model that brings code", _FIT, make=folder(_CODE, _OWN_MODEL),
             line="model.policy=./model: needs Python code that comes with the model, and that is not executed: read the code, then set model.trust_remote_code=true"),
    BadInput("a tokenizer that brings code", _FIT, make=folder(_CODE, _OWN_TOKENIZER),
             line="model.policy=./model: needs Python code that comes with the model, and that is not executed: read the code, then set model.trust_remote_code=true"),
    BadInput("a model that brings code, where only memory is estimated", _MEMORY, make=folder(_CODE, _OWN_MODEL),
             line="model.policy=./model: needs Python code that comes with the model, and that is not executed: read the code, then set model.trust_remote_code=true"),
    BadInput("a tokenizer that brings code, where only a cache is shown",
             "cache stats --path any.parquet --tokenizer ./model", make=folder(_CODE, _OWN_TOKENIZER),
             line="model.policy=./model: needs Python code that comes with the model, and that is not executed: read the code, then set model.trust_remote_code=true"),
    BadInput("no tokenizer", _FIT, make=folder(_without("tokenizer.json", "tokenizer_config.json")),
             line="model.policy=./model: no tokenizer found (…); give a folder that holds one, or a hub name that can be reached"),
    BadInput("a tokenizer that is no JSON", _FIT, make=folder(_written("tokenizer.json", "{")),
             line="model.policy=./model: no tokenizer found (…); give a folder that holds one, or a hub name that can be reached"),
    BadInput("a generation_config.json that is no JSON", _FIT, make=folder(_written("generation_config.json", "{")),
             line="model/generation_config.json: not a whole file (…): copy it again"),
    BadInput("a chat template that does not parse", _FIT,
             make=folder(edited("tokenizer_config.json", chat_template="{% for")),
             line="the tokenizer's chat template is no Jinja: unexpected 'end of template' in line 1: mend it, or name another file with data.chat_template"),
]
# fmt: on
