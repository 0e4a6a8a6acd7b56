"""The commands of ``rpo-lightning``, each with its one line of help, and the settings that most runs change.

This module imports nothing: ``rpo-lightning --help`` prints it at once.
"""

from __future__ import annotations

from typing import NamedTuple

# Lightning's own.
LIGHTNING_COMMANDS = {
    "fit": "Train a policy.",
    "validate": "Measure a policy on the validation questions (data.val).",
    "test": "Measure a policy on the test questions (data.test).",
    "predict": "Answer questions (data.predict) and write the answers to a file.",
}
TOOL_COMMANDS = {
    "plan": "Estimate from a sample what a run learns from and costs, and advise.",
    "segments": "Measure how much each part of a response decides, and draw it.",
    "cache": "Build, import, export and show experience caches.",
    "report": "Write curves, times and completions of a run as one HTML page.",
    "memory": "Estimate the memory that each device needs; nothing is loaded.",
}
COMMANDS = LIGHTNING_COMMANDS | TOOL_COMMANDS

CACHE_COMMANDS = {
    "build": "Sample the policy's answers to the training questions and cache the best ones.",
    "import": "Make a cache of responses from elsewhere: an exported cache, or questions with solutions.",
    "export": "Write a cache as a table with the texts of its questions and responses.",
    "show": "Print entries of a cache with what a cut keeps and drops.",
    "stats": "Print statistics of a cache.",
}


class Setting(NamedTuple):
    """A setting as the top of a command's help shows it.

    Attributes:
        name: Its name.
        meaning: One line.
        default: What is taken if it is not given, where the parser has only ``null``.
    """

    name: str
    meaning: str
    default: str = ""


_POLICY = Setting("model.policy", "a Hugging Face folder or hub name, or embedded:arithmetic-reasoner", "(required)")
_REWARDS = Setting("model.rewards", "a list of reward terms, such as AccuracyReward", "(required)")
_VERIFIER = Setting("model.verifier", "decides whether an answer is right", "MathVerifier")
_ENGINE = Setting("model.engine", "generates responses; VLLMEngine is faster", "TransformersEngine")
_LENGTH = Setting("model.max_response_tokens", "limit of a whole response, in tokens")
_DEVICES = Setting("trainer.devices", "how many GPUs, or processes on a CPU")
_CHECKPOINT = Setting("ckpt_path", "a checkpoint to load, or last", "none")

_TRAINING = (
    _POLICY,
    _REWARDS,
    _VERIFIER,
    Setting("model.objective", "the loss, such as GRPO or DAPO", "DAPO"),
    Setting("model.group_size", "responses sampled to each question"),
    _LENGTH,
    _ENGINE,
    Setting("model.optimizer", "a torch optimizer, such as torch.optim.AdamW with lr", "AdamW, lr 1e-6"),
    Setting("data.train", "training questions: a file, a hub name, or a class", "none"),
    Setting("data.val", "validation questions", "none"),
    Setting("data.batch_size", "questions of one iteration on each device"),
    Setting("cache", "an experience cache, which makes the run an RPO run", "none: full path"),
    Setting("trainer.max_steps", "updates to make; -1 sets no limit"),
    _DEVICES,
    _CHECKPOINT,
)


def _evaluation(questions: str) -> tuple[Setting, ...]:
    return (
        _POLICY,
        _REWARDS,
        _VERIFIER,
        Setting("model.evaluation.samples", "answers to each question"),
        Setting("model.evaluation.sampling", "how answers are drawn", "as in training"),
        _LENGTH,
        _ENGINE,
        Setting(f"data.{questions}", "the questions: a file, a hub name, or a class", "none"),
        Setting("data.eval_batch_size", "questions answered at once on each device"),
        _DEVICES,
        _CHECKPOINT,
    )


COMMON_SETTINGS = {
    "fit": _TRAINING,
    "validate": _evaluation("val"),
    "test": _evaluation("test"),
    "predict": _evaluation("predict"),
}

USAGE = "rpo-lightning {command} --config FILE [--SETTING VALUE ...]"


def overview() -> str:
    """What ``rpo-lightning --help`` prints."""
    return "\n".join(
        [
            "usage: rpo-lightning COMMAND ...",
            "",
            "Reinforcement fine-tuning with partial reasoning optimization (RPO).",
            "",
            "commands:",
            *listed(COMMANDS),
            "",
            "Start with: rpo-lightning fit --config configs/quickstart.yaml",
            "Arguments of a command: rpo-lightning COMMAND --help",
        ]
    )


def cache_overview() -> str:
    """What ``rpo-lightning cache --help`` prints."""
    return "\n".join(
        [
            "usage: rpo-lightning cache COMMAND ...",
            "",
            COMMANDS["cache"],
            "",
            "commands:",
            *listed(CACHE_COMMANDS),
            "",
            "build, import and export take the settings of fit, --config among them.",
            "Arguments of a command: rpo-lightning cache COMMAND --help",
        ]
    )


def listed(commands: dict[str, str]) -> list[str]:
    """A line for each command."""
    width = max(len(name) for name in commands)
    return [f"  {name:<{width}}  {text}" for name, text in commands.items()]
