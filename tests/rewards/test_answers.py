r"""How answers are read and compared: one reading for both sides, over forms, published sets and hostile texts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rpo_lightning.data.gold_answers import gold_answer
from rpo_lightning.rewards import MathVerifier
from rpo_lightning.rewards.answers.equality import equal
from rpo_lightning.rewards.answers.extraction import extract, final_part, marked_answer

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
PAIRS = [json.loads(line) for line in (Path(__file__).parent / "answer_pairs.jsonl").read_text().splitlines()]
VERIFIER = MathVerifier()
# Small stand-ins for published sets, for places where these are not at hand.
OWN = [
    "204", "073", "-\\frac{2}{3}", "2.4e17", "6e-5", "7 \\times 10^{9}", "\\sqrt{3}", "$2^{1009}$", "(2, 5)", "0,1",
    "\\{1,2,3\\}",
    "x=5", "y = 2x+3", "14 dollars", "14 (pears)", "18 m/s", "east", "D", "(C) 12", "[0,1)", "1010_2", "\\pm 2", "\\$5",
    "45^\\circ", "25\\%", "14:30", "5:3", "1,234", "\\frac{n(n+1)}{2}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
    "3 (feet)", "16 (years old)", "\\text{June 20}", "0.00006", "1/2",
]  # fmt: skip


def verdict(gold, response):
    return VERIFIER.verify("", response, gold_answer(gold))


@pytest.mark.parametrize("gold", sorted({p["gold"] for p in PAIRS}))
def test_forms_of_an_answer_have_the_verdict_they_should(gold):
    wrong = [
        (p["given"], "should be " + ("right" if p["right"] else "wrong"))
        for p in PAIRS
        if p["gold"] == gold and bool(verdict(gold, f"The answer is \\boxed{{{p['given']}}}.")) != p["right"]
    ]
    assert not wrong


def golds_at_hand():
    found = {"own": OWN}
    for name in ("aime24", "amc23", "olympiadbench", "gsm8k_test"):
        path = DATA / f"{name}.jsonl"
        if path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            key = "final_answer" if "final_answer" in rows[0] else "answer"
            found[name] = [str(gold_answer(row[key])) for row in rows]
    return found


GOLDS = golds_at_hand()


@pytest.mark.parametrize("name", GOLDS)
def test_every_gold_equals_itself_boxed_in_an_answer_block_and_plain(name):
    for gold in GOLDS[name]:
        inside = gold.replace("$", "") if gold.count("$") % 2 == 0 else gold
        for response in (
            f"So the answer is $\\boxed{{{inside}}}$.",
            f"<think>perhaps \\boxed{{12345}}</think>\n<answer>{gold}</answer>",
            f"<think>no</think><answer>\\boxed{{{inside}}}</answer>",
            gold,
        ):
            assert verdict(gold, response) == 1.0, (gold, response)


@pytest.mark.parametrize("name", GOLDS)
def test_a_gold_changed_in_one_digit_is_wrong(name):
    for gold in GOLDS[name]:
        digits = [match.start() for match in re.finditer(r"\d", gold)]
        for at in digits[:4]:
            other = gold[:at] + str((int(gold[at]) + 1) % 10) + gold[at + 1 :]
            assert not equal(gold, other), (gold, other)


@pytest.mark.skipif("gsm8k_test" not in GOLDS, reason="GSM8K is not beside the project")
def test_every_reference_solution_of_gsm8k_is_right_by_its_own_gold():
    for line in (DATA / "gsm8k_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert verdict(row["answer"], row["answer"]) == 1.0, row["answer"]
        assert verdict(row["answer"], row["answer"].replace("####", "The answer is")) == 1.0, row["answer"]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{6} no wait, \\boxed{9}", "9"),
        ("\\boxed{6}. Wait, I dropped a term. \\boxed{9}", "9"),
        ("$\\boxed{6}$ and $\\boxed{9}$", "6, 9"),
        ("\\boxed{1}, \\boxed{2} or \\boxed{3}.", "1, 2, 3"),
        ("first \\boxed{5}\n\nthen \\boxed{1}, \\boxed{2}", "1, 2"),
        ("x=\\boxed{6} and y=\\boxed{9}", "6, 9"),
        ("\\fbox{4}", "4"),
        ("\\framebox{4}", "4"),
        ("\\boxed 7", "7"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\frac{\\sqrt{2}}{3}}", "\\frac{\\sqrt{2}}{3}"),
        ("\\boxed{8} and \\boxed{never closed", "8"),
        ("\\boxed{8} but \\boxed{}", "8"),
        ("\\[\\boxed{3}\\]", "3"),
        ("#### 1,234", "1,234"),
        ("nothing", None),
    ],
)
def test_the_last_box_counts_unless_boxes_are_joined(response, answer):
    assert marked_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("<think>\\boxed{6}</think>\\boxed{9}", "9"),
        ("<think>a<answer>6</answer></think> so <answer>9</answer>", "9"),
        ("<think>a<answer>6</answer></think> it is \\boxed{9}", "9"),
        ("<think>a</think>b</think><answer>9</answer>", "9"),
        ("<answer>6</answer> no <answer>9</answer>", "9"),
        ("<answer>9</answer><answer> </answer>", "9"),
        ("<think>a</think><answer></answer>\\boxed{9}", "9"),
        ("a prompt that opened the thoughts</think><answer>9</answer>", "9"),
        ("Answer: (C)", "(C)"),
        ("The answer is B.", "B"),
        ("**Answer:** 9", "9"),
        ("**Answer: C**", "C"),
        ("The correct option is C.", "C"),
        ("The answer is therefore 9 dollars.", "9 dollars"),
        ("The answer is 7.\nIt is \\boxed{9", "7"),
        ("The final answer is 3.5. Done.", "3.5"),
        ("The answer is 4.\nThe answer is 5.", "5"),
    ],
)
def test_thoughts_end_before_the_answer_is_looked_for(response, text):
    assert extract(response).text == text


@pytest.mark.parametrize(
    "response", ["<think>\\boxed{9}", "<think>a</think>b<think>\\boxed{9}", "", " ", "<think>a</think>", "\\boxed{9"]
)
def test_thoughts_that_are_never_closed_have_no_answer(response):
    assert extract(response) is None
    assert VERIFIER.verify("", response, "9") == 0.0
    assert VERIFIER.final_answer(response) is None


@pytest.mark.parametrize(
    "gold", ["proof", "notfound", "N/A", "None", "?", "", " - ", "{'ground_truth': '23'}", "not found."]
)
def test_words_for_no_answer_and_objects_are_no_golds(gold):
    assert VERIFIER.gold_problem(gold) is not None


def test_a_solution_without_a_marked_answer_is_no_gold_and_one_that_says_it_is_repaired():
    prose = "We add the numbers one by one. Then we see that the sum is even, as was to be shown. " * 4
    assert "no answer is marked" in VERIFIER.gold_problem(gold_answer(prose))
    assert gold_answer(prose + "Therefore the answer is 42.") == "42"
    assert gold_answer(prose + "So \\boxed{17}.") == "17"


@pytest.mark.parametrize(
    ("gold", "only"), [("east", True), ("\\text{June 20}", True), ("D", False), ("5 cm", False), ("xy", False)]
)
def test_golds_that_only_their_own_text_can_match_are_known(gold, only):
    assert VERIFIER.is_only_text(gold) == only


def test_votes_agree_with_verdicts():
    responses = [
        "\\boxed{\\frac{1}{2}}",
        "so \\boxed{0.5}",
        "The answer is 1/2.",
        "\\boxed{2}",
        "no idea",
        "\\boxed{50\\%}",
    ]
    assert VERIFIER.answer_classes(*responses) == [0, 0, 0, 1, -1, 0]


@pytest.mark.parametrize(
    "hostile",
    [
        "9^{9^{9^{9}}}", "10^{1000000}", "10^{10^{10}}", "10**(10**(10))", "2^{1000 \\cdot 1000 \\cdot 1000}",
        "(10^6)!", "((9!))!",
        "((((" * 5000, "{" * 5000, "\\frac{" * 2000, "1" * 100_000, "a" * 100_000,
        "\\boxed{" * 3000, "9!!!!!!!!", "999999!", "x" + "\u0301" * 5000, "\u202e123", "1\x002", "=" * 5000,
        "1=" * 2000,
        "\\sqrt{" * 500 + "2" + "}" * 500, "1, " * 3000, "\\pm" * 500, "3 " * 2000, " \\approx " * 500,
    ],
)  # fmt: skip
def test_hostile_answers_are_wrong_and_done_with(hostile):
    """Each of these in the test's own process: a parser that hangs would hang the test."""
    for response in (f"\\boxed{{{hostile}}}", f"<answer>{hostile}</answer>", f"The answer is {hostile}"):
        assert not equal("42", (extract(response) or extract("x")).text)


@pytest.mark.parametrize(
    ("read", "response", "answer"),
    [
        (marked_answer, "\\boxed{" * 20_000, None),
        (marked_answer, "\\boxed{" * 20_000 + "7" + "}" * 20_000, "7"),
        (marked_answer, "\\boxed 7 " * 20_000, "7"),
        (final_part, "<answer>" * 20_000, "<answer>" * 20_000),
        (final_part, "<answer>" * 20_000 + "7</answer>", "<answer>" * 19_999 + "7"),
        (final_part, "<answer>7</answer>" * 20_000, "7"),
    ],
    ids=["open boxes", "nested boxes", "bare boxes", "open blocks", "nested blocks", "blocks"],
)
def test_a_policy_that_repeats_itself_is_read_in_one_pass(read, response, answer):
    """With a pass for each repetition these take minutes, and nested boxes more stack than there is."""
    assert read(response) == answer


def rows_of_the_page():
    """Gold, answer and verdict of the tables in ``docs/answers.md``."""
    page = (ROOT / "docs" / "answers.md").read_text()
    found = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (right|wrong) \|", page, re.MULTILINE)
    return [(gold.replace("\\|", "|"), given.replace("\\|", "|"), told) for gold, given, told in found]


@pytest.mark.parametrize(("gold", "response", "told"), rows_of_the_page())
def test_the_page_tells_the_verdicts(gold, response, told):
    assert verdict(gold, response) == float(told == "right")


def test_the_page_has_a_table():
    assert len(rows_of_the_page()) > 25


def test_grading_in_a_process_of_its_own_prints_nothing():
    code = (
        "from rpo_lightning.rewards import MathVerifier\n"
        r"assert MathVerifier().verify('', r'\boxed{\frac{x+1}{2}}', '(1+x)/2')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
