"""Bad inputs and the lines that they get: one table for the test and for ``docs/bad_input.md``."""

from tests.faults.bad_inputs.caches import CACHE_FILES, CACHE_ROWS, NOTES
from tests.faults.bad_inputs.case import BadInput
from tests.faults.bad_inputs.checkpoints import CHECKPOINTS
from tests.faults.bad_inputs.classes import CLASSES, TRAINER
from tests.faults.bad_inputs.commands import COMMANDS, IMPORTS
from tests.faults.bad_inputs.policies import POLICIES
from tests.faults.bad_inputs.questions import FILES, ROWS
from tests.faults.bad_inputs.settings import CONFIGS, VALUES

SECTIONS: dict[str, list[BadInput]] = {
    "Config files": CONFIGS,
    "Values": VALUES,
    "Classes": CLASSES,
    "The trainer": TRAINER,
    "Files of questions": FILES,
    "Rows of questions": ROWS,
    "Model folders": POLICIES,
    "Cache files": CACHE_FILES,
    "Rows of a cache file": CACHE_ROWS,
    "What cuts note in a cache": NOTES,
    "Tables to import": IMPORTS,
    "Checkpoints": CHECKPOINTS,
    "Commands": COMMANDS,
}

__all__ = ["SECTIONS", "BadInput"]
