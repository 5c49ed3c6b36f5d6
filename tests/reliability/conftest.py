"""The fork server for tests that kill programs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fork_server import ForkServer  # noqa: E402


@pytest.fixture(scope="session")
def fork_server():
    """Starts scripts and functions as children that may be killed; see `fork_server.py`."""
    with ForkServer() as server:
        yield server
