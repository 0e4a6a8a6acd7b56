"""What the estimates of a plan speak for, by rules.

In these rules p is the success rate without a prefix, averaged over the questions. The rules are tried in this order,
and the first that fits decides. ``docs/should_i_use_rpo.md`` has the sources. What is called a trial below has one or
two seeds.

1. **p < 0.05 and there are correct traces: imitate first.** In ``benchmarks/hard_questions.py`` 48 supervised updates
   on traces in the policy's own style brought an accuracy of 0.04 to 0.61, without decoding. The full path brought it
   to 0.13, prefixes of the same traces to about the same. Traces in a style that the policy has never written made it
   worse, so what comes out is to be measured. Publications in which prefixes win start where imitation has failed or
   has been done (2601.18795, 2601.18779, 2506.18110).
2. **p < 0.05, no traces, and hardly any full-path group teaches: neither.** There is next to nothing to tell apart or
   to keep. In a trial at 0.02 with chains of 24 operations a million tokens changed nothing. Where a tenth of the
   groups teaches, rule 4 applies: at 0.04 with chains of 12 operations four groups in ten did, and the policy learnt.
3. **p > 0.8: the full path, on harder questions.** Many groups are right as a whole, and a right prefix makes still
   more of them so. Prefixes of wrong answers are published for this regime (2601.20829); in our trials they gave groups
   that were wrong as a whole.
4. **p < 0.2, or hardly any full-path group teaches: what teaches more for each decoded token.** At 0.07 and at 0.04
   cuts led to half success ended ahead of the full path (``benchmarks/hard_questions.py``). It must be clear: in 97.5 %
   of the bootstrap's resamples. The config's cut goes first, and a fixed share wins only if it is clearly better than
   that. If nothing is clear, the full path.
5. **Otherwise: the full path.** With p of 0.37 to 0.63 no cut had a lead per decoded token that lasted, whatever share
   of its groups taught. Cuts make iterations cheaper, which is told in the second sentence.

The limits 0.05 and 0.2 lie between what was tried: 0.02, 0.04, 0.07, 0.27 and 0.36. The limit 0.8 is a choice: with
groups of 8 at p = 0.8 a sixth of the groups are right as a whole if all questions are equally hard, and more if not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rpo_lightning.cli.plan.estimates import ArmEstimate

HARDLY_EVER = 0.05
NOW_AND_THEN = 0.2
MOSTLY = 0.8
# Share of informative groups below which the full path teaches too little.
TOO_FEW = 0.1
PAGE = "docs/should_i_use_rpo.md"


class Advice(Enum):
    """What a plan advises."""

    FULL_PATH = "full path"
    THIS_CUT = "this cut"
    OTHER_SHARE = "another share"
    SUPERVISED_FIRST = "supervised training on traces first"
    NEITHER = "neither"


@dataclass(frozen=True)
class Verdict:
    """The advice, in two sentences.

    Attributes:
        advice: What to do.
        sentences: What to do and why; what else to know.
        is_near_a_limit: Whether the interval of the success rate holds a limit between two rules.
    """

    advice: Advice
    sentences: tuple[str, str]
    is_near_a_limit: bool


def judge(plain: ArmEstimate, shares: Sequence[ArmEstimate], cut: ArmEstimate | None, traced: int) -> Verdict:
    """Apply the rules.

    Args:
        plain: The arm without a prefix.
        shares: The arms that keep a fixed share.
        cut: The arm of the config's cut; ``None`` without one.
        traced: Questions of the sample with a correct response from elsewhere.
    """
    p = plain.success
    advice, sentences = _decide(plain, shares, cut, traced)
    near = any(p.low < limit < p.high for limit in (HARDLY_EVER, NOW_AND_THEN, MOSTLY))
    return Verdict(advice, sentences, near)


def _decide(
    plain: ArmEstimate, shares: Sequence[ArmEstimate], cut: ArmEstimate | None, traced: int
) -> tuple[Advice, tuple[str, str]]:
    p, teaching = plain.success.value, plain.informative.value
    solved = f"the policy solves an estimated {p:.2f} of the questions without a prefix"
    if p < HARDLY_EVER and traced:
        return Advice.SUPERVISED_FIRST, (
            f"We would train on the traces with supervision first: {solved}, and there are correct traces for {traced} "
            f"of {plain.questions} questions.",
            _after_imitation(shares, cut),
        )
    if p < HARDLY_EVER and teaching < TOO_FEW:
        return Advice.NEITHER, (
            f"We would start neither the full path nor RPO: {solved}, and only {teaching:.2f} of the groups teach, too "
            f"few to learn from ({PAGE}).",
            "Look for correct traces (other solutions, another model's answers, or many more of its own with "
            "'rpo-lightning cache build') or for easier questions, and plan again.",
        )
    if p > MOSTLY:
        return Advice.FULL_PATH, (
            f"We would take the full path, on harder questions if there are any: {solved}, and right prefixes would "
            "make still more groups all right.",
            f"An estimated {teaching:.2f} of its groups teach, and model.dynamic_sampling leaves the others out of the "
            "update.",
        )
    if p < NOW_AND_THEN or teaching < TOO_FEW:
        better = _clearly_better(plain, shares, cut)
        if better is not None:
            return _with_prefixes(plain, better, cut, solved)
        return Advice.FULL_PATH, (
            f"We would take the full path: {solved}, and no prefix of this sample clearly has more informative groups "
            "for each decoded token.",
            f"An estimated {teaching:.2f} of its groups teach; more questions (--questions) make differences clearer.",
        )
    return Advice.FULL_PATH, (
        f"We would take the full path: {solved}, and where a policy solves that many, no cut has kept a lead in "
        f"accuracy per decoded token so far ({PAGE}).",
        _price(plain, cut),
    )


def _clearly_better(plain: ArmEstimate, shares: Sequence[ArmEstimate], cut: ArmEstimate | None) -> ArmEstimate | None:
    """The arm that clearly teaches more per token than the full path: the cut, unless a share clearly beats it."""
    best = cut if cut is not None and cut.teaches_more_than(plain) else None
    for share in shares:
        if share.teaches_more_than(best or plain):
            best = share
    return best


def _with_prefixes(
    plain: ArmEstimate, better: ArmEstimate, cut: ArmEstimate | None, solved: str
) -> tuple[Advice, tuple[str, str]]:
    counts = (
        f"an estimated {better.informative.value:.2f} of its groups teach, {plain.informative.value:.2f} of the full "
        f"path's, with {better.tokens.value / plain.tokens.value:.2f} times the decoded tokens"
    )
    if better is cut:
        return Advice.THIS_CUT, (
            f"We would train with this cut: {solved}, and {counts}.",
            "Keep a tenth or more of the visits without a prefix (cache.cut.plain_share), and judge it by accuracy "
            "without one.",
        )
    low, high = max(better.kept_share - 0.1, 0.0), min(better.kept_share + 0.1, 0.95)
    return Advice.OTHER_SHARE, (
        f"We would keep another share of the responses, about {better.kept_share:.2f}: {solved}, and {counts}.",
        f"TargetSuccessCut looks for that share during the run, and AnchoredCut with low={low:.2f} and high={high:.2f} "
        "keeps it fixed.",
    )


def _after_imitation(shares: Sequence[ArmEstimate], cut: ArmEstimate | None) -> str:
    arms = [*shares, *([cut] if cut is not None else [])]
    best = max(arms, key=lambda arm: arm.informative.value, default=None)
    if best is None or best.informative.value < TOO_FEW:
        return "Then plan again: today hardly any group would teach after a prefix of these traces either."
    return (
        f"Then plan again: if imitation does not suffice, prefixes can help, and {best.informative.value:.2f} of the "
        f"groups would teach today with '{best.name}'."
    )


def _price(plain: ArmEstimate, cut: ArmEstimate | None) -> str:
    if cut is None:
        return f"An estimated {plain.informative.value:.2f} of its groups teach."
    return (
        f"An iteration with this cut decodes an estimated {cut.tokens.value / plain.tokens.value:.2f} times the tokens "
        f"and {cut.informative.value:.2f} of its groups teach ({plain.informative.value:.2f} on the full path), so it "
        "is worth trying where that price matters more than final accuracy."
    )
