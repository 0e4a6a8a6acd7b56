"""PolicyModule: a policy with its rollout engine and grader. It loads, rolls out and saves the policy.

``EvaluationModule`` adds evaluation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from rpo_lightning.core.errors import ConfigurationError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.seeds import run_seed
from rpo_lightning.core.timing import PhaseTimer
from rpo_lightning.core.types import Group, RolloutRequest
from rpo_lightning.policy.elementwise.choice import ElementwiseKernels, require_choice, use_elementwise_kernels
from rpo_lightning.policy.export import export_policy
from rpo_lightning.policy.limits import require_known_tokens, require_positions
from rpo_lightning.policy.load import (
    load_configuration,
    load_outline,
    load_policy,
    require_files,
    require_no_lone_adapter,
)
from rpo_lightning.policy.lora import LoRA, has_adapter
from rpo_lightning.policy.parallel.base import Placement
from rpo_lightning.policy.parallel.strategies import placement_for, prepare_strategy
from rpo_lightning.policy.prefix_sharing.flash_choice import (
    FlashAttention,
    require_flash_attention,
    use_flash_attention,
)
from rpo_lightning.policy.tokenizer import load_tokenizer, require_stop
from rpo_lightning.policy.weights import require_plain_names
from rpo_lightning.rewards import Grader
from rpo_lightning.rollout.engine import EngineSetup, RolloutEngine, Sampling
from rpo_lightning.rollout.groups import Scoring, generate

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


class PolicyModule(LightningModule):
    """A policy with its rollout engine and grader.

    Args:
        policy: A Hugging Face folder or hub name, ``embedded:arithmetic-reasoner``, or a model.
        tokenizer: The policy's tokenizer. Needed if ``policy`` is a model.
        grader: Verifier, rewards and the processes they run in.
        engine: Generates responses.
        max_response_tokens: Limit of a whole response, prefix included.
        sampling: How training rollouts are sampled.
        adapter: A low-rank adapter that is trained instead of the policy's weights.
        elementwise_kernels: Which kernels compute norms, gated MLPs and rotary embeddings.
        flash_attention: Which implementation of flash attention computes on a GPU.
        stop: Texts and token ids that end a response besides end-of-sequence tokens.
        trust_remote_code: Whether Python code that comes with the policy may be executed.

    Attributes:
        decoded_tokens: Tokens sampled so far, in training and evaluation.
    """

    def __init__(
        self,
        policy: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        grader: Grader,
        engine: RolloutEngine,
        max_response_tokens: int,
        sampling: Sampling,
        adapter: LoRA | None = None,
        elementwise_kernels: ElementwiseKernels = "auto",
        flash_attention: FlashAttention | None = None,
        stop: Sequence[str | int] = (),
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        require_choice(elementwise_kernels)
        require_flash_attention(flash_attention)
        if isinstance(policy, str):
            require_no_lone_adapter(policy)
            tokenizer = load_tokenizer(policy, trust_remote_code)
        elif tokenizer is None:
            raise ConfigurationError("model.policy is a model, not a name: give model.tokenizer too")
        require_stop(stop, tokenizer)
        engine.require_servable(adapter is not None or has_adapter(policy))
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.policy: PreTrainedModel | None = None
        self.engine = engine
        self.grader = grader
        self.max_response_tokens = max_response_tokens
        self.sampling = sampling
        self.adapter = adapter
        self.elementwise_kernels = elementwise_kernels
        self.flash_attention = flash_attention
        self.trust_remote_code = trust_remote_code
        # With an adapter, a checkpoint holds the adapter only.
        self.strict_loading = adapter is None
        self.ranks = Ranks()
        self.timer = PhaseTimer()
        self.policy_version = 0
        self.decoded_tokens = 0
        self._policy_source = policy

    def require_policy(self) -> None:
        """Look at the policy's files, which are loaded only after the data has been read.

        Raises:
            ConfigurationError: They are no policy, or damaged.
        """
        if isinstance(self._policy_source, str):
            require_files(self._policy_source)
        _ = self.vocabulary_size, self.outline

    @cached_property
    def vocabulary_size(self) -> int:
        """How many token ids the policy knows, from its configuration."""
        return int(self._configuration.vocab_size)

    @cached_property
    def outline(self) -> PreTrainedModel | None:
        """The policy's parameters without numbers, before it is loaded; ``None`` if that cannot be told cheaply.

        Raises:
            ConfigurationError: Its weights are not those that its configuration asks for.
        """
        source = self._policy_source
        return load_outline(source, self.trust_remote_code) if isinstance(source, str) else source

    @cached_property
    def _configuration(self) -> Any:
        """The configuration of the policy's text model."""
        source = self._policy_source
        config = load_configuration(source, self.trust_remote_code) if isinstance(source, str) else source.config
        return config.get_text_config()

    def setup(self, stage: str) -> None:
        """Configure the strategy before the policy is loaded."""
        prepare_strategy(self._trainer)

    def configure_model(self) -> None:
        """Load the policy, place it on the ranks, and attach the engine."""
        self.ranks.follow(None if self._trainer is None else self._trainer.strategy)
        data: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "longest_prompt"):
            require_positions(self._configuration, data.longest_prompt, self.max_response_tokens)
        if self.policy is None:
            placement = placement_for(self._trainer)
            with placement.loading():
                self.policy = self._load()
                require_plain_names(self.policy)
                others = self.prepare_policy(placement)
            for model in (self.policy, *others):
                placement.place(model)
        if hasattr(data, "longest_prompt"):
            require_known_tokens(self.policy, data.highest_token_id)
        self.engine.attach(self.policy, self.tokenizer, self._engine_setup())
        self._let_grader_use_cores()
        self.grader.pool.leave_out(partial(_written_tensors, weakref.ref(self)))

    def written_tensors(self) -> list[Tensor]:
        """Tensors that a run writes to. Grading processes would keep old copies of them."""
        parameters = [] if self.policy is None else [p for p in self.policy.parameters() if p.requires_grad]
        return [*parameters, *(p.grad for p in parameters if p.grad is not None), *self.engine.held_tensors()]

    def _load(self) -> PreTrainedModel:
        source, adapter = self._policy_source, self.adapter
        options = adapter.loading_options() if adapter else {}
        policy = load_policy(source, self.trust_remote_code, **options) if isinstance(source, str) else source
        device = self._device_of(policy)
        use_flash_attention(policy, self.flash_attention, device)
        use_elementwise_kernels(policy, self.elementwise_kernels, device)
        return (adapter.apply(policy) if adapter else policy).train()

    def _device_of(self, policy: PreTrainedModel) -> torch.device:
        """Where the policy computes; it may still be elsewhere."""
        return policy.device if self._trainer is None else self._trainer.strategy.root_device

    @property
    def loaded_policy(self) -> PreTrainedModel:
        """The policy.

        Raises:
            ConfigurationError: It is not loaded.
        """
        if self.policy is None:
            raise ConfigurationError(
                "the policy is not loaded: run the module with a trainer, or call configure_model()"
            )
        return self.policy

    def prepare_policy(self, placement: Placement) -> list[PreTrainedModel]:
        """Prepare the whole policy before ``placement`` spreads it over the ranks; returns further models to place."""
        return []

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert the module, but keep an adapter's dtype: in bf16 its small updates would be lost.

        Lightning converts the whole module with ``precision: bf16-true``, after it has restored a checkpoint's weights.
        """
        trained = [p for p in self.parameters() if p.requires_grad] if self.adapter is not None else []
        before = [p.detach().clone() for p in trained]
        module = super().to(*args, **kwargs)
        for parameter, value in zip(trained, before, strict=True):
            # FSDP2 (DTensor) needs parameters of one dtype.
            if parameter.dtype != value.dtype and not isinstance(parameter, DTensor):
                parameter.data = value.to(parameter.device)
        return module

    def _let_grader_use_cores(self) -> None:
        """Decoding on a GPU takes one thread, on a CPU all of torch's; a collective."""
        device = self._device_of(self.loaded_policy)
        self.grader.pool.use_cores(self.ranks.cores(), torch.get_num_threads() if device.type == "cpu" else 1)

    def _engine_setup(self) -> EngineSetup:
        trainer: Any = self._trainer
        if trainer is None:
            return EngineSetup(seed=run_seed(), stop=self.stop, trust_remote_code=self.trust_remote_code)
        longest = getattr(getattr(trainer, "datamodule", None), "longest_prompt", None)
        return EngineSetup(
            max_length=None if longest is None else longest + self.max_response_tokens,
            dtype=_DTYPES.get(str(trainer.precision).partition("-")[0]),
            seed=run_seed(),
            rank=trainer.global_rank,
            local_rank=trainer.local_rank,
            world_size=trainer.world_size,
            stop=self.stop,
            trust_remote_code=self.trust_remote_code,
        )

    @override
    def teardown(self, stage: str) -> None:
        self.release()

    def release(self) -> None:
        """Stop the grading processes and the engine. The next weight sync starts the engine again."""
        self.grader.pool.close()
        self.engine.shutdown()

    def roll_out(self, requests: Iterable[RolloutRequest], n: int, sampling: Sampling, seed: int) -> list[Group]:
        """Generate and score ``n`` responses to each request. Only grading after decoding counts as ``reward``."""
        requests = list(requests)
        self.engine.require_version(self.policy_version)
        with Scoring(self.grader, self.tokenizer, requests, step=self.global_step) as scoring:
            with self.timer("decode"):
                on_finished = scoring.add if self.grader.pool.beside_decoding else None
                completions = generate(self.engine, requests, n, sampling, seed, on_finished)
            self.timer.move("decode", "prefill", self.engine.prefill_share())
            self.decoded_tokens += sum(len(c.token_ids) for group in completions for c in group)
            with self.timer("reward"):
                return scoring.groups(completions)

    def save_pretrained(self, folder: str | Path, merged: bool = True) -> None:
        """Save the policy as a Hugging Face folder; a collective, rank 0 writes.

        Args:
            folder: Where to save it. Replaces a policy in the folder; other files stay.
            merged: Merge an adapter into the weights. Otherwise only the adapter is saved, as PEFT does.

        Raises:
            ConfigurationError: The policy is not loaded, or the folder holds an adapter where a whole policy would be
                saved, or a whole policy where an adapter would be saved.
        """
        export_policy(self.loaded_policy, self.tokenizer, folder, merged, self.ranks)


def _written_tensors(module: weakref.ref[PolicyModule]) -> list[Tensor]:
    """Those of a module, which a pool that is kept must not keep."""
    found = module()
    return [] if found is None else found.written_tensors()
