"""One of two ranks that roll out on vLLM; run by torchrun from ``test_vllm_ranks.py``.

Argument: output folder. For every case of ``CASES``, one after the other, writes this rank's samples, and the largest
difference of the engine's log-probs from the policy's after a change of weights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rpo_lightning.core.seeds import SeedPurpose, derive_seed
from rpo_lightning.policy.lora import LoRA
from rpo_lightning.policy.tokenizer import load_tokenizer
from rpo_lightning.rollout import EngineSetup, GenerationRequest, Sampling, VLLMEngine
from rpo_lightning.rollout.vllm.weight_transfer import Sync

# Tensor-parallel size; ``whole``, ``sharded`` (FSDP2), or ``adapted`` (sharded, and the engine gets the adapter alone).
CASES = [(1, "whole"), (1, "sharded"), (2, "whole"), (2, "adapted")]


def roll_out(size: int, kind: str, rank: int) -> dict[str, Any]:
    """Samples of an engine that has been given changed weights, and how far its log-probs are from the policy's."""
    tokenizer = load_tokenizer("embedded:arithmetic-reasoner")
    torch.manual_seed(0)
    # Two ranks share the four heads.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    policy = LlamaForCausalLM(config).eval()
    policy.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    if kind == "adapted":
        policy = LoRA(rank=4, options={"init_lora_weights": False}).apply(policy)
    if kind != "whole":
        fully_shard(policy, mesh=init_device_mesh("cpu", (2,)))
    sync: Sync = "adapter" if kind == "adapted" else "merged"
    engine = VLLMEngine(tensor_parallel_size=size, sync=sync, options={"max_num_seqs": 16, "block_size": 32})
    engine.attach(policy, tokenizer, EngineSetup(max_length=256, rank=rank, local_rank=rank, world_size=2))
    engine.load_weights(policy, 0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    engine.load_weights(policy, 1)
    # Both ranks have the same questions. The second has one more, unless the policy is sharded.
    requests = [GenerationRequest((5, 6, 7, 8 + i), 3, 20) for i in range(2 + rank if kind == "whole" else 2)]
    outputs = engine.generate(requests, Sampling(), derive_seed(SeedPurpose.TRAINING, rank, 0))
    largest = 0.0
    for request, completions in zip(requests, outputs, strict=True):
        for completion in completions:
            ids = torch.tensor([request.token_ids + completion.token_ids])
            with torch.no_grad():
                logprobs = (
                    policy(ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
                )
            difference = torch.tensor(completion.logprobs) - logprobs[-len(completion.token_ids) :]
            largest = max(largest, difference.abs().max().item())
    tokens = [[c.token_ids for c in completions] for completions in outputs]
    engine.shutdown()
    assert torch.distributed.is_initialized()  # the engine did not make it
    return {"tokens": tokens, "largest": largest}


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    for size, kind in CASES:
        (folder / f"{size}-{kind}-{rank}.json").write_text(json.dumps(roll_out(size, kind, rank)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
