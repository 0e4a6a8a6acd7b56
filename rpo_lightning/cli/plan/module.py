"""The module of ``rpo-lightning plan``: samples every arm with the config's engine and times updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rpo_lightning.cache.cache import ExperienceCache
from rpo_lightning.cache.prefixes import CachedPrefixes
from rpo_lightning.callbacks import ExperienceCacheCallback
from rpo_lightning.callbacks.answer_progress import AnswerBar
from rpo_lightning.cli.plan.arms import KeptShares, first_members, initialise
from rpo_lightning.cli.plan.estimates import NO_PREFIX, Answers, UpdateSeconds
from rpo_lightning.cli.plan.settings import PlanSettings
from rpo_lightning.cli.plan.update import can_time, seconds_per_response
from rpo_lightning.core.ranks import gather_rows
from rpo_lightning.core.seeds import SeedPurpose, derive_generator, derive_seed
from rpo_lightning.core.types import Batch, Group, Prompt, RolloutRequest, full_path_request
from rpo_lightning.evaluation.module import require_requests
from rpo_lightning.module import RPOModule
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint

# Tokens of the answer that is sampled only to start the engine and the graders.
_FIRST_TOKENS = 16


@dataclass(frozen=True)
class Sampled:
    """A sampled group, and its share of the seconds that its batch took to decode and grade."""

    group: Group
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What was sampled, over all ranks.

    Attributes:
        answers: The answers of every arm.
        own: Questions of the sample with a correct answer without a prefix.
        traced: Those with a correct response from elsewhere.
        update_seconds: Seconds of the update for each response in each arm; empty if not measured.
    """

    answers: list[Answers]
    own: frozenset[str]
    traced: frozenset[str]
    update_seconds: dict[str, UpdateSeconds]


class PlanModule(RPOModule):
    """Answers a sample of the training questions in every arm.

    ``predict_step`` answers them without a prefix, and the other arms follow. The policy does not change.

    Attributes:
        settings: The command's arguments.
        cache_settings: The config's cache; ``None`` without one.
        training_questions: How many training questions there are.
        found: What was sampled, when all is done.
    """

    settings: PlanSettings
    cache_settings: ExperienceCacheCallback | None = None
    training_questions = 0
    found: Plan | None = None

    def setup(self, stage: str) -> None:
        """Draw the questions of the sample."""
        super().setup(stage)
        self._plain: list[list[Sampled]] = []
        self._rows: list[Answers] = []
        self._calls = 0
        prompts = self._data.prompts
        prompts["train"] = prompts["predict"]  # a cache file is compared with all of them
        self.training_questions = len(prompts["train"])
        order = derive_generator(SeedPurpose.EVALUATION, 0).permutation(self.training_questions)
        prompts["predict"] = [prompts["train"][i] for i in order[: self.settings.questions]]
        self._start = self._starting_prefixes()  # before anything is sampled: the cache may be refused

    @property
    def samples(self) -> int:
        """Answers to each question in each arm."""
        return self.settings.samples_for(self.group_size)

    @property
    def cut_arm(self) -> str | None:
        """Name of the arm of the config's cut."""
        return None if self.cache_settings is None else f"cut: {type(self.cache_settings.cut).__name__}"

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # -- sampling --------------------------------------------------------------------------------

    def on_predict_epoch_start(self) -> None:
        """Start the engine and the graders: that is no part of an iteration."""
        prompt = self._data.prompts["predict"][0]
        self._sample([full_path_request(prompt, min(_FIRST_TOKENS, self.max_response_tokens))])
        self.decoded_tokens = 0

    def predict_step(self, requests: Batch[RolloutRequest], batch_idx: int) -> list[dict[str, Any]]:
        """Answer questions without a prefix."""
        require_requests(requests)
        self._plain.append(self._sample(list(requests)))
        self._note(NO_PREFIX, self._plain[-1])
        return []

    def on_predict_epoch_end(self) -> None:
        """Answer the same questions in the other arms, time updates, and collect what all ranks have; a collective."""
        plain = [sampled.group for batch in self._plain for sampled in batch]
        start = self._start
        traces = ExperienceCache(tokenizer_fingerprint(self.tokenizer)) if start is None else start.cache
        shares = KeptShares(traces, plain, self.max_response_tokens, None if start is None else start.steps)
        own, traced = zip(*self.ranks.gather((shares.own, shares.traced)), strict=True)
        groups = {NO_PREFIX: plain}
        with self.trainer.precision_plugin.train_step_context():
            if any(own) or any(traced):
                again: dict[str, Sampled] = {}
                for share in self.settings.kept_shares:
                    arm = f"keep {share:g}"
                    groups[arm] = self._answer_again(arm, shares.cut_at(share).request, again)
            if self.cut_arm is not None and start is not None:
                groups[self.cut_arm] = self._answer_with_cut(self.cut_arm, start)
        rows = gather_rows([asdict(row) for row in self._rows], ("arm", "uid"))
        answers = [Answers(**row) for row in rows]
        self.found = Plan(answers, frozenset().union(*own), frozenset().union(*traced), self._timed(groups))

    def _answer_with_cut(self, arm: str, prefixes: CachedPrefixes) -> list[Group]:
        """Answer with the config's cut, which learns from one iteration after the other, as in a run."""
        assert self.cache_settings is not None
        plain = [[sampled.group for sampled in batch] for batch in self._plain]
        initialise(prefixes, self.cache_settings, plain, self.group_size, self.ranks)
        cached = any(prefixes.cache.has_anchor(g.request.prompt.uid) for batch in plain for g in batch)
        if not any(self.ranks.gather(cached)):
            return []

        def learn_from(groups: Sequence[Group]) -> None:
            prefixes.learn([first_members(group, self.group_size) for group in groups], self.ranks)

        return self._answer_again(arm, prefixes.request, learn_from=learn_from)

    def _answer_again(
        self,
        arm: str,
        request: Callable[[Prompt], RolloutRequest],
        again: dict[str, Sampled] | None = None,
        learn_from: Callable[[Sequence[Group]], None] = lambda groups: None,
    ) -> list[Group]:
        """Answer all questions in an arm.

        Args:
            arm: Its name.
            request: Gives a question its prefix.
            again: Second answers without a prefix by question, which arms share; ``None`` not to share. The answers of
                the first arm cannot be reused where they decide which questions have no prefix.
            learn_from: Called with the groups of each batch.
        """
        bar = AnswerBar(f"plan, {arm}", sum(len(batch) for batch in self._plain), self.trainer.is_global_zero)
        found: list[Group] = []
        shared = {} if again is None else again
        for batch in self._plain:
            requests = [request(sampled.group.request.prompt) for sampled in batch]
            new = iter(self._sample([r for r in requests if r.prefix_ids or r.prompt.uid not in shared]))
            sampled = [
                next(new) if r.prefix_ids or r.prompt.uid not in shared else shared[r.prompt.uid] for r in requests
            ]
            if again is not None:
                again.update({s.group.request.prompt.uid: s for s in sampled if not s.group.request.prefix_ids})
            self._note(arm, sampled)
            found += [s.group for s in sampled]
            learn_from([s.group for s in sampled])
            bar.update(len(batch), self.decoded_tokens)
        bar.close()
        return found

    def _sample(self, requests: list[RolloutRequest]) -> list[Sampled]:
        """Decode and grade a batch. On several ranks all of them must call it, with requests or without."""
        if not requests and self.ranks.size == 1:
            return []
        self._calls += 1
        self.timer.take()
        seed = derive_seed(SeedPurpose.EVALUATION, self.global_rank, self._calls)
        groups = self.roll_out(requests, self.samples, self.sampling, seed)
        phases = self.timer.take()
        seconds = sum(phases.get(phase, 0.0) for phase in ("prefill", "decode", "reward"))
        tokens = [sum(len(c.token_ids) for c in group.completions) for group in groups]
        return [Sampled(group, seconds * n / sum(tokens)) for group, n in zip(groups, tokens, strict=True)]

    def _note(self, arm: str, sampled: Sequence[Sampled]) -> None:
        for s in sampled:
            request = s.group.request
            self._rows.append(
                Answers(
                    arm=arm,
                    uid=request.prompt.uid,
                    correct=tuple(sample.is_correct for sample in s.group.samples),
                    tokens=tuple(len(c.token_ids) for c in s.group.completions),
                    prefix_tokens=len(request.prefix_ids),
                    cached_tokens=request.cached_length,
                    seconds=s.seconds,
                )
            )

    def _timed(self, groups: dict[str, list[Group]]) -> dict[str, UpdateSeconds]:
        if not can_time(self):
            return {}
        assert self._loss is not None
        self.engine.sleep()
        return {arm: seconds_per_response(self, self._loss, g) for arm, g in groups.items() if g}

    def _starting_prefixes(self) -> CachedPrefixes | None:
        """What a run with the config's cache would start from; ``None`` without one. Reads the file of a cache."""
        if self.cache_settings is None:
            return None
        return self.cache_settings.prefixes_of(self.cache_settings.starting_cache(self.trainer, self, self._data), self)
