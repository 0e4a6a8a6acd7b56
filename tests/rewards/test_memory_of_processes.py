"""Grading processes hold no old copies of what the trainer writes to."""

from __future__ import annotations

import copy
import gc
import os
import random
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from lightning.pytorch import Callback
from transformers import LlamaConfig, LlamaForCausalLM

from rpo_lightning.rewards import GradingPool
from rpo_lightning.rewards.unshared import unshared
from rpo_lightning.rollout import VLLMEngine
from tests.conftest import make_data, make_module, make_trainer

MIB = 2**20


def held(process: psutil.Process) -> float:
    """Memory of a process in MiB; what several share is divided among them."""
    return float(process.memory_full_info().pss) / MIB


def process_id(*_):
    return float(os.getpid())


def sum_of_kept(*_):
    return float(KEPT.sum())


KEPT = torch.ones(4 * MIB)


@pytest.mark.parametrize("dies", [False, True], ids=["first", "successor"])
def test_a_worker_does_not_keep_what_the_trainer_overwrites(dies):
    large = torch.zeros(64 * MIB)  # 256 MiB
    pool = GradingPool(workers=1)
    pool.leave_out(lambda: [large, large[1:]])
    (pid,) = pool.numbers(process_id, [()])
    if dies:
        psutil.Process(int(pid)).kill()
        (pid,) = {*pool.numbers(process_id, [()] * 20)} - {0.0, pid}
    before = held(psutil.Process(int(pid)))
    large.fill_(1.0)
    after = held(psutil.Process(int(pid)))
    # A tensor of the user's own, of 16 MiB, is there.
    assert pool.numbers(sum_of_kept, [()]) == [4.0 * MIB]
    pool.close()
    assert after - before < 32
    assert float(large.sum()) == 64 * MIB


def test_memory_that_was_left_out_can_be_inherited_again():
    large = torch.ones(8 * MIB)
    for _ in range(2):
        with unshared([large]):
            pass
        pid = os.fork()
        if not pid:
            os._exit(int(float(large.sum()) != 8 * MIB))
        assert os.waitpid(pid, 0)[1] == 0


def test_a_pool_that_is_kept_does_not_keep_the_policy():
    pool = GradingPool(workers=1)
    module = make_module(grading=pool)
    module.configure_model()
    pool.start()
    policy = weakref.ref(module.policy)
    del module
    gc.collect()
    assert policy() is None
    assert pool.numbers(sum_of_kept, [()]) == [4.0 * MIB]
    pool.close()


class MadeOfOthers(torch.Tensor):
    """As quantised weights and optimizer states are: without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def test_tensors_without_memory_of_their_own_are_passed_over():
    large = torch.ones(MIB)
    odd = [MadeOfOthers(large), torch.nn.UninitializedParameter(), torch.empty(MIB, device="meta"), torch.empty(0)]
    pool = GradingPool(workers=1)
    pool.leave_out(lambda: odd)
    assert pool.numbers(sum_of_kept, [()]) == [4.0 * MIB]
    pool.close()


FREED = [torch.ones(MIB // 4 + 1000 * number) for number in range(50)]


def frees_and_allocates(*_):
    FREED.clear()
    gc.collect()
    return float(sum(torch.ones(MIB // 4).sum() for _ in range(100)))


def test_a_worker_that_drops_its_references_allocates_elsewhere():
    pool = GradingPool(workers=1)
    pool.leave_out(lambda: list(FREED))
    assert pool.numbers(frees_and_allocates, [()]) == [100 * MIB / 4]
    assert pool.killed == 0
    pool.close()


def random_reward(prompt, response, answer):
    return random.random()


class Held(Callback):
    """Measures the grading processes before every update."""

    def __init__(self, processes):
        self.mib = []
        self.processes = processes

    def on_before_optimizer_step(self, *_):
        children = self.processes.now()
        assert len(children) == 2
        self.mib.append(sum(held(child) for child in children))


@pytest.mark.parametrize("with_vllm", [False, True], ids=["transformers", "vllm"])
def test_the_processes_of_a_run_hold_neither_old_weights_nor_old_states(
    tmp_path: Path, tokenizer, processes, with_vllm
):
    config = LlamaConfig(
        vocab_size=48, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters()) / MIB
    found = Held(processes)
    options = {"max_num_seqs": 8, "block_size": 32, "kv_cache_memory_bytes": 2**27}
    module = make_module(
        policy=copy.deepcopy(policy), tokenizer=tokenizer, rewards=[random_reward], max_response_tokens=8,
        grading=GradingPool(workers=2), **({"engine": VLLMEngine(options=options)} if with_vllm else {}),
    )  # fmt: skip
    make_trainer(tmp_path, callbacks=[found], max_steps=4).fit(module, make_data(batch_size=2))
    assert weights > 100
    # Workers are forked before the first update: old weights, and with vLLM its weights, would be held from then on.
    # On a CPU vLLM packs its weights into memory that no tensor names: two processes hold one copy of that.
    assert max(found.mib) - found.mib[0] < weights * (0.4 if with_vllm else 0.25)
