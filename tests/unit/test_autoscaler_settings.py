"""Invalid autoscaler settings are rejected with the variable's name and a remedy."""

import pytest
from pydantic import ValidationError

from hypercore_agents.autoscaler.policy import PolicySettings
from hypercore_agents.autoscaler.settings import AutoscalerSettings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("no-env-file"))
    for name in AutoscalerSettings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_defaults_match_the_policy_settings() -> None:
    settings = AutoscalerSettings()
    assert settings.prometheus_url == "http://localhost:9090"
    assert settings.autoscaler_signals == "prometheus"
    assert settings.policy() == PolicySettings()
    policy = settings.policy()
    assert (policy.minimum, policy.maximum, policy.sessions_per_agent) == (10, 1000, 100)
    assert (policy.scale_up_threshold, policy.scale_down_threshold) == (0.80, 0.30)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MIN_AGENTS", "2000", "MAX_AGENTS"),
        ("MIN_AGENTS", "0", "set 1 or more"),
        ("MAX_AGENTS", "-1", "max_agents"),
        ("SCALE_UP_THRESHOLD", "0.5", "TARGET_UTILISATION"),
        ("SCALE_DOWN_THRESHOLD", "0.75", "SCALE_DOWN_THRESHOLD"),
        ("TARGET_SESSIONS_PER_AGENT", "0", "target_sessions_per_agent"),
        ("AUTOSCALER_SIGNALS", "tea leaves", "autoscaler_signals"),
        ("AUTOSCALER_ADDR", "0.0.0.0:8091", "AUTOSCALER_ALLOW_ANY_ADDRESS"),
        ("AUTOSCALER_ADDR", "here", "HOST:PORT"),
        ("PROMETHEUS_URL", "localhost:9090", "http://HOST:PORT"),
        ("AUTOSCALER_TOKEN", "two words", "bearer"),
    ],
)
def test_invalid_values_are_rejected(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as refused:
        AutoscalerSettings()
    assert says in str(refused.value)
    assert "two words" not in str(refused.value)
