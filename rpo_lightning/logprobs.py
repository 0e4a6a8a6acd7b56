"""Log-probs of responses under a model: micro-batches of rows, logits where they are needed only.

A row is prompt + response, padded on the left, so that the loss scopes of all rows end at the last
column and one slice of the logits covers them. The scope is the suffix (on-policy given the prefix)
or the whole response (eq. 5 of the paper, kept prefix included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpo_lightning.records import Group

LossScope = Literal["suffix", "response"]


@dataclass(frozen=True)
class Row:
    """One response, ready to be computed.

    Attributes:
        group: Index of its group in the batch.
        member: Index within the group.
        token_ids: Prompt and response.
        scope_length: Number of tokens at the end that are in the loss scope.
    """

    group: int
    member: int
    token_ids: tuple[int, ...]
    scope_length: int


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs and entropies at the loss scope, right-aligned.

    Attributes:
        logprobs_BS: Log-probs of the tokens, with gradient if one was asked for.
        entropy_BS: Entropy of the next-token distribution, without gradient.
        mask_BS: True at tokens of the scope.
    """

    logprobs_BS: Tensor
    entropy_BS: Tensor
    mask_BS: Tensor


def rows_of(groups: Sequence[Group], scope: LossScope) -> list[Row]:
    """The rows of all members of all groups."""
    rows = []
    for index, group in enumerate(groups):
        for member, completion in enumerate(group.completions):
            response = group.response_ids(member)
            length = len(completion.token_ids) if scope == "suffix" else len(response)
            rows.append(Row(index, member, group.request.prompt.token_ids + response, length))
    return rows


def micro_batches(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Split rows, sorted by length, into micro-batches of at most ``max_tokens`` padded tokens.

    A row longer than that makes a micro-batch of its own.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: (len(r.token_ids), r.group, r.member), reverse=True):
        # Sorted from long to short: the first row of a micro-batch sets its width.
        if batches and len(batches[-1][0].token_ids) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def token_logprobs(
    model: PreTrainedModel, rows: Sequence[Row], temperature: float, pad_id: int, device: torch.device
) -> TokenLogprobs:
    """Log-probs of the tokens in the loss scope of each row.

    Args:
        model: The policy or the reference.
        rows: One micro-batch.
        temperature: The sampling temperature: the policy is what was sampled from.
        pad_id: Any token id; padded positions are masked.
        device: Where the model is.
    """
    width = max(len(r.token_ids) for r in rows)
    span = max(r.scope_length for r in rows)
    ids_BT = torch.full((len(rows), width), pad_id)
    attention_BT = torch.zeros((len(rows), width), dtype=torch.long)
    mask_BS = torch.zeros((len(rows), span), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids_BT[i, width - len(row.token_ids) :] = torch.tensor(row.token_ids)
        attention_BT[i, width - len(row.token_ids) :] = 1
        mask_BS[i, span - row.scope_length :] = True
    ids_BT, attention_BT, mask_BS = ids_BT.to(device), attention_BT.to(device), mask_BS.to(device)
    # Position s of the scope is predicted by the position before it.
    logits_BSV = model(
        input_ids=ids_BT,
        attention_mask=attention_BT,
        position_ids=(attention_BT.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=span + 1,
    ).logits[:, :-1]
    precision = torch.promote_types(logits_BSV.dtype, torch.float32)
    log_distribution_BSV = (logits_BSV.to(precision) / temperature).log_softmax(-1)
    logprobs_BS = log_distribution_BSV.gather(-1, ids_BT[:, -span:, None]).squeeze(-1)
    with torch.no_grad():
        entropy_BS = -(log_distribution_BSV.exp() * log_distribution_BSV).sum(-1)
    return TokenLogprobs(logprobs_BS, entropy_BS, mask_BS)
