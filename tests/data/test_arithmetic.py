"""The embedded task and its reasoner are what they claim to be."""

from __future__ import annotations

import re

import numpy as np

from rpo_lightning.cli.scripts.make_reasoner import Chains
from rpo_lightning.data.arithmetic import ArithmeticChain, ArithmeticProblem, draw_problem
from rpo_lightning.policy.load import resolve_policy
from rpo_lightning.policy.tokenizer import decode
from rpo_lightning.rollout import GenerationRequest, Sampling, TransformersEngine
from tests.conftest import REASONER


def test_a_problem_by_hand():
    problem = ArithmeticProblem(49, (("-", 1), ("*", 9), ("+", 8)))
    assert problem.question == "49a-1b*9c+8="
    assert problem.solution() == "a49-1=48b48*9=32c32+8=40#40"
    assert problem.answer == "40"
    assert problem.solution(left_out=[0]) == "b49*9=41c41+8=49#49"
    assert problem.solution(foreign_steps=3) == "49-1=48=a48*9=32=b32+8=40=c#40"
    assert problem.solution(left_out=[1], foreign_steps=1) == "49-1=48=ac48+8=56#56"


def test_what_a_reasoner_imitates_follows_the_foreign_beginning_that_it_is_given():
    rng = np.random.default_rng(0)
    drawn = [Chains([4, 12], left_out_share=0.2, foreign_share=0.5).draw(rng) for _ in range(400)]
    assert {question.count("=") + sum(question.count(op) for op in "+-*") for question, _, _ in drawn} == {5, 13}
    foreign = [(beginning, rest) for _, beginning, rest in drawn if beginning]
    assert 0.4 < len(foreign) / len(drawn) < 0.6
    for beginning, rest in foreign:
        assert re.fullmatch(r"(\d+[-+*]\d=\d+=[a-z])+", beginning)
        assert re.fullmatch(r"([a-z]\d+[-+*]\d=\d+)*#\d+", rest)


def test_chains_of_thought_are_long_against_the_answer():
    rng = np.random.default_rng(0)
    problems = [draw_problem(rng, 24) for _ in range(200)]
    chains, answers = zip(*(p.solution().split("#") for p in problems), strict=True)
    assert list(answers) == [p.answer for p in problems]
    # At most two digits, after the sign that ends the chain.
    assert {len(answer) for answer in answers} == {1, 2}
    lengths = [len(chain) for chain in chains]
    assert 180 < np.mean(lengths) < 200
    assert np.std(lengths) > 2
    assert min(lengths) > 50 * max(len(f"#{answer}") for answer in answers)


def test_seeds_give_reproducible_and_disjoint_sets():
    one, again, two = (list(ArithmeticChain(200, seed=s).rows()) for s in (1, 1, 2))
    assert one == again
    assert not {r["question"] for r in one} & {r["question"] for r in two}


def test_the_tokenizer_reads_one_character_a_token(tokenizer):
    ids = tokenizer("4a-1=")["input_ids"]
    assert len(ids) == 6
    assert ids[0] == tokenizer.bos_token_id
    assert decode(tokenizer, ids) == "4a-1="


def test_the_shipped_weights_are_small():
    from pathlib import Path

    assert sum(p.stat().st_size for p in Path(resolve_policy(REASONER)).iterdir()) < 5_000_000


def test_the_reasoner_starts_near_a_third_because_it_leaves_out_steps(policy, tokenizer):
    rng = np.random.default_rng(123)
    problems = [draw_problem(rng, 24) for _ in range(256)]
    engine = TransformersEngine(max_sequences=256)
    engine.attach(policy, tokenizer)
    engine.load_weights(policy, version=0)
    outputs = engine.generate(
        [GenerationRequest(tuple(tokenizer(p.question)["input_ids"]), 1, 320) for p in problems], Sampling(), seed=0
    )
    texts = [decode(tokenizer, completion.token_ids) for (completion,) in outputs]
    right = np.mean([t.rpartition("#")[2] == p.answer for t, p in zip(texts, problems, strict=True)])
    steps = np.mean([len(set(re.findall(r"[a-z]", t))) for t in texts])
    assert 0.28 < right < 0.45
    assert 22 < steps < 23.6
