"""Settings of all tests."""

import hypothesis

hypothesis.settings.register_profile(
    "shared_machine",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("shared_machine")
