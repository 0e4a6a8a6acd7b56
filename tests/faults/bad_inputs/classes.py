"""Bad classes in settings, and bad settings of the trainer."""

from __future__ import annotations

from tests.faults.bad_inputs.case import BadInput, run

_OWN_REWARD = '--model.rewards \'[{"class_path": "FunctionReward", "init_args": {"function": "nowhere.f"}}]\''

_FAILS = {
    "failing.py": """\
from rpo_lightning import cache, rewards
from lightning.pytorch import Callback
class Mine(rewards.AccuracyReward):
    def __init__(self): {}["words"]
class Verifies(rewards.ExactMatchVerifier):
    def __init__(self):
        open("nowhere")
class Calls(Callback):
    def __init__(self):
        raise RuntimeError
class Cuts(cache.UniformCut):
    def __init__(self):
        raise SystemExit(3)
"""
}

# fmt: off
CLASSES = [
    BadInput("a class that does not exist", run("fit", "--model.objective NoSuchObjective"),
             line="model.objective: no class of this kind is called NoSuchObjective: name one of the package's, or your own by its import path"),
    BadInput("a module that does not exist", run("fit", "--model.objective nowhere.Objective"),
             line="model.objective: Problem with given class_path 'nowhere.Objective': No module named 'nowhere'"),
    BadInput("a class that its module lacks", run("fit", "--model.objective collections.Objective"),
             line="model.objective: Problem with given class_path 'collections.Objective': module 'collections' has no attribute 'Objective'"),
    BadInput("a class of another kind", run("fit", "--model.objective AnchoredCut"),
             line="model.objective: no class of this kind is called AnchoredCut: name one of the package's, or your own by its import path"),
    BadInput("a class from elsewhere of another kind", run("fit", "--model.objective collections.Counter"),
             line="model.objective: a subclass of Objective is expected, got collections.Counter"),
    BadInput("a function for a class", run("fit", "--model.objective os.system"),
             line="model.objective: a subclass of Objective is expected, got os.system"),
    BadInput("a module of one's own that does not parse", run("fit", "--model.objective mine.Mine"),
             files={"mine.py": "class Mine(:\n"},
             line="model.objective: invalid syntax (mine.py, line 1)"),
    BadInput("a class without an argument that it needs", run("fit", "--cache.cut UniformCut"),
             line="cache.cut: Problem with given class_path 'rpo_lightning.cache.UniformCut': the following arguments are required: max_cut"),
    BadInput("a class that refuses an argument, among several kinds of values",
             run("fit", """--data.train '{"class_path": "ArithmeticChain", "init_args": {"size": 0}}'"""),
             line="ArithmeticChain needs size >= 1 and 1 <= operations <= 108; got size=0, operations=3"),
    BadInput("a reward function that does not exist", run("fit", _OWN_REWARD),
             line="cannot import the function 'nowhere.f': No module named 'nowhere'"),
    BadInput("a reward whose constructor fails", run("fit", """--model.rewards '[{"class_path": "failing.Mine"}]'"""), files=_FAILS,
             line="model.rewards: failing.Mine could not be made, its constructor raised KeyError: 'words' (failing.py, line 4): mend the class, or its settings"),
    BadInput("a verifier whose constructor fails", run("fit", "--model.verifier failing.Verifies"), files=_FAILS,
             line="model.verifier: failing.Verifies could not be made, its constructor raised FileNotFoundError: [Errno 2] No such file or directory: 'nowhere' (failing.py, line 7): mend the class, or its settings"),
    BadInput("a callback whose constructor fails", run("fit", "--trainer.callbacks failing.Calls"), files=_FAILS,
             line="trainer.callbacks: failing.Calls could not be made, its constructor raised RuntimeError (failing.py, line 10): mend the class, or its settings"),
    BadInput("a cut whose constructor ends the program", run("fit", "--cache.cut failing.Cuts"), files=_FAILS,
             line="cache.cut: failing.Cuts could not be made, its constructor raised SystemExit: 3 (failing.py, line 13): mend the class, or its settings"),
    BadInput("a reward function whose module fails", run("fit", _OWN_REWARD.replace("nowhere", "raising")),
             files={"raising.py": "{}['words']\n"},
             line="cannot import the function 'raising.f': its module raised KeyError: 'words'"),
    BadInput("an optimizer that is none", run("fit", "--model.optimizer collections.Counter"),
             line="model.optimizer: a subclass of Optimizer is expected, got collections.Counter"),
    BadInput("a negative learning rate", run("fit", "--model.optimizer torch.optim.AdamW --model.optimizer.lr -1"),
             line="model.optimizer: Invalid learning rate: -1.0: change its settings"),
    BadInput("a schedule that does not exist", run("fit", "--model.lr_schedule.name nothing"),
             line="model.lr_schedule.name=nothing: nothing is not a valid SchedulerType, …; use a schedule of transformers.get_scheduler and the arguments that it takes"),
]

TRAINER = [
    BadInput("no devices", run("fit", "--trainer.devices 0"),
             line="trainer: `Trainer(devices='0')` value is not a valid input using cpu accelerator."),
    BadInput("a word for the devices", run("fit", "--trainer.devices many"),
             line="trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
    BadInput("a strategy that does not exist", run("fit", "--trainer.strategy nonsense"),
             line="trainer: You selected an invalid strategy name: `strategy='nonsense'`.…"),
    BadInput("a precision that does not exist", run("fit", "--trainer.precision 12"),
             line="trainer.precision: one of 64, 32, 16 is expected, or one of 'transformer-engine', 'transformer-engine-float16', '16-true', '16-mixed', 'bf16-true', 'bf16-mixed', '32-true', '64-true' is expected, or one of '64', '32', '16', 'bf16' is expected, got 12"),
    BadInput("a negative number of updates", run("fit", "--trainer.max_steps -5"),
             line="trainer: `max_steps` must be a non-negative integer or -1 (infinite steps). You passed in -5."),
    BadInput("a callback that is none", run("fit", "--trainer.callbacks collections.Counter"),
             line="trainer.callbacks: a list is expected, or a subclass of Callback is expected, got collections.Counter"),
    BadInput("a precision of a package that is not installed", run("fit", "--trainer.precision transformer-engine"),
             line="trainer: Requirement 'transformer_engine>=0.11.0' not met.…"),
    BadInput("an accelerator of a package that is not installed", run("fit", "--trainer.accelerator tpu"),
             line="trainer: Requirement 'torch_xla>=1.13' not met.…"),
    BadInput("a callback that finds a learning rate", run("fit", "--trainer.callbacks LearningRateFinder"),
             line="trainer.callbacks: LearningRateFinder does not work on this module: use model.optimizer"),
    BadInput("a callback that finds a batch size", run("fit", "--trainer.callbacks BatchSizeFinder"),
             line="trainer.callbacks: BatchSizeFinder does not work on this module: use data.batch_size and model.update.micro_batch_tokens; rpo-lightning memory estimates what fits"),
    BadInput("a callback that monitors validations without questions for them",
             run("fit", "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/accuracy"),
             line="trainer.callbacks: EarlyStopping monitors val/accuracy, and data.val is not set: set it, or monitor something else"),
    BadInput("a validation after every 0 epochs", run("fit", "--trainer.check_val_every_n_epoch 0"),
             line="trainer.check_val_every_n_epoch must be at least 1, got 0"),
    BadInput("a validation after more batches than there are", run("fit", "--trainer.val_check_interval 100"),
             line="trainer.val_check_interval=100 is more than the 2 training batches of an epoch: lower it, or set trainer.check_val_every_n_epoch=null to count batches of all epochs"),
    BadInput("clipping by the trainer", run("fit", "--trainer.gradient_clip_val 1"),
             line="trainer.gradient_clip_val has no effect on this module: use model.update.max_grad_norm"),
    BadInput("a file for the runs' folder", run("fit", "--trainer.default_root_dir file"), files={"file": ""},
             line="trainer.default_root_dir or the logger's save_dir=file: a file has this name: name a folder"),
]
# fmt: on
