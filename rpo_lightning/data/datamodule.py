"""The data module: prompts, paired at step time with prefixes from the cache.

The loaders carry nothing but prompts. They are paired with cached prefixes in
``on_before_batch_transfer``, in the main process and when the step begins, since anything earlier
(a worker, a prefetched batch) would see an older cache. Without a cache callback every request takes
the full path, and so does all evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from rpo_lightning.core.errors import ConfigurationError, DataError
from rpo_lightning.core.seeds import run_seed
from rpo_lightning.core.types import Batch, Prompt, RolloutRequest, full_path_request
from rpo_lightning.data.loader import ResumableLoader, batches_processed, own_generator
from rpo_lightning.data.position import TrainingPosition
from rpo_lightning.data.prompts import LoadReport
from rpo_lightning.data.question_sets import Examples, NamedQuestions, PromptSettings, Questions, QuestionSets
from rpo_lightning.data.selection import QuestionSelection, SelectedQuestions, SelectedSampler
from rpo_lightning.data.trainer_settings import require_monitored, require_validations, warn_of_no_training
from rpo_lightning.rewards.base import Reward, Verifier


class RPODataModule(LightningDataModule):
    """Serves rollout requests: prompts with the prefix to start from and a suffix budget.

    The tokenizer, the verifier and the response limit are the module's.

    Args:
        train: Training questions: a ``.jsonl`` or ``.parquet`` file, a Hugging Face data set name, a
            ``DataSource`` or rows. Empty means not set, here and below.
        val: Questions for validation, answered without a prefix; several sets by name are reported one by one.
        test: Questions for ``test``, likewise.
        predict: Questions for ``predict``.
        batch_size: Questions of one iteration, on each rank; a group of responses is sampled for each.
        eval_batch_size: Questions of one evaluation batch.
        max_prompt_tokens: Longer prompts are dropped and counted.
        question_column: Column of the question; ``problem``, ``question``, ``prompt``, ``messages`` or
            ``conversations`` if not given. ``a.b`` is the key ``b`` of the objects in column ``a``.
        answer_column: Column of the gold answer; ``answer``, ``final_answer``, ``solution`` or verl's
            ``reward_model.ground_truth`` if not given.
        uid_column: Column of a stable identifier; a content hash if not given.
        system_prompt: System message of every prompt that does not bring its own.
        use_chat_template: Whether to apply the tokenizer's chat template; by default if it has one.
        chat_template: A Jinja file with a chat template. It becomes the tokenizer's, also in exports; for base models.
        chat_template_kwargs: Variables for the chat template, such as ``{enable_thinking: false}``.
        few_shot: Solved examples between system prompt and question: rows with the texts ``question`` and ``answer``,
            in the forms of ``train``. Each becomes a message of the user and one of the assistant, word for word.
        continue_final_message: Whether a conversation that ends with a message of the assistant is continued by the
            policy; otherwise its row is dropped and counted.
        shuffle: Whether to shuffle the training questions anew each epoch.
        selection: How often an epoch asks each training question; each of them once if not given.
    """

    def __init__(
        self,
        train: Questions = "",
        val: NamedQuestions = "",
        test: NamedQuestions = "",
        predict: Questions = "",
        batch_size: int = 16,
        eval_batch_size: int = 64,
        max_prompt_tokens: int = 1024,
        question_column: str | None = None,
        answer_column: str | None = None,
        uid_column: str | None = None,
        system_prompt: str | None = None,
        use_chat_template: bool | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        few_shot: Examples = "",
        continue_final_message: bool = False,
        shuffle: bool = True,
        selection: QuestionSelection | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ConfigurationError(f"data.{name} must be at least 1, got {value}")
        if selection is not None and not shuffle:
            raise ConfigurationError("data.selection asks questions in an order of its own: drop data.shuffle=false")
        settings = PromptSettings(
            max_prompt_tokens=max_prompt_tokens,
            question_column=question_column,
            answer_column=answer_column,
            uid_column=uid_column,
            system_prompt=system_prompt,
            use_chat_template=use_chat_template,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            few_shot=few_shot,
            continue_final_message=continue_final_message,
        )
        self.sets = QuestionSets({"train": train, "val": val, "test": test, "predict": predict}, settings)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.shuffle = shuffle
        self.selection = selection
        self.make_request: Callable[[Prompt], RolloutRequest] | None = None
        self._position = TrainingPosition()
        self._selected: SelectedQuestions | None = None

    @property
    def sources(self) -> dict[str, NamedQuestions]:
        """What ``train``, ``val``, ``test`` and ``predict`` are read from; what is not read yet may be replaced."""
        return self.sets.sources

    @property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The prompts of the sets that have been read, by split, or split/name where a split has several."""
        return self.sets.prompts

    @property
    def reports(self) -> dict[str, LoadReport]:
        """What was left out of the sets that have been read."""
        return self.sets.reports

    def setup(self, stage: str) -> None:
        """Read and tokenise the questions of a stage."""
        stage = TrainerFn(stage).value
        if stage == TrainerFn.FITTING.value:
            self.make_request = None  # an earlier trainer's cache set it; this one's sets its own after this
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            for name in self.sets.of_split(split) or ([""] if (stage, split) != ("fit", "val") else []):
                self.read(split, name, module.tokenizer, module.grader.verifier, module.grader.rewards)
        if stage == TrainerFn.FITTING.value:
            self._require_a_batch()
            warn_of_no_training(self.trainer)
            require_validations(self.trainer, len(self.train_dataloader()))
            require_monitored(self.trainer, bool(self.sets.of_split("val")))

    def read(
        self,
        split: str,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        verifier: Verifier,
        rewards: Sequence[Reward] = (),
    ) -> list[Prompt]:
        """The prompts of a set, read once for a tokenizer and a verifier.

        Args:
            split: ``train``, ``val``, ``test`` or ``predict``.
            name: Its name, empty where the split has but one set.
            tokenizer: The policy's. Gets the template of ``data.chat_template``.
            verifier: Says which rows and gold answers can be used.
            rewards: Say which rows cannot be used.

        Raises:
            DataError: The set is not given, or cannot be read.
        """
        return self.sets.read(split, name, tokenizer, verifier, rewards)

    def evaluation_names(self, split: str) -> list[str]:
        """Names of the sets of ``val`` or ``test``, in the order of their loaders."""
        return list(self.sets.of_split(split))

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that has been read."""
        return max((len(p.token_ids) for prompts in self.prompts.values() for p in prompts), default=0)

    @property
    def highest_token_id(self) -> int:
        """The largest token id of all prompts that have been read."""
        return max((max(p.token_ids) for prompts in self.prompts.values() for p in prompts if p.token_ids), default=0)

    def state_dict(self) -> dict[str, Any]:
        """Where the run is in its training questions, and what a selection knows of them."""
        state = self._position.state_dict(self._questions_per_iteration(), self.prompts.get("train", []))
        return state if self.selected is None else {**state, "selection": self.selected.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where the checkpoint's run was, if training resumes it."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._position.load_state_dict(state_dict)
            if self.selected is not None and "selection" in state_dict:
                self.selected.load_state_dict(state_dict["selection"])

    @property
    def selected(self) -> SelectedQuestions | None:
        """The training questions as ``data.selection`` asks them; ``None`` without one."""
        prompts = self.prompts.get("train")
        if self.selection is None or prompts is None:
            return None
        if self._selected is None or self._selected.prompts is not prompts:
            assert self.trainer is not None
            module: Any = self.trainer.lightning_module
            self._selected = SelectedQuestions(prompts, self.selection, module.group_size)
        return self._selected

    def adopt_position(self) -> None:
        """Go on where the checkpoint's run stopped; see ``TrainingPosition``."""
        assert self.trainer is not None
        self._position.adopt(self.trainer, self._questions_per_iteration(), self.sets.loaded("train"))

    def _questions_per_iteration(self) -> int:
        assert self.trainer is not None
        return self.batch_size * self.trainer.world_size

    def train_dataloader(self) -> ResumableLoader:
        """Batches of prompts; the last incomplete one is dropped."""
        prompts = self.sets.loaded("train")
        assert self.trainer is not None
        trainer = self.trainer
        sampler: DistributedSampler[Prompt]
        ranks = (trainer.world_size, trainer.global_rank)
        if self.selected is not None:
            sampler = SelectedSampler(self.selected, *ranks)
        else:
            sampler = DistributedSampler(prompts, *ranks, shuffle=self.shuffle, seed=run_seed())  # type: ignore[arg-type]
        return ResumableLoader(
            prompts,
            batches_done=lambda: batches_processed(trainer),
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=Batch,
            generator=own_generator(),
        )

    def _require_a_batch(self) -> None:
        """Check that every rank has questions for an iteration."""
        assert self.trainer is not None
        count, ranks = len(self.sets.loaded("train")), self.trainer.world_size
        most = -(-count // ranks)
        if most < self.batch_size:
            raise DataError(
                f"data.train: {count} training questions on {ranks} rank(s) are fewer than data.batch_size="
                f"{self.batch_size}: set it to {most} or less"
            )

    def val_dataloader(self) -> list[DataLoader[Prompt]]:
        """Batches of validation prompts, a loader a set; none if a training run has nothing to validate on."""
        assert self.trainer is not None
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            return [self._eval_loader("val", name) for name in self.sets.of_split("val") or [""]]
        return [self._eval_loader("val", name) for name in self.sets.of_split("val")]

    def test_dataloader(self) -> list[DataLoader[Prompt]]:
        """Batches of test prompts, a loader a set."""
        return [self._eval_loader("test", name) for name in self.sets.of_split("test") or [""]]

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """Batches of prompts to answer."""
        return self._eval_loader("predict")

    def on_before_batch_transfer(self, batch: Batch[Prompt], dataloader_idx: int) -> Batch[RolloutRequest]:
        """Pair prompts with cached prefixes (training with a cache) or with the full path."""
        assert self.trainer is not None
        trainer = self.trainer
        if trainer.training and self.make_request is not None:
            return Batch([self.make_request(prompt) for prompt in batch])
        module: Any = trainer.lightning_module
        return Batch([full_path_request(prompt, module.max_response_tokens) for prompt in batch])

    def _eval_loader(self, split: str, name: str = "") -> DataLoader[Prompt]:
        """Equally many batches on all ranks, by repeating questions: engines over several ranks need it."""
        assert self.trainer is not None
        prompts: Any = self.sets.loaded(split, name)
        world_size = self.trainer.world_size
        sampler: DistributedSampler[Prompt] = DistributedSampler(
            prompts, world_size, self.trainer.global_rank, shuffle=False
        )
        return DataLoader(
            prompts,
            batch_size=self.eval_batch_size,
            sampler=sampler if world_size > 1 else None,
            collate_fn=Batch,
            generator=own_generator(),
        )
