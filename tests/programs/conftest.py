"""Programs that are read: schedules of kernels, which take their compiler seconds each, only where a test asks."""

import pytest

from jaxquant.programs import schedules


@pytest.fixture
def scheduled() -> None:
    """The test wants the schedules of kernels."""


@pytest.fixture(autouse=True)
def unscheduled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have no schedules."""
    if "scheduled" not in request.fixturenames:
        monkeypatch.setattr(schedules, "_known", {})
        monkeypatch.setattr(schedules, "_compiled_apart", lambda chip, kernels: ["not asked for"] * len(kernels))
