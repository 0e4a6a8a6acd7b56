"""A vLLM engine on a GPU that follows a policy through changes of weights and sleep; run by ``tests/gpu/test_runs.py``.

Arguments: ``tied`` or ``untied`` output head, or ``adapted``, where the engine is given the adapter alone; sleep level.
"""

from __future__ import annotations

import copy
import sys
from typing import cast

import torch

from rpo_lightning.policy.load import load_policy
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.tokenizer import load_tokenizer
from rpo_lightning.rollout import EngineSetup, Sampling, VLLMEngine
from rpo_lightning.rollout.vllm.weight_transfer import SleepLevel, Sync
from tests.conftest import REASONER
from tests.rollout.test_vllm_engine import change, differences, requests, untied


def assert_in_sync(engine, policy, tokenizer):
    """Check that log-probs are as close to fp32 as those of a bf16 policy."""
    asked = requests(tokenizer)
    outputs = engine.generate(asked, Sampling(), seed=3)
    rounded = copy.deepcopy(policy).cpu()
    to_policy, to_exact = differences(asked, outputs, rounded, copy.deepcopy(rounded).float())
    assert to_exact.abs().mean() < 2 * (to_policy - to_exact).abs().mean()


def main() -> None:
    kind, level = sys.argv[1], cast(SleepLevel, int(sys.argv[2]))
    tokenizer, policy = load_tokenizer(REASONER), load_policy(REASONER)
    policy = (untied(policy) if kind == "untied" else policy).bfloat16()
    policy = (LoRA(rank=4, options={"init_lora_weights": False}).apply(policy) if kind == "adapted" else policy).cuda()
    sync: Sync = "adapter" if kind == "adapted" else "merged"
    engine = VLLMEngine(gpu_memory_utilization=0.2, options={"max_num_seqs": 32}, sleep_level=level, sync=sync)
    engine.attach(policy, tokenizer, EngineSetup(max_length=512))
    engine.load_weights(policy, version=0)
    assert_in_sync(engine, policy, tokenizer)
    for version in (1, 2):
        free = torch.cuda.mem_get_info()[0]
        engine.sleep()
        freed = torch.cuda.mem_get_info()[0] - free
        assert (freed > 2**30) == (level > 0), freed
        change(policy.cpu(), seed=version, only_trained=True)
        policy.cuda()
        engine.load_weights(policy, version)
        assert_in_sync(engine, policy, tokenizer)
    engine.sleep()
    assert (engine.weights_version is None) == (level == 2)
    if level == 2:
        engine.load_weights(policy, 3)
    engine.wake()  # the policy has not changed
    assert_in_sync(engine, policy, tokenizer)
    engine.shutdown()


if __name__ == "__main__":
    main()
