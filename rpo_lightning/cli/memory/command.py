"""The command ``rpo-lightning memory``: reads a config, prints the estimate."""

from __future__ import annotations

import math
from typing import Any, cast

from lightning.pytorch.cli import LightningArgumentParser

from rpo_lightning.cli.commands import COMMANDS
from rpo_lightning.cli.lightning_cli import RPOCLI
from rpo_lightning.cli.lightning_parser import RPOArgumentParser
from rpo_lightning.cli.memory.config import Run, read_run
from rpo_lightning.cli.memory.estimate import MOMENTS, Estimate, estimate
from rpo_lightning.cli.memory.model import model_shape
from rpo_lightning.cli.memory.remedies import remedies
from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.data.datamodule import RPODataModule
from rpo_lightning.module import RPOModule

_GIB = 2**30


class MemoryCLI(RPOCLI):
    """Parses the settings of ``fit`` without making its objects. It needs no accelerator.

    Args:
        arguments: Command-line arguments after the command's name.
    """

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(
            RPOModule,
            RPODataModule,
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "rpo-lightning memory",
                "command": "memory",
                "description": COMMANDS["memory"],
            },
            args=arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--gpu_memory_gib``."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--gpu_memory_gib",
            type=float | None,
            default=None,
            help="Memory of one device in GiB. If given, the estimate says whether the run fits.",
        )
        cast(RPOArgumentParser, parser).add_own({"gpu_memory_gib"})

    def _set_seed(self) -> None:
        """Do nothing: no random number is drawn."""

    def instantiate_classes(self) -> None:
        """Do nothing: the settings are enough."""


def memory(arguments: list[str]) -> None:
    """Print an estimate of the memory that each device needs.

    Args:
        arguments: Command-line arguments after the command's name.

    Raises:
        ConfigurationError: The config cannot be estimated.
    """
    config: Any = MemoryCLI(arguments).config
    settings = config.as_dict()
    gib = settings["gpu_memory_gib"]
    if gib is not None and not 0 < gib < math.inf:
        raise ConfigurationError(f"--gpu_memory_gib must be above 0 and finite, got {gib:g}")
    run = read_run(settings, has_gpu_memory=gib is not None)
    shape = model_shape(run.policy, run.adapter, settings["model"]["trust_remote_code"])
    quantization = run.adapter.quantization if run.adapter else None
    found = estimate(shape, run.plan, quantization, None if gib is None else gib * _GIB)
    print("\n".join([*_head(run, found), "", *_table(found), "", *_verdict(found, quantization), *_notes(run, found)]))


def _head(run: Run, found: Estimate) -> list[str]:
    shape, plan = found.shape, found.plan
    where = f"{plan.ranks} ranks ({plan.nodes} × {plan.devices})" if plan.ranks > 1 else "1 rank"
    recomputing = "with" if plan.checkpointing else "without"
    return [
        "An estimate for fit with this config. No weights were loaded, nothing was measured.",
        f"{run.policy} ({shape.name}): {shape.parameters / 1e6:,.1f} M parameters, {shape.trainable / 1e6:,.1f} M "
        f"train; {shape.layers} layers",
        f"{where}, {plan.sharding.value}, {plan.precision.value}, {plan.optimizer.name}; micro-batches of at most "
        f"{plan.tokens:,} tokens, {recomputing} gradient checkpointing",
    ]


def _table(found: Estimate) -> list[str]:
    """The table of parts by moment, in GiB."""
    unit = "GiB on each GPU" if found.plan.on_gpu else "GiB for each rank"
    rows = [(part.name, *(getattr(part, moment) for moment in MOMENTS)) for part in found.parts]
    rows.append(("sum", *(found.total(moment) for moment in MOMENTS)))
    width = max(len(unit), *(len(row[0]) for row in rows))
    lines = [f"{unit:<{width}}  {'rollout':>9}  {'backward':>9}  {'step':>9}"]
    for name, *sizes in rows:
        cells = "  ".join(f"{_shown(size):>9}" for size in sizes)
        lines.append(f"{name:<{width}}  {cells}")
    lines.insert(-1, "-" * len(lines[0]))
    return lines


def _shown(size: float) -> str:
    if size == 0:
        return ""
    return f"{size / _GIB:.2f}" if size >= 0.005 * _GIB else "< 0.01"


def _verdict(found: Estimate, quantization: str | None) -> list[str]:
    """The peak, whether it fits, and which changes lower it."""
    moment = max(MOMENTS, key=found.total)
    lines = [f"peak: {found.peak / _GIB:.2f} GiB ({moment})"]
    if found.fits is None:
        if found.plan.on_gpu and found.plan.engine.is_vllm:
            share = found.plan.engine.gpu_share
            lines[0] += f", without vLLM's {share:.0%} of the GPU (give --gpu_memory_gib to include it)"
            lines.append(f"smallest GPU that holds both: about {found.smallest_device / _GIB:.0f} GiB")
        return lines
    assert found.device_bytes is not None
    size = found.device_bytes / _GIB
    lines.append(f"{'fits' if found.fits else 'does not fit'} into {size:g} GiB, by this estimate")
    if found.engine_lacks:
        lines.append(
            f"  vLLM's share of {found.plan.engine.gpu_share:.0%} is {found.engine_lacks / _GIB:.2f} GiB too small for "
            "its weights (merged, not quantised) and one response: raise model.engine.gpu_memory_utilization, "
            "or model.engine.tensor_parallel_size with more GPUs"
        )
    if found.peak > found.device_bytes:
        lines += [
            f"  {text}: peak {other.peak / _GIB:.2f} GiB{' (fits)' if other.fits else ''}"
            for text, other in remedies(found, quantization)
        ]
        adapter = "" if found.shape.has_adapter else "an adapter (model.adapter: LoRA), "
        lines.append(f"  or several of these, {adapter}or more GPUs with a strategy that shards")
    return lines


def _notes(run: Run, found: Estimate) -> list[str]:
    """The assumptions, and the CPU memory."""
    notes = [*run.assumptions]
    if run.plan.on_gpu:
        notes.append("attention uses fused kernels; fragmentation and other programs on the GPU are not counted")
    if run.plan.shares_prefixes:
        notes.append("the worst case of shared rows: prompts and prefixes of the largest lengths")
    if run.plan.has_reference:
        notes.append("the objective has a KL penalty (beta > 0)")
    if found.host:
        needs = "; ".join(f"{text} {size / _GIB:.1f} GiB" for text, size in found.host)
        notes.append(f"CPU memory for each rank: {needs}")
    return ["assumed:" if notes else "", *(f"  {note}" for note in notes)]
