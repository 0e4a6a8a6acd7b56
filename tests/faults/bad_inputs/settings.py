"""Bad config files and bad values of settings."""

from __future__ import annotations

from tests.faults.bad_inputs.case import BadInput, run

_ALL = "fit --config bad.yaml"
_MORE = "fit --config run.yaml --config bad.yaml"


def _config(what: str, content: str | bytes, command: str = _MORE, *, line: str) -> BadInput:
    return BadInput(what, command, line, {"bad.yaml": content})


# fmt: off
CONFIGS = [
    BadInput("a config file that is missing", _ALL,
             line="--config bad.yaml: no such file: check the path"),
    BadInput("a folder for a config file", _ALL, files={"bad.yaml/part.yaml": ""},
             line="--config bad.yaml: a folder: name a file in it"),
    _config("an empty config file", "", _ALL,
            line="--config bad.yaml: holds nothing where settings are expected, as in configs/"),
    _config("a config file that is no YAML", "model: {group_size: 3\ndata: [", _ALL,
            line="--config bad.yaml, line 2: expected ',' or '}', but got ':': mend the line"),
    _config("a config file with a tab", "model:\n\tgroup_size: 3\n", _ALL,
            line="--config bad.yaml, line 2: found character '\\t' that cannot start any token: mend the line"),
    _config("a config file that holds a list", "- model\n- data\n", _ALL,
            line="--config bad.yaml: holds a list where settings are expected, as in configs/"),
    _config("a config file that is not UTF-8", "# é\n".encode("latin-1"), _ALL,
            line="--config bad.yaml: not UTF-8 (invalid continuation byte): save the file in UTF-8"),
    _config("a config file with a tag that would run code", "model: !!python/object/apply:os.system ['touch executed']",
            _ALL, line="--config bad.yaml, line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system': mend the line"),
    _config("a key that comes twice", "model:\n  group_size: 3\n  group_size: 4\n",
            line="--config bad.yaml, line 2: the key 'group_size' comes twice: mend the line"),
    _config("an unknown section", "modle: {group_size: 3}\n",
            line="modle.group_size: no such setting: --help lists those that there are"),
    _config("an unknown key", "model: {groupsize: 3}\n",
            line="model.groupsize: no such setting: --help lists those that there are"),
    _config("an unknown key of a class", "model: {objective: {class_path: GRPO, init_args: {clip: 1}}}\n",
            line="model.objective: Problem with given class_path 'rpo_lightning.update.objectives.GRPO': Option 'clip' is not accepted"),
    _config("a required key that is left out", "model: {rewards: [AccuracyReward]}\n", _ALL,
            line="model.policy is not set: give it in a config or as --model.policy"),
    _config("NaN in a config", "model: {objective: {class_path: GRPO, init_args: {beta: .nan}}}\n",
            line="model.objective.beta is NaN: give a number"),
    _config("NaN as learning rate", "model: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: .nan}}}\n",
            line="model.optimizer.lr is NaN: give a number"),
    _config("an infinite weight of a reward",
            "model: {rewards: [{class_path: AccuracyReward, init_args: {weight: .inf}}]}\n",
            line="model.rewards: the weight of AccuracyReward is inf: give a number"),
]

VALUES = [
    BadInput("an unknown key as an argument", run("fit", "--model.groupsize 4"),
             line="model.groupsize: no such setting: --help lists those that there are"),
    BadInput("a key that had another name", run("fit", "--model.micro_batch_tokens 512"),
             line="model.micro_batch_tokens is called model.update.micro_batch_tokens now"),
    BadInput("text for a whole number", run("fit", "--model.group_size six"),
             line="model.group_size: a whole number is expected, got six"),
    BadInput("a fraction for a whole number", run("fit", "--model.group_size 3.5"),
             line="model.group_size: a whole number is expected, got 3.5"),
    BadInput("null for a number", run("fit", "--data.batch_size null"),
             line="data.batch_size: a whole number is expected, got None"),
    BadInput("a number for a list", run("fit", "--model.rewards 3"),
             line="model.rewards: a list is expected, got 3"),
    BadInput("an empty list of rewards", run("fit", "--model.rewards []"),
             line="model.rewards is empty: name at least one reward, e.g. AccuracyReward"),
    BadInput("text for true or false", run("fit", "--model.update.share_prefixes perhaps"),
             line="model.update.share_prefixes: true or false is expected, got perhaps"),
    BadInput("a word that is no choice", run("fit", "--cache.initialisation never"),
             line="cache.initialisation: Problem with given class_path 'rpo_lightning.ExperienceCacheCallback': one of 'eager', 'lazy' is expected, got never"),
    BadInput("a setting without its value", run("fit", "--model.group_size"),
             line="argument --model.group_size: expected one argument"),
    BadInput("a negative limit", run("fit", "--model.max_response_tokens -1"),
             line="model.max_response_tokens must be at least 1, got -1"),
    BadInput("a batch of no questions", run("fit", "--data.batch_size 0"),
             line="data.batch_size must be at least 1, got 0"),
    BadInput("a group of one", run("fit", "--model.group_size 1"),
             line="model.group_size must be at least 2, got 1 (a group of 1 has no advantage)"),
    BadInput("a negative temperature", run("fit", "--model.sampling.temperature -1"),
             line="sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0: got temperature=-1.0, top_p=1.0, top_k=0"),
    BadInput("a temperature of 0 in training", run("fit", "--model.sampling.temperature 0"),
             line="model.sampling.temperature=0 samples G times the same response; use a value above 0"),
    BadInput("a share above 1", run("fit", "--cache.cut.fraction 1.5"),
             line="cache.cut: Problem with given class_path 'rpo_lightning.ExperienceCacheCallback': Expected an instantiatable class, but rpo_lightning.cache.CutStrategy is abstract"),
    BadInput("bounds the wrong way round", run("fit", "--cache.cut AnchoredCut --cache.cut.low 0.6 --cache.cut.high 0.1"),
             line="cache.cut needs 0 <= low <= high < 1, got low=0.6, high=0.1"),
    BadInput("settings that exclude each other",
             run("fit", "--model.update.loss_scope response --model.update.prefix_gradient false"),
             line="model.update.prefix_gradient=false needs model.update.loss_scope=suffix and model.update.share_prefixes=true, got response and true"),
    BadInput("a pattern that is no regular expression", run("fit", "--cache.step_end '('"),
             line="cache.step_end='(' is no regular expression: missing ), unterminated subpattern at position 0"),
    BadInput("a pattern that no token has", run("fit", "--cache.step_end zzz"),
             line="cache.step_end='zzz' matches no token of the policy's tokenizer: it is searched in single tokens, so name what one of them holds"),
    BadInput("an export after every -1 updates", run("fit", "--export.every_n_steps -1"),
             line="export.every_n_steps must be at least 1 (null: never), got -1"),
    BadInput("an evaluation of no samples", run("validate", "--model.evaluation.samples 0"),
             line="model.evaluation.samples must be at least 1, got 0"),
    BadInput("grading without a process", run("fit", "--model.grading.workers 0"),
             line="model.grading needs at least 1 worker and limits above 0; got workers=0, timeout_seconds=10.0, memory_gib=4.0"),
    BadInput("an adapter that has no effect", run("fit", "--model.adapter LoRA --model.adapter.alpha 0"),
             line="model.adapter needs rank >= 1, alpha >= 1 and 0 <= dropout < 1; got rank=16, alpha=0, dropout=0.0"),
    BadInput("a seed below 0", run("fit", "--seed_everything -1"),
             line="seed_everything must be from 0 to 4294967295, got -1"),
    BadInput("a response limit beyond the policy's positions", run("fit", "--model.max_response_tokens 5000"),
             line="model.max_response_tokens=5000 after a prompt of 13 tokens needs more than the policy's 1024 positions: lower model.max_response_tokens to at most 1011"),
]
# fmt: on
