"""One start of four processes for all tests of this folder that look at what four processes find."""

from typing import Any

import pytest

from tests.helpers.pair import run_mesh
from tests.helpers.worker_work import facts_of_four


@pytest.fixture(scope="session")
def four_processes() -> list[dict[str, Any]]:
    """What each found, by rank: ``replicas`` and ``workers``."""
    return run_mesh(facts_of_four, replicas=2)
