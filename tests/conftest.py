"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# a busy machine is no failure: nothing here is timed
settings.register_profile("canter", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("canter")
