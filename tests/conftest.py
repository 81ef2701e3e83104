"""Settings of all tests."""

import pytest
from hypothesis import HealthCheck, settings

# a busy machine is no failure: nothing here is timed
settings.register_profile("canter", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("canter")


@pytest.fixture
def without_tf32(monkeypatch):
    """On a GPU convolutions round to TF32 unless told otherwise."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
