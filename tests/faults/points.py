"""Where the kill matrix kills a run: points of all phases, each a call of a function of the real path."""

from __future__ import annotations

from tests.faults.kill import Fault

_FILLING = "rpo_lightning.callbacks.cache_filling:CacheFilling"
_CACHE_FILE = "rpo_lightning.callbacks.experience_cache:write_cache"
_MODULE = "rpo_lightning.module:RPOModule"

_ENGINE = "rpo_lightning.rollout.transformers.engine:TransformersEngine"
_VLLM_ENGINE = "rpo_lightning.rollout.vllm.engine:VLLMEngine"
_VLLM_STEP = "vllm.v1.engine.llm_engine:LLMEngine.step"
_VLLM_LOAD = "rpo_lightning.rollout.vllm.platform:load_weights"

# By phase. The micro run fills 4 batches and makes 4 iterations of 2 updates, each with a checkpoint and its copy.
POINTS: dict[str, dict[str, Fault]] = {
    "filling": {
        "before the first batch": Fault(f"{_FILLING}._round", 1),
        "before the first save": Fault(_CACHE_FILE, 1),
        "in the first save": Fault("pyarrow.parquet:ParquetWriter.write_batch", 1, "after"),
        "before a save takes its name": Fault("rpo_lightning.core.files:put_on_disk", 1, "after"),
        "after the first save": Fault(_CACHE_FILE, 1, "after"),
        "in the third batch": Fault(f"{_ENGINE}.generate", 3, "after"),
        "in the grading of the third batch": Fault("rpo_lightning.rewards.grading:Grading.finish", 3),
        "in the third save": Fault("pyarrow.parquet:ParquetWriter.write_batch", 3),
        "after the last batch": Fault(_CACHE_FILE, 4, "after"),
        "when it is complete": Fault(_CACHE_FILE, 5, "after"),
    },
    "sampling": {
        "before the first rollout": Fault(f"{_ENGINE}.generate", 5),
        "after the first rollout": Fault(f"{_ENGINE}.generate", 5, "after"),
        "while it decodes": Fault("rpo_lightning.rollout.transformers.sampling:_pick", 50),
        "before the third rollout": Fault(f"{_MODULE}.training_step", 3),
        "after a weight sync": Fault(f"{_ENGINE}._copy_weights", 3, "after"),
    },
    "grading": {
        "before a verdict is asked for": Fault("rpo_lightning.rewards.grading:Grading.submit", 34),
        "while verdicts are computed": Fault("rpo_lightning.rewards.pool:GradingPool.collect", 12),
        "after grading": Fault("rpo_lightning.rewards.grading:Grading.finish", 6, "after"),
    },
    "training": {
        "before old log-probs": Fault("rpo_lightning.update.loss:PolicyLoss.store_old_logprobs", 2),
        "before a backward pass": Fault("rpo_lightning.update.loss:PolicyLoss.backward", 4),
        "after a backward pass": Fault("rpo_lightning.update.loss:PolicyLoss.backward", 3, "after"),
        "before an optimizer's step": Fault("torch.optim:AdamW.step", 5),
        "between the updates of an iteration": Fault("torch.optim:AdamW.step", 5, "after"),
        "after the updates of an iteration": Fault(f"{_MODULE}.training_step", 2, "after"),
        "before the cache is refreshed": Fault("rpo_lightning.cache.prefixes:CachedPrefixes.apply_iteration", 2),
        "while the cache is refreshed": Fault("rpo_lightning.cache.prefixes:CachedPrefixes.apply", 4),
        "after the cache is refreshed": Fault(
            "rpo_lightning.cache.prefixes:CachedPrefixes.apply_iteration", 2, "after"
        ),
    },
    "logs": {
        "before completions are logged": Fault("rpo_lightning.callbacks.completions:CompletionsCallback._rows", 3),
        "while metrics are written": Fault("rpo_lightning.callbacks.whole_logs:WholeMetrics.save", 3),
        "after metrics are written": Fault("rpo_lightning.callbacks.whole_logs:WholeMetrics.save", 4, "after"),
    },
    "checkpoint": {
        "before the first is written": Fault("torch:save", 1),
        "after the first is written": Fault("torch:save", 1, "after"),
        "before its copy takes its name": Fault("torch:save", 2, "after"),
        "after the first and its copy": Fault(
            "rpo_lightning.callbacks.weight_sync:WeightSyncCallback.on_train_batch_start", 2
        ),
        "while the second replaces the first": Fault("torch:save", 4),
        "before the first is removed": Fault(
            "rpo_lightning.policy.parallel.checkpoint_files:WholeCheckpointIO.remove_checkpoint", 1
        ),
        "after the first is removed": Fault(
            "rpo_lightning.policy.parallel.checkpoint_files:WholeCheckpointIO.remove_checkpoint", 1, "after"
        ),
        "while its state is collected": Fault("rpo_lightning.module:gathered_state", 4),
    },
    "validation": {
        "before its first batch": Fault(f"{_MODULE}.validation_step", 1),
        "after its first batch": Fault(f"{_MODULE}.validation_step", 1, "after"),
        "when it has ended": Fault(f"{_MODULE}.on_validation_epoch_end", 1, "after"),
    },
    "export": {
        "before an export": Fault(f"{_MODULE}.save_pretrained", 1),
        "in an export": Fault("rpo_lightning.policy.export:_save_unwrapped", 1, "after"),
        "in the last export": Fault("rpo_lightning.policy.export:_save_unwrapped", 3),
    },
    "end": {
        "before the last cache is written": Fault(_CACHE_FILE, 6),
        "in the last validation": Fault(f"{_MODULE}.validation_step", 3),
        "before the summary": Fault("rpo_lightning.callbacks.run_summary:RunSummaryCallback.on_fit_end", 1),
    },
}

# Those that `make test` has time for.
FEW = [
    ("filling", "in the third batch"),
    ("training", "between the updates of an iteration"),
    ("checkpoint", "before its copy takes its name"),
]

# Kills of a run, and of the runs that resume it.
TWICE = {
    "filling, filling, training": [
        POINTS["filling"]["in the third batch"],
        Fault(f"{_FILLING}._round", 1, "after"),
        Fault("torch.optim:AdamW.step", 1),
    ],
    "checkpoint, validation, end": [
        POINTS["checkpoint"]["while the second replaces the first"],
        Fault(f"{_MODULE}.validation_step", 1),
        Fault("rpo_lightning.policy.export:_save_unwrapped", 2),
    ],
}

# With rollouts on vLLM. The run makes 40 steps of vLLM to fill the cache, 14 in the first two iterations, 20 in the
# first validation, and 11 in the other two iterations. The first step of a rollout is its prefill.
VLLM_POINTS: dict[str, dict[str, Fault]] = {
    "filling": {
        "when the engine has started": Fault(f"{_VLLM_ENGINE}._start", 1, "after"),
        "after the prefill of the third batch": Fault(_VLLM_STEP, 21, "after"),
        "while the third batch is decoded": Fault(_VLLM_STEP, 25),
        "after the last batch": Fault(f"{_VLLM_ENGINE}.generate", 4, "after"),
    },
    "sampling": {
        "before the first rollout": Fault(f"{_VLLM_ENGINE}.generate", 5),
        "after the prefill of the third rollout": Fault(_VLLM_STEP, 75, "after"),
        "while the third rollout is decoded": Fault(_VLLM_STEP, 78),
    },
    "sync": {
        "before the third": Fault(_VLLM_LOAD, 3),
        "after the third, before the prefix cache is emptied": Fault(_VLLM_LOAD, 3, "after"),
        "after the last": Fault(f"{_VLLM_ENGINE}._copy_weights", 5, "after"),
    },
    "training": {
        "before a backward pass": Fault("rpo_lightning.update.loss:PolicyLoss.backward", 4),
        "between the updates of an iteration": Fault("torch.optim:AdamW.step", 5, "after"),
    },
    "checkpoint": {
        "before its copy takes its name": Fault("torch:save", 2, "after"),
        "while the second replaces the first": Fault("torch:save", 4),
    },
    "validation": {
        "while it decodes": Fault(_VLLM_STEP, 60),
        "while the last one decodes": Fault(_VLLM_STEP, 100),
    },
}
VLLM_TWICE = {
    "filling, sampling, checkpoint": [
        VLLM_POINTS["filling"]["while the third batch is decoded"],
        Fault(_VLLM_STEP, 28),
        Fault("torch:save", 2),
    ],
}
