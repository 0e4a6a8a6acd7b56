"""The gradient of an update, computed in micro-batches.

Ranks may have different numbers of groups, even none. If parameters are sharded, forward and backward passes are
collectives. Therefore all ranks make as many passes as the busiest one, and fill the missing ones with a row of three
tokens whose loss is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpo_lightning.core.errors import UpdateError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.timing import PhaseTimer
from rpo_lightning.core.types import Group
from rpo_lightning.policy.prefix_sharing.compatibility import needs_full_logits, row_cost
from rpo_lightning.policy.prefix_sharing.logprobs import TokenLogprobs, token_logprobs
from rpo_lightning.policy.prefix_sharing.rows import (
    Row,
    RowCost,
    SharedRow,
    rows_of,
    shared_rows,
)
from rpo_lightning.policy.prefix_sharing.transfer import received_together
from rpo_lightning.update.importance import ImportanceCorrection
from rpo_lightning.update.inputs import GivenInputs, GivenLogprobs
from rpo_lightning.update.loss_rows import LossRows
from rpo_lightning.update.metrics import UpdateMetrics
from rpo_lightning.update.mismatch import Mismatch
from rpo_lightning.update.objectives.base import LossInputs, Objective
from rpo_lightning.update.passes import Pass, passes_of
from rpo_lightning.update.reference import ReferencePolicy
from rpo_lightning.update.settings import UpdateSettings

# Runs the backward pass of a loss. The flag is True for the last pass of an update.
Backward = Callable[[Tensor, bool], None]
# Calls a function that computes the loss of a micro-batch, and returns that loss.
Forward = Callable[[Callable[[], Tensor]], Tensor]


class PolicyLoss:
    """Computes the loss of an update's groups, one micro-batch at a time.

    Args:
        policy: The model that is trained.
        reference: The reference policy of the KL penalty; ``None`` without one.
        objective: Loss of a token, and weight of a sequence.
        settings: See ``UpdateSettings``.
        pad_id: Padding token.
        temperature: Sampling temperature of the rollouts.
        importance_correction: Weights that correct for differences between engine and trainer; ``None`` if the
            engine's log-probs are not comparable with the trainer's.
        timer: Gets the seconds of the reference's log-probs.
        ranks: The ranks that share the update.
        holds_contexts: See ``Placement``.

    Attributes:
        processed_tokens: Tokens computed so far by phase, without padding: ``old_logprobs`` and ``reference_logprobs``
            (forward), ``update`` (forward and backward).
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: ReferencePolicy | None,
        objective: Objective,
        settings: UpdateSettings,
        pad_id: int,
        temperature: float = 1.0,
        importance_correction: ImportanceCorrection | None = None,
        timer: PhaseTimer | None = None,
        ranks: Ranks | None = None,
        holds_contexts: bool = True,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.objective = objective
        self.settings = settings
        self.pad_id = pad_id
        self.temperature = temperature
        self.importance_correction = importance_correction
        self._full_logits = needs_full_logits(policy)
        self.timer = timer or PhaseTimer()
        self.ranks = ranks or Ranks()
        self.processed_tokens = {"old_logprobs": 0, "reference_logprobs": 0, "update": 0}
        self._row_cost = row_cost(policy, settings.share_prefixes, self._full_logits)
        # With the response in the loss scope the context has log-probs of its own.
        holds = holds_contexts and settings.loss_scope == "suffix"
        self._row_cost = replace(self._row_cost, holds=holds)
        if not settings.prefix_gradient:
            self._row_cost = _without_context_gradient(self._row_cost)
        idle = Row(0, 0, (pad_id, pad_id), (pad_id,), 1)
        self._idle = Pass([SharedRow((idle,))])

    def store_old_logprobs(self, groups: Sequence[Group]) -> None:
        """Store the current policy's log-probs in groups that lack old ones; a collective.

        Call it before the weights change, for groups that later updates use.
        """
        pending = [g for g in groups if g.old_logprobs is None]
        stores: list[list[list[float]]] = [[[] for _ in group.completions] for group in pending]
        passes: list[TokenLogprobs] = []
        for step, _ in self._in_step(self._passes(rows_of(pending, self.settings.loss_scope), gradient=False)):
            with torch.no_grad():
                computed = self._logprobs(self.policy, step or self._idle)
            if step is not None:
                self.processed_tokens["old_logprobs"] += step.tokens
                passes.append(computed)
        for computed, logprobs_BS in zip(passes, received_together([p.logprobs_BS for p in passes]), strict=True):
            for row, length, logprobs_S in zip(computed.rows, computed.lengths, logprobs_BS, strict=True):
                stores[row.group][row.member] = logprobs_S[len(logprobs_S) - length :].tolist()
        for group, store in zip(pending, stores, strict=True):  # last, so an interruption leaves no group half done
            group.old_logprobs = store

    def backward(
        self,
        groups: Sequence[Group],
        advantages: Sequence[Tensor],
        backward: Backward,
        forward: Forward = lambda compute: compute(),
    ) -> dict[str, float]:
        """Accumulate the gradient of an update's loss; a collective.

        Args:
            groups: This rank's groups of the update. May be empty if other ranks have some.
            advantages: Advantages of each group's members, [G].
            backward: Runs the backward pass of a micro-batch. It, or the strategy, must average gradients over ranks.
            forward: Runs the forward pass of a micro-batch.

        Returns:
            The update's metrics over all ranks, ``loss/…`` and ``mismatch/…``. ``loss/tokens`` counts all loss tokens.
            Means and extremes are of those that are computed.
        """
        rows = LossRows.of(groups, self.settings)
        totals = rows.totals(self.ranks)
        computed_rows = rows.to_compute(advantages, self.objective.learns_from_zero_advantages)
        metrics = UpdateMetrics()

        def loss_of(step: Pass | None) -> Tensor:
            if step is None:
                return self._idle_loss()
            if step.closes:
                assert step.context is not None
                return step.context.loss()
            inputs, computed = self._inputs(groups, step, advantages, rows.lengths, totals, metrics.mismatch)
            output = self.objective(inputs)
            self.processed_tokens["update"] += step.tokens
            self.processed_tokens["reference_logprobs"] += step.tokens if self.reference is not None else 0
            metrics.add(output, computed, inputs.mask_BS)
            return output.loss * self.ranks.size

        for step, is_last in self._in_step(self._passes(computed_rows, self.settings.prefix_gradient)):
            backward(forward(partial(loss_of, step)), is_last)
        return metrics.take(self.ranks) | {"loss/tokens": totals[0]}

    def computed_groups(self, groups: Sequence[Group], advantages: Sequence[Tensor]) -> list[Group]:
        """Those of an update's groups that ``backward`` computes."""
        rows = LossRows.of(groups, self.settings)
        computed = rows.to_compute(advantages, self.objective.learns_from_zero_advantages)
        return [groups[index] for index in dict.fromkeys(row.group for row in computed)]

    def _passes(self, rows: Sequence[Row], gradient: bool) -> list[Pass]:
        limit, cost = self.settings.micro_batch_tokens, self._row_cost
        arranged = shared_rows(rows, limit, cost)
        return passes_of(arranged, limit, cost.longest_shared, gradient, has_reference=self.reference is not None)

    def _in_step(self, passes: list[Pass]) -> Iterator[tuple[Pass | None, bool]]:
        """This rank's passes, then ``None`` for each pass it lacks; each with whether it is the last pass.

        The list is emptied: what a pass holds, such as keys and values of a context, is let go when the next begins.
        Ranks reduce gradients in the last pass, which must reach all parameters. The pass of a held context does not.
        """
        needs_another = bool(passes) and passes[-1].closes and self.ranks.size > 1
        count = self.ranks.most(len(passes) + needs_another)
        for index in range(count):
            yield (passes.pop(0) if passes else None), index == count - 1

    def _idle_loss(self) -> Tensor:
        """A loss of zero, with the same passes through the same models as a micro-batch."""
        self._reference_logprobs(self._idle)
        return self._logprobs(self.policy, self._idle, self.settings.prefix_gradient).logprobs_BS.sum() * 0.0

    def _reference_logprobs(self, step: Pass) -> Tensor | None:
        if self.reference is None:
            return None
        self.reference.prepare(self.policy.config._attn_implementation, self.policy.device)
        with torch.no_grad(), self.timer("reference_logprobs"), self.reference() as model:
            return self._logprobs(model, replace(step, context=step.of_reference)).logprobs_BS

    def _inputs(
        self,
        groups: Sequence[Group],
        step: Pass,
        advantages: Sequence[Tensor],
        lengths: Mapping[tuple[int, int], int],
        totals: tuple[float, float],
        mismatch: Mismatch,
    ) -> tuple[LossInputs, TokenLogprobs]:
        reference_BS = self._reference_logprobs(step)
        with_entropy = self.objective.entropy_bonus > 0
        computed = self._logprobs(self.policy, step, self.settings.prefix_gradient, with_entropy)
        rows = computed.rows
        lengths_B = torch.tensor([lengths[r.group, r.member] for r in rows])
        weights_B = self.objective.sequence_weights(lengths_B, *totals)
        given = GivenInputs.of(groups, rows, advantages, lengths_B, weights_B, computed.logprobs_BS)
        mask_BS = computed.mask_BS & given.counted_B[:, None]
        old_BS = computed.logprobs_BS.detach()
        if given.old is not None:
            old_BS = torch.where(given.old.known_BS, given.old.values_BS, old_BS)
        engine_BS, importance_BS = self._of_engine(given.engine, old_BS, mask_BS, mismatch)
        inputs = LossInputs(
            logprobs_BS=computed.logprobs_BS,
            old_logprobs_BS=old_BS,
            engine_logprobs_BS=engine_BS,
            advantages_BS=given.advantages_B[:, None].expand_as(old_BS),
            mask_BS=mask_BS,
            weights_B=given.weights_B,
            entropy_BS=computed.entropy_BS,
            reference_logprobs_BS=reference_BS,
            importance_BS=importance_BS,
        )
        return inputs, computed

    def _of_engine(
        self, engine: GivenLogprobs, old_BS: Tensor, mask_BS: Tensor, mismatch: Mismatch
    ) -> tuple[Tensor, Tensor | None]:
        """The engine's log-probs, old ones where it has none, and importance weights. Adds to ``mismatch``."""
        if self.importance_correction is None:
            return old_BS, None
        sampled_BS = engine.known_BS & mask_BS
        difference_BS = torch.where(sampled_BS, old_BS - engine.values_BS, 0.0)
        weights_BS = self.importance_correction.weights(difference_BS, sampled_BS)
        mismatch.add(difference_BS, sampled_BS, weights_BS)
        return torch.where(sampled_BS, engine.values_BS, old_BS), weights_BS

    def _logprobs(
        self, model: PreTrainedModel, step: Pass, prefix_gradient: bool = True, entropy_gradient: bool = False
    ) -> TokenLogprobs:
        return token_logprobs(
            model, step.rows, self.temperature, self.pad_id, self.policy.device, self._full_logits, prefix_gradient,
            step.context, entropy_gradient,
        )  # fmt: skip


def _without_context_gradient(cost: RowCost) -> RowCost:
    if not cost.shares or cost.longest_shared is not None:
        raise UpdateError(
            "model.update.prefix_gradient=false needs shared rows of any length, which this model does not support "
            "(its warning says why): set model.update.prefix_gradient=true"
        )
    return replace(cost, context=1 / 3)  # a forward pass is a third of forward and backward
