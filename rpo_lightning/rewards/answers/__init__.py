"""How answers are read and compared: one reading for gold answers and responses (``docs/answers.md``)."""
