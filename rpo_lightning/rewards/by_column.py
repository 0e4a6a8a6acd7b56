"""A verifier for data of several kinds: a column of each question's row says which verifier judges it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpo_lightning.core.errors import ConfigurationError, RewardError
from rpo_lightning.core.rows import nested
from rpo_lightning.rewards.base import Verifier


class VerifierByColumn(Verifier):
    """Leaves each question to the verifier that a column of its row names.

    Args:
        column: The column, such as ``source``; ``a.b`` is the key ``b`` of the object in column ``a``.
        verifiers: A verifier for each value of the column.

    Raises:
        ConfigurationError: There is no verifier.
    """

    def __init__(self, column: str, verifiers: dict[str, Verifier]) -> None:
        if not verifiers:
            raise ConfigurationError("VerifierByColumn.verifiers is empty: name one for each value of the column")
        self.column = column
        self.verifiers = {str(value): verifier for value, verifier in verifiers.items()}
        self.isolated = any(verifier.isolated for verifier in verifiers.values())

    @property
    def tells_answers(self) -> bool:
        """Whether all verifiers can."""
        return all(verifier.tells_answers for verifier in self.verifiers.values())

    def prepare(self) -> None:
        """Prepare those that run in worker processes."""
        for verifier in self.verifiers.values():
            if verifier.isolated:
                verifier.prepare()

    def of_row(self, row: Mapping[str, Any]) -> Verifier:
        """The verifier of the question with this row.

        Raises:
            RewardError: There is none for it.
        """
        problem = self._column_problem(row)
        if problem is not None:
            raise RewardError(problem)
        return self.verifiers[str(nested(row, self.column)[1])].of_row(row)

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        """That no verifier is for this row, or what its verifier says of it."""
        return self._column_problem(row) or self.of_row(row).row_problem(row)

    def verify(self, /, prompt: str, response: str, answer: str, **row: Any) -> float:
        """The verdict of the question's verifier."""
        verifier = self.of_row(row)
        return verifier.verify(prompt, response, answer, **verifier.arguments.columns(row))

    def _column_problem(self, row: Mapping[str, Any]) -> str | None:
        is_there, value = nested(row, self.column)
        if is_there and str(value) in self.verifiers:
            return None
        known = ", ".join(map(repr, self.verifiers))
        if is_there and value is not None:
            return (
                f"no verifier for {str(value)[:60]!r} in the column {self.column!r}: name one in "
                f"VerifierByColumn.verifiers, which has {known}"
            )
        return (
            f"no value in the column {self.column!r}, which says what verifies a question: give one of {known}, or set "
            "VerifierByColumn.column"
        )
