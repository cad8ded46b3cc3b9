"""Fixtures of the parallel tests."""

from __future__ import annotations

import pytest

from tests.weights import random_weights


@pytest.fixture(scope="session")
def weights(tiny, tmp_path_factory) -> tuple[str, ...]:
    """Flags that start both tiny models from the same weights in every layout."""
    return random_weights(tiny, tmp_path_factory.mktemp("weights"))
