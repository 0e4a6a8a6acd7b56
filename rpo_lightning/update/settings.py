"""``model.update``: the settings of an update."""

from __future__ import annotations

from dataclasses import dataclass

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.policy.prefix_sharing.rows import LossScope
from rpo_lightning.update.advantages import AdvantageEstimator
from rpo_lightning.update.importance import ImportanceCorrection
from rpo_lightning.update.mismatch import MismatchBound


@dataclass(frozen=True)
class UpdateSettings:
    """How scored groups update the policy.

    Attributes:
        loss_scope: Tokens in the loss: the ``suffix`` (on-policy given the prefix), or the whole ``response`` (eq. 5 of
            the paper).
        advantages: How rewards become advantages; if not given, ``Unscaled`` for ``DrGRPO``, and ``GroupScaled`` for
            the other objectives.
        mask_truncated: Leave unfinished responses out of the loss (DAPO's overlong filtering).
        passes_per_rollout: How often the groups of a rollout are trained on.
        minibatches_per_pass: Updates that a pass is split into.
        micro_batch_tokens: Most tokens of one forward and backward pass, padding included. A longer row makes a
            micro-batch of its own.
        share_prefixes: Share a group's context where that is cheaper: the update computes it once, and
            ``TransformersEngine`` reads its keys and values once a step.
        prefix_gradient: Let the gradient flow through the context too. Without it, the update is cheaper and its
            gradient biased (``benchmarks/README.md``). Turning it off needs ``loss_scope: suffix`` and
            ``share_prefixes: true``.
        importance_correction: Weights of the loss that correct for differences between rollout engine and trainer;
            if not given ``TokenTruncated(2.0)``, and none for objectives that correct them themselves (DPPO).
        mismatch_bound: Log-prob differences between engine and trainer that stop the run.
        max_grad_norm: Limit of the gradient's norm; ``.inf`` for no clipping.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        max_idle_iterations: Stop the run with a diagnosis after this many iterations in a row that neither update the
            policy nor leave a group for the next update; 0 for never.
        max_skipped: Stop the run with a diagnosis after this many updates in a row whose loss, log-probs or gradient
            are not finite; 0 for never. Such an update changes nothing. One or two come from an odd batch; three in a
            row from weights or kernels that are broken, which no further batch mends.
        accumulate_sharded: With FSDP2, reduce gradients after every micro-batch, not once an update: more traffic, but
            no rank holds a whole gradient.
    """

    loss_scope: LossScope = "suffix"
    advantages: AdvantageEstimator | None = None
    mask_truncated: bool = False
    passes_per_rollout: int = 1
    minibatches_per_pass: int = 1
    micro_batch_tokens: int = 16384
    share_prefixes: bool = True
    prefix_gradient: bool = True
    importance_correction: ImportanceCorrection | None = None
    mismatch_bound: MismatchBound = MismatchBound()
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    max_idle_iterations: int = 16
    max_skipped: int = 3
    accumulate_sharded: bool = False

    def __post_init__(self) -> None:
        for name in ("passes_per_rollout", "minibatches_per_pass", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"model.update.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_idle_iterations", "max_skipped"):
            if getattr(self, name) < 0:
                raise ConfigurationError(
                    f"model.update.{name} must be at least 0 (0: never), got {getattr(self, name)}"
                )
        if self.loss_scope not in ("suffix", "response"):
            raise ConfigurationError(f"model.update.loss_scope must be suffix or response; got {self.loss_scope!r}")
        if not self.max_grad_norm > 0:
            raise ConfigurationError(
                f"model.update.max_grad_norm must be above 0 (.inf: no clipping), got {self.max_grad_norm}"
            )
        if not self.prefix_gradient and (self.loss_scope != "suffix" or not self.share_prefixes):
            raise ConfigurationError(
                "model.update.prefix_gradient=false needs model.update.loss_scope=suffix and "
                f"model.update.share_prefixes=true, got {self.loss_scope} and {str(self.share_prefixes).lower()}"
            )

    @property
    def updates_per_rollout(self) -> int:
        """Updates on the groups of one rollout."""
        return self.passes_per_rollout * self.minibatches_per_pass
