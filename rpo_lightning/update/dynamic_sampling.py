"""DAPO's dynamic sampling: an update is made of groups that carry a signal (arXiv 2503.14476, section 3.2).

Groups whose members are all right or all wrong are dropped, and the next batches of prompts refill the update.

Deviation: the published code throws surplus groups away. Here they wait for the next update. The module stores their
old log-probs before the policy changes, and the clipped ratio accounts for their age.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.types import Completion, GoldAnswer, Group, Prompt, RolloutRequest, Sample


@dataclass(frozen=True)
class DynamicSampling:
    """Settings of dynamic sampling.

    Attributes:
        max_refills: Batches of prompts that may be drawn for one update beyond the first. After that the update is
            made with what there is.
        filter: What has to differ within a group. ``verdict`` (DAPO): some members are right and some wrong; a format
            or length reward that varies does not save a group. ``reward``: the total rewards. In either case a group
            whose rewards are all equal is dropped: with most advantages it teaches nothing.
    """

    max_refills: int = 8
    filter: Literal["verdict", "reward"] = "verdict"

    def __post_init__(self) -> None:
        if self.filter not in ("verdict", "reward"):
            raise ConfigurationError(f"model.dynamic_sampling.filter must be verdict or reward, got {self.filter!r}")
        if self.max_refills < 0:
            raise ConfigurationError(f"model.dynamic_sampling.max_refills must be at least 0, got {self.max_refills}")


class GroupBuffer:
    """Groups that wait for an update.

    Args:
        settings: See ``DynamicSampling``.
        mask_truncated: Whether unfinished responses are left out of the loss.
    """

    def __init__(self, settings: DynamicSampling, mask_truncated: bool = False) -> None:
        self.settings = settings
        self.mask_truncated = mask_truncated
        self.groups: list[Group] = []
        self.refills = 0

    def add(self, groups: Sequence[Group]) -> list[Group]:
        """Take the groups that carry a signal, and return them."""
        taken = [group for group in groups if self._carries_signal(group)]
        self.groups += taken
        return taken

    def _carries_signal(self, group: Group) -> bool:
        mixed = self.settings.filter == "reward" or 0 < group.correct_count < len(group.samples)
        return mixed and group.has_variance and has_loss(group, self.mask_truncated)

    def is_ready(self, size: int) -> bool:
        """Whether an update should be made now: enough groups, or no refill left."""
        return len(self.groups) >= size or self.refills >= self.settings.max_refills

    def refill(self) -> None:
        """Note that another batch of prompts is drawn for the update."""
        self.refills += 1

    def take(self, size: int) -> list[Group]:
        """Hand out the groups of an update; surplus groups stay."""
        taken, self.groups = self.groups[:size], self.groups[size:]
        self.refills = 0
        return taken

    @contextmanager
    def unchanged_by_exceptions(self) -> Iterator[None]:
        """Put back what it held if the block fails: a resumed run makes the iteration again."""
        groups, refills = list(self.groups), self.refills
        try:
            yield
        except BaseException:
            self.groups, self.refills = groups, refills
            raise

    def state_dict(self) -> dict[str, Any]:
        """The waiting groups as primitives."""
        return {"refills": self.refills, "groups": [_state(g) for g in self.groups]}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]], rank: int = 0, ranks: int = 1) -> None:
        """Restore the waiting groups of all ranks; they are dealt out anew where there are more or fewer ranks now."""
        self.refills = max(state["refills"] for state in states)
        if len(states) == ranks:
            waiting = states[rank]["groups"]
        else:
            waiting = [group for state in states for group in state["groups"]][rank::ranks]
        self.groups = [_group(g) for g in waiting]

    def attach_rows(self, prompts: Iterable[Prompt]) -> None:
        """Give restored groups the rows of their questions. That of a question that is gone stays empty."""
        rows = {prompt.uid: prompt.row for prompt in prompts} if self.groups else {}
        self.groups = [_with_row(g, rows.get(g.request.prompt.uid, g.request.prompt.row)) for g in self.groups]


def has_loss(group: Group, mask_truncated: bool) -> bool:
    """Whether any member of a group is in the loss: one that has sampled something, and is not left out."""
    return any(c.token_ids and (c.finished or not mask_truncated) for c in group.completions)


def _with_row(group: Group, row: Mapping[str, Any]) -> Group:
    """A group whose question has another row."""
    prompt = replace(group.request.prompt, row=row)
    samples = [replace(sample, uid=prompt.uid, row=row) for sample in group.samples]
    return replace(group, request=replace(group.request, prompt=prompt), samples=samples)


def _state(group: Group) -> dict[str, Any]:
    """A group as primitives, without the row of its question: the data has that (``GroupBuffer.attach_rows``)."""
    state = asdict(_with_row(group, {}))
    prompt = state["request"]["prompt"]
    prompt["answer"] = _answer_state(group.request.prompt.answer)
    for sample, of_sample in zip(group.samples, state["samples"], strict=True):
        of_sample["answer"] = _answer_state(sample.answer)
    for record in (prompt, *state["samples"]):
        del record["row"]
    return state


def _group(state: Mapping[str, Any]) -> Group:
    request = state["request"]
    prompt = request["prompt"]
    return Group(
        **{
            **state,
            "request": RolloutRequest(
                **{**request, "prompt": Prompt(**{**prompt, "answer": _answer(prompt["answer"])})}
            ),
            "completions": [Completion(**c) for c in state["completions"]],
            "samples": [Sample(**{**s, "answer": _answer(s["answer"])}) for s in state["samples"]],
        }
    )


def _answer_state(answer: str) -> str | dict[str, tuple[Any, ...]]:
    """A gold answer as primitives: a checkpoint is read without classes of this package."""
    return {"parts": answer.parts, "tolerances": answer.tolerances} if isinstance(answer, GoldAnswer) else answer


def _answer(state: str | Mapping[str, Any]) -> str:
    return state if isinstance(state, str) else GoldAnswer(*state["parts"], tolerances=tuple(state["tolerances"]))
