"""What libraries print that says nothing to the user of a run: each entry says why it is harmless.

Everything else is shown. The tests ignore the same warnings, see ``tests/conftest.py``.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import NamedTuple

from typing_extensions import override


class HarmlessWarning(NamedTuple):
    """A warning that is ignored.

    Attributes:
        message: Regular expression of how it begins, without a colon.
        category: Its class, or a base of it.
        module: Regular expression of how the name of the module that warns begins.
    """

    message: str
    category: type[Warning]
    module: str


HARMLESS_WARNINGS = (
    # Prompts are tokenised once and held in memory: workers of a data loader would have nothing to do.
    HarmlessWarning(".*does not have many workers", UserWarning, r"lightning\."),
    # Checkpoints hold the policy after its update, which is what a run resumes from.
    HarmlessWarning("Using ModelCheckpoint with manual optimization", UserWarning, r"lightning\."),
    # Each run has its own folder: a resumed one leaves the checkpoints of the earlier one alone.
    HarmlessWarning("The dirpath has changed from", UserWarning, r"lightning\."),
    # Evaluations are means over all ranks before they are logged.
    HarmlessWarning("It is recommended to use `self.log.*sync_dist=True", UserWarning, r"lightning\."),
    # Lightning uses a class of torch's that torch replaces; nothing for the user to do.
    HarmlessWarning(".*LeafSpec.* is deprecated", FutureWarning, r"lightning\."),
    # Lightning calls jsonargparse by older names, which work until version 5; pyproject.toml excludes that.
    HarmlessWarning(
        r"\s+(``ArgumentParser.add_instantiator``|``instantiate_classes``|skip_none|By default only one Jsonargparse)",
        DeprecationWarning,
        r"lightning\.pytorch\.cli",
    ),
    # Modules of torch, and of libraries that are imported with it, still use TorchScript.
    HarmlessWarning("`torch.jit.script_method` is", DeprecationWarning, r"torch\.jit"),
    # vLLM walks over torch's modules and meets an old name of torch's.
    HarmlessWarning("`torch.distributed.reduce_op` is deprecated", FutureWarning, r"vllm\."),
    # The package refuses such an adapter right after, with a line that says what to do.
    HarmlessWarning("Model has `tie_word_embeddings=True` and a tied layer", UserWarning, r"peft\."),
)


class Once(logging.Filter):
    """Lets each message of a logger pass once, whatever its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[str] = set()

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)
        is_first = message not in self._passed
        self._passed.add(message)
        return is_first


def silence_libraries() -> None:
    """Ignore the harmless warnings, and log lines that ask for nothing."""
    for warning in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", warning.message, warning.category, warning.module)
    # Tips of products that Lightning's makers sell.
    for name in ("lightning.fabric.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_tip)
    # A faster kernel is missing; bitsandbytes computes without it. PEFT imports it for adapters of any kind.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_a_kernel)
    # Triton compiles kernels for GPUs. On a CPU vLLM has others.
    logging.getLogger("vllm.triton_utils.importing").addFilter(_is_not_about_triton)
    # It tells that 8-bit products are computed in 16 bits, at every product.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(Once())
    # It lists its backends for other hardware, which are not installed.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the last failure is an error
    # A table of weights that are missing or of other shapes. The package refuses such a policy right after.
    logging.getLogger("transformers.utils.loading_report").addFilter(_is_no_refused_policy)
    # A kind of model that transformers does not know. Likewise.
    logging.getLogger("transformers.configuration_utils").addFilter(_is_no_unknown_kind)
    # What a command prints, such as a config, may be piped into a file.
    logging.getLogger("DeepSpeed").addFilter(_to_stderr)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("💡 Tip")


def _is_not_about_a_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


def _is_not_about_triton(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Triton is installed, but doesn't include CPU backend")


def _is_no_refused_policy(record: logging.LogRecord) -> bool:
    return not any(status in str(record.msg) for status in ("MISSING", "MISMATCH"))


def _is_no_unknown_kind(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("You are using a model of type")


def _to_stderr(record: logging.LogRecord) -> bool:
    """Send a logger's lines to stderr. A filter can be added before the logger has its handlers."""
    for handler in logging.getLogger(record.name).handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    return True
