"""The soak of a server, short; `make soak` runs it at length."""

import pytest

for package in ("fastapi", "httpx", "openai", "uvicorn"):
    pytest.importorskip(package)

from tests.cobra.serve_soak import soak  # noqa: E402


def test_clients_that_come_and_go_leave_nothing_behind():
    result = soak(clients=20, seconds=10)
    assert result["right"] > 20 and result["hung_up"] > 3
