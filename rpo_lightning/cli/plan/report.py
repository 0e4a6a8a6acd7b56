"""What ``rpo-lightning plan`` prints and writes."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import inf
from typing import Any

from rpo_lightning.cli.plan.estimates import NO_PREFIX, ArmEstimate, Iteration, as_dict
from rpo_lightning.cli.plan.module import PlanModule
from rpo_lightning.cli.plan.update import TIMED_GROUPS
from rpo_lightning.cli.plan.verdict import Verdict, judge
from rpo_lightning.core.files import replacing
from rpo_lightning.core.seeds import run_seed
from rpo_lightning.evaluation import Estimate


class PlanReport:
    """The estimates of a finished plan.

    Args:
        module: The module that has sampled it.
        batch_size: Questions of an iteration on each rank.

    Attributes:
        arms: The estimates by name of the arm, the one without a prefix first.
        answered_again: By arm, the questions that had no prefix there either, so they were answered without one again.
        unused_cut: Why the config's cut is not among them; empty if it is, or if there is none.
        verdict: The advice.
    """

    def __init__(self, module: PlanModule, batch_size: int) -> None:
        assert module.found is not None
        self._module, self._found = module, module.found
        ranks = module.ranks.size
        self.iteration = Iteration(batch_size * ranks, module.group_size, ranks, module.buffer is not None)
        self.arms = {
            arm: ArmEstimate.of(
                [row for row in self._found.answers if row.arm == arm],
                self.iteration,
                self._found.update_seconds.get(arm),
            )
            for arm in dict.fromkeys(row.arm for row in self._found.answers)
        }
        self.unused_cut = self._leave_out_an_unused_cut()
        plain = [row for row in self._found.answers if not row.prefix_tokens]
        self.answered_again = {
            arm: [row.uid for row in plain if row.arm == arm] for arm in self.arms if arm != NO_PREFIX
        }
        cut = self.arms.get(module.cut_arm or "")
        shares = [arm for arm in self.arms.values() if arm.name not in (NO_PREFIX, module.cut_arm)]
        self.verdict: Verdict = judge(self.arms[NO_PREFIX], shares, cut, len(self._found.traced))

    def _leave_out_an_unused_cut(self) -> str:
        name = self._module.cut_arm
        if name is None:
            return ""
        if name not in self.arms:
            return f"{name}: not sampled, since nothing is cached for any of these questions: it would be the full path"
        if not self.arms[name].prefixed:
            del self.arms[name]
            return f"{name}: left out, since it kept nothing of any cached response: it would be the full path"
        return ""

    def lines(self) -> list[str]:
        """The report as lines of text."""
        near = "The interval of the success rate holds a limit between two of the rules: take the advice with care."
        return [
            *self._head(), "", *self._table(), *([self.unused_cut] if self.unused_cut else []), "", *self._notes(), "",
            *self.verdict.sentences, *([near] if self.verdict.is_near_a_limit else []),
        ]  # fmt: skip

    def _head(self) -> list[str]:
        plain = [row for row in self._found.answers if row.arm == NO_PREFIX]
        never, always = sum(not any(r.correct) for r in plain), sum(all(r.correct) for r in plain)
        n, questions = len(plain[0].correct), len(plain)
        own, traced = self._found.own, self._found.traced
        return [
            f"Estimates from {questions} of {self._module.training_questions} training questions with {n} answers each "
            f"(seed {run_seed()}), for this policy before training and for this machine.",
            f"without a prefix: success {_interval(self.arms[NO_PREFIX].success, 2)}; {never} of {questions} questions "
            f"solved 0 of {n} times, {always} solved {n} of {n} times",
            f"correct responses to cut: for {len(own | traced)} of {questions} questions ({len(own)} with the policy's "
            f"own, {len(traced)} with one from cache.path)",
        ]

    def _table(self) -> list[str]:
        size = f"{self.iteration.groups} groups of {self.iteration.group_size}"
        rows = [
            (f"an iteration of {size}", "prefixed", "success", "groups that teach", "decoded tokens", "per such group",
             "seconds")
        ]  # fmt: skip
        for arm in self.arms.values():
            per_group = arm.tokens_per_informative_group(self.iteration)
            rows.append(
                (
                    arm.name,
                    f"{arm.prefixed}/{arm.questions}",
                    _interval(arm.success, 2),
                    _interval(arm.informative, 2),
                    _interval(arm.tokens, 0),
                    "-" if per_group == inf else f"{per_group:,.0f}",
                    _interval(arm.seconds, 1),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]

    def _notes(self) -> list[str]:
        module, iteration = self._module, self.iteration
        n, size = module.samples, iteration.group_size
        notes = ["[…]: 95 % bootstrap intervals over questions; seconds have the interval of the tokens alone"]
        if n >= size:
            notes.append(f"groups that teach have right and wrong members; estimated without bias from {n} answers")
        else:
            notes.append(
                f"groups that teach have right and wrong members; {n} answers are fewer than a group of {size}, so "
                "their share is computed from success rates and too low on average: raise --samples"
            )
        if len(self.arms) > 1 + (module.cut_arm in self.arms):
            notes.append("'keep' cuts a correct response; questions without one start without a prefix")
        if any(self.answered_again.values()):
            counts = ", ".join(f"{len(uids)} in {arm}" for arm, uids in self.answered_again.items() if uids)
            shared = "; the 'keep' arms share these answers" if len(self.arms) > 2 else ""
            notes.append(
                f"questions without a prefix in an arm are answered again ({counts}; --out lists them){shared}"
            )
        notes += self._notes_on_the_cut() + self._notes_on_seconds()
        return notes

    def _notes_on_the_cut(self) -> list[str]:
        module, settings = self._module, self._module.cache_settings
        if module.cut_arm not in self.arms or settings is None:
            return []
        if settings.initialisation == "lazy":
            return [f"{module.cut_arm}: the first visit after one without a prefix, which fills the cache"]
        notes = [f"{module.cut_arm}: the first visit, with a cache filled from the answers without a prefix"]
        if settings.initial_samples > module.samples:
            notes.append(
                f"a run fills it with the best of {settings.initial_samples} answers, here of {module.samples}"
            )
        if settings.initial_sampling not in (None, module.sampling):
            notes.append("a run fills it with answers drawn by cache.initial_sampling, here by model.sampling")
        return notes

    def _notes_on_seconds(self) -> list[str]:
        iteration, found = self.iteration, self._found
        notes = []
        if found.update_seconds:
            arms = self.arms.values()
            seconds = ", ".join(f"{arm.name} {arm.update_seconds:.1f}" for arm in arms)
            old = ""
            if any(arm.old_logprobs_seconds for arm in arms):
                of_arms = ", ".join(f"{arm.name} {arm.old_logprobs_seconds:.1f}" for arm in arms)
                old = f"old log-probs of all groups ({of_arms}), "
            notes.append(
                f"seconds: decoding, grading, {old}and forward and backward passes without an optimizer step, of which "
                f"at most {TIMED_GROUPS} groups were timed ({seconds}); syncs are left out"
            )
        else:
            notes.append(
                "seconds: decoding and grading; the update is not measured with this strategy, because its gradients "
                "need a training run"
            )
        if iteration.ranks > 1:
            notes.append(
                f"{iteration.ranks} ranks share the questions: seconds are their mean, and an iteration waits for the "
                "slowest"
            )
        if iteration.drops_groups:
            notes.append("model.dynamic_sampling: an update waits for enough groups that teach, iteration by iteration")
        return notes

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values, with the answers that it was computed from."""
        module, found = self._module, self._found
        return {
            "questions": len({row.uid for row in found.answers}),
            "training_questions": module.training_questions,
            "samples": module.samples,
            "seed": run_seed(),
            "iteration": asdict(self.iteration),
            "questions_with_own_correct_response": len(found.own),
            "questions_with_trace": len(found.traced),
            "success": as_dict(self.arms[NO_PREFIX].success),
            "arms": [arm.as_dict(self.iteration) for arm in self.arms.values()],
            "answered_again": self.answered_again,
            "unused_cut": self.unused_cut,
            "advice": self.verdict.advice.value,
            "sentences": list(self.verdict.sentences),
            "near_a_limit": self.verdict.is_near_a_limit,
            "answers": [asdict(row) for row in found.answers],
        }

    def write(self, path: str) -> None:
        """Write the report as a JSON file."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")


def _interval(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:,.{digits}f} [{estimate.low:,.{digits}f}, {estimate.high:,.{digits}f}]"
