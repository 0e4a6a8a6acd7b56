"""Rewards and verifiers see the whole row of their question, in a run, in an import and on the command line."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch import Callback

from rpo_lightning.cache.parquet import read_cache
from rpo_lightning.callbacks import PredictionsCallback, RunSummaryCallback
from rpo_lightning.cli.main import main
from rpo_lightning.core.errors import DataError, RewardError
from rpo_lightning.core.ranks import Ranks
from rpo_lightning.core.types import Sample
from rpo_lightning.data.arithmetic import ArithmeticChain
from rpo_lightning.data.rows import plain_row
from rpo_lightning.policy.tokenizer import tokenizer_fingerprint
from rpo_lightning.rewards import (
    AccuracyReward,
    ChoiceVerifier,
    ExactMatchVerifier,
    FunctionReward,
    FunctionVerifier,
    Grader,
    GradingPool,
    MathVerifier,
    Reward,
    TextVerifier,
    UniformRandomReward,
    VerifierByColumn,
)
from rpo_lightning.update.advantages import GDPO
from rpo_lightning.update.dynamic_sampling import DynamicSampling
from rpo_lightning.update.metrics import IterationRecord, term_sums
from tests.conftest import make_data, make_group, make_module, make_trainer

KINDS = {"chain": ExactMatchVerifier(), "choice": ChoiceVerifier(), "text": TextVerifier()}
SMALL = ["--config", str(Path(__file__).parents[2] / "configs" / "quickstart.yaml"), "--trainer.accelerator", "cpu"]


def rows(count=6):
    """Problems of three kinds and three levels."""
    gold = {"choice": "(C)", "text": "A word"}
    return [
        {
            **row,
            "answer": gold.get(kind, row["answer"]),
            "kind": kind,
            "level": i % 3,
            "id": f"row-{i}",
            "secret": "unseen",
        }
        for i, (row, kind) in enumerate(zip(ArithmeticChain(count, seed=1).rows(), [*KINDS] * count, strict=False))
    ]


class Seen(Reward):
    """Keeps the samples that it sees."""

    def __init__(self):
        super().__init__()
        self.samples = []

    def score(self, group):
        self.samples += group
        return [0.0] * len(group)


def level_of(response, level):
    return level


async def level_later(prompt, response, answer, **row):
    await asyncio.sleep(0)
    return row["level"] + len(response)


def levels(prompts, completions, level, **columns):
    return [number + len(text) for number, text in zip(level, completions, strict=True)]


def test_a_run_with_a_reward_of_each_signature_and_three_verifiers_chosen_by_a_column(tmp_path):
    seen = Seen()
    unpicklable = FunctionReward(lambda response, level: level or None, name="where_above_zero")
    module = make_module(
        rewards=[seen, level_of, FunctionReward(level_later), levels, unpicklable],
        advantages=GDPO(),
        verifier=VerifierByColumn("kind", dict(KINDS)),
        max_response_tokens=16,
        group_size=2,
        grading=GradingPool(workers=1),
    )
    data = make_data(train=rows(), val="", batch_size=6, uid_column="id")
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert {s.row["kind"] for s in seen.samples} == set(KINDS)
    for sample in seen.samples:
        assert sample.uid == sample.row["id"]
        verdict = KINDS[sample.row["kind"]].verify(sample.prompt, sample.response, sample.answer)
        assert sample.correct == verdict
    log = pd.read_csv(tmp_path / "metrics.csv").iloc[0]
    lengths = [len(s.response) + s.row["level"] for s in seen.samples]
    assert log["reward/level_of"] == 1.0  # the mean of 0, 1 and 2
    assert log["reward/level_later"] == log["reward/levels"] == pytest.approx(np.mean(lengths))
    assert log["reward/where_above_zero"] == 1.5  # the mean of 1 and 2
    totals = [s.row["level"] + 2 * n + s.row["level"] for s, n in zip(seen.samples, lengths, strict=True)]
    assert log["reward/mean"] == pytest.approx(np.mean(totals))
    assert math.isfinite(log["loss/advantage_max"])  # GDPO leaves missing values out


def test_each_kind_of_row_is_judged_and_counted_by_its_verifier():
    verifier = VerifierByColumn("meta.kind", {"math": MathVerifier(), "choice": ChoiceVerifier(), "7": TextVerifier()})
    assert verifier.isolated
    groups = [
        [Sample("q", r, gold, 1, True, row={"meta": {"kind": kind}}) for r in responses]
        for kind, gold, responses in (
            ("math", "\\frac12", ["0.5", "\\boxed{1/2}", "B"]),
            ("choice", "B", ["The answer is (B).", "Answer: C", "\\boxed{B}"]),
            (7, "the end", ["The End!", "end", "0.5"]),
        )
    ]
    grader = Grader(verifier, [AccuracyReward()], GradingPool(workers=1))
    try:
        assert [g.rewards for g in grader.grade(groups)] == [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
        assert grader.finds_answers
        assert grader.answer_classes(groups) == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]
    finally:
        grader.pool.close()
    assert not VerifierByColumn("kind", {"a": TextVerifier(), "b": FunctionVerifier(level_of)}).tells_answers


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"kind": "essay"}, {}, "row 2: no verifier for 'essay' in the column 'kind': name one in VerifierByColumn"),
        ({"kind": None}, {}, "row 2: no value in the column 'kind', which says what verifies a question"),
        (
            {"level": b"1"},
            {"rewards": [level_of]},
            "row 2: no column 'level', which reward 'level_of' takes; it has answer",
        ),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_when_it_is_read(tmp_path, row, settings, message):
    first, second = rows(2)
    module = make_module(**{"verifier": VerifierByColumn("kind", dict(KINDS)), **settings})
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path).fit(module, datamodule=make_data(train=[first, {**second, **row}], val="", batch_size=1))


def test_rows_are_json_and_columns_that_cannot_be_are_left_out_and_told(tmp_path, caplog):
    row = {
        "a": (1, np.float32(0.5)),
        "b": {"c": np.arange(2)},
        "d": date(2025, 1, 2),
        "e": Decimal("1.5"),
        "f": math.nan,
    }
    plain, others = plain_row({**row, "g": b"x", "h": math.inf, "i": [object()], "j": {1: 2}})
    assert plain == {"a": [1, 0.5], "b": {"c": [0, 1]}, "d": "2025-01-02", "e": 1.5, "f": None}
    assert json.loads(json.dumps(plain)) == plain
    assert others == {"g": "bytes", "h": "infinity", "i": "object", "j": "an object with keys of type int"}
    data = make_data(train=[{**r, "image": b"x"} for r in rows(2)])
    module = make_module()
    with caplog.at_level("INFO"):
        prompts = data.read("train", "", module.tokenizer, module.grader.verifier)
    assert "rewards do not see values that are not JSON: 'image' (bytes)" in caplog.text
    assert "image" not in prompts[0].row


def fails_at_two(response, level):
    return 1 / (level - 2)


def test_an_exception_stops_the_run_with_the_id_of_the_row_or_scores_zero_and_is_logged(tmp_path):
    settings = {"max_response_tokens": 8, "group_size": 2, "grading": GradingPool(workers=1)}
    data = {"train": rows(3), "val": "", "batch_size": 3, "uid_column": "id"}
    with pytest.raises(RewardError, match=r"fails_at_two raised ZeroDivisionError: .* \(question row-2\)"):
        make_trainer(tmp_path / "stop").fit(
            make_module(rewards=[fails_at_two], **settings), datamodule=make_data(**data)
        )
    reward = FunctionReward(fails_at_two, on_error="zero")
    make_trainer(tmp_path / "zero", max_steps=1, callbacks=[RunSummaryCallback()]).fit(
        make_module(rewards=[reward], **settings), datamodule=make_data(**data)
    )
    log = pd.read_csv(tmp_path / "zero" / "metrics.csv").iloc[0]
    assert log["reward/grading_failed"] == 2
    assert json.loads((tmp_path / "zero" / "summary.json").read_text())["gradings_failed"] == 2
    assert log["reward/fails_at_two"] == pytest.approx((-0.5 - 1 + 0) / 3)


class SeenError(Exception):
    """Ends a run that has shown what it should."""


class WaitingRows(Callback):
    """Ends the run at its first batch with the rows of the waiting groups."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise SeenError([sample.row for group in pl_module.buffer.groups for sample in group.samples])


def test_checkpoints_and_predictions_hold_no_rows_and_a_resumed_run_finds_them_again(tmp_path):
    settings = {
        "rewards": [UniformRandomReward()],
        "dynamic_sampling": DynamicSampling(max_refills=0, filter="reward"),
        "max_response_tokens": 16,
        "group_size": 2,
    }
    module = make_module(**settings)
    secret = base64.b64encode(bytes(range(256))).decode()
    train = [{**row, "secret": secret} for row in rows(4)]
    data = make_data(train=train, val="", predict=train[:2], batch_size=2)
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[PredictionsCallback()])
    trainer.fit(module, datamodule=data)
    module.buffer.groups += module.groups  # they wait for an update
    trainer.save_checkpoint(tmp_path / "here.ckpt")
    assert secret.encode() not in (tmp_path / "here.ckpt").read_bytes()
    assert module.groups[0].samples[0].row["secret"] == secret
    again = make_trainer(tmp_path / "again", max_steps=2, callbacks=[WaitingRows()])
    data_again = make_data(train=train, val="", batch_size=2)
    with pytest.raises(SeenError) as seen:
        again.fit(make_module(**settings), datamodule=data_again, ckpt_path=str(tmp_path / "here.ckpt"))
    assert seen.value.args[0] == [sample.row for group in module.groups for sample in group.samples]
    (answers,) = trainer.predict(module, datamodule=data)
    assert {"uid", "response", "correct"} <= answers[0].keys()
    assert "row" not in answers[0]


class TwoRanks(Ranks):
    """Two ranks, of which the other has these terms."""

    def __init__(self, other):
        self.other = other

    def gather(self, mine):
        return [mine, self.other]


def test_the_mean_of_a_term_is_over_the_responses_that_it_applies_to_on_all_ranks():
    group = make_group([1.0, 2.0, 3.0])
    group.reward_terms = {"here": [1.0, None, 3.0], "nowhere": [None, None, None]}
    terms = term_sums([group])
    assert terms == {"here": (4.0, 2), "nowhere": (0, 0)}
    other = IterationRecord({}, {}, {}, 3, 0, failed=1, terms={"here": (10.0, 1), "nowhere": (0.0, 0)})
    logged = IterationRecord({}, {}, {}, 3, 0, failed=2, terms=terms).over(TwoRanks(other)).logged()
    assert logged["reward/here"] == pytest.approx(14 / 3)
    assert "reward/nowhere" not in logged
    assert logged["reward/grading_failed"] == 3


CONFIG = """
model:
  rewards:
    - {class_path: AccuracyReward}
    - {class_path: FunctionReward, init_args: {function: of_rows.level, weight: 0.1, on_error: zero}}
  verifier:
    class_path: VerifierByColumn
    init_args:
      column: kind
      verifiers:
        chain: {class_path: ExactMatchVerifier}
        choice: ChoiceVerifier
        text: TextVerifier
"""


def test_a_config_names_verifiers_by_column_and_functions_and_an_import_grades_with_rows(
    tmp_path, monkeypatch, tokenizer
):
    monkeypatch.chdir(tmp_path)
    Path("of_rows.py").write_text("def level(response, level):\n    return 1 / level\n")
    Path("rows.yaml").write_text(CONFIG)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    traces = {"chain": f"#{rows(1)[0]['answer']}", "choice": "c", "text": "wrong"}
    Path("traces.jsonl").write_text("".join(json.dumps({**r, "response": traces[r["kind"]]}) + "\n" for r in rows(3)))
    options = [*SMALL, "--config", "rows.yaml", "--data.train", "train.jsonl", "--data.uid_column", "id"]
    main(["cache", "import", *options, "--path", "traces.jsonl", "--out", "cache.parquet"])
    cache = read_cache("cache.parquet", tokenizer_fingerprint(tokenizer))
    # 0.1 / level, and 1 for a right answer; level 0 cannot be divided by.
    assert [cache.get(f"row-{i}").response.reward for i in range(3)] == pytest.approx([1.0, 1.1, 0.05])
    main(
        ["fit", *options, "--data.batch_size", "3", "--data.val", "train.jsonl", "--trainer.max_steps", "1",
         "--trainer.enable_progress_bar", "false", "--model.group_size", "2", "--model.max_response_tokens", "8",
         "--trainer.logger.name", "rows"]
    )  # fmt: skip
