"""What the property tests share: one fixed profile, and examples of responses."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rpo_lightning.cache.cache import CachedResponse

# The same examples in every run: a failure is found again.
fixed = settings(
    max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

finite = st.floats(-100, 100, allow_nan=False)


@st.composite
def spans(draw, length: int):
    """Spans that partition a response."""
    found, left = [], length
    while left:
        count = draw(st.integers(1, left))
        found.append((draw(st.integers(-1, 9)), count))
        left -= count
    return tuple(found)


@st.composite
def responses(draw, longest: int = 12):
    """A response that a cache can hold."""
    length = draw(st.integers(1, longest))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length))
    verdicts = draw(st.booleans()), draw(st.booleans())
    return CachedResponse(np.array(ids, np.int32), draw(finite), *verdicts, draw(spans(length)))
