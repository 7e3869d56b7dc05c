"""Settings: the defaults, what each variable changes, and what cannot be read."""

from __future__ import annotations

import os

import pytest
from ray._common.utils import get_system_memory

from ray.experimental.rdt.common import config


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """An environment without settings, read anew by each test and by whoever comes after."""
    for name in list(os.environ):
        if name.startswith("RAY_RDT_") or name == "RAY_USE_TLS":
            monkeypatch.delenv(name)
    config.settings.cache_clear()
    yield
    config.settings.cache_clear()


def test_defaults_need_no_environment():
    settings = config.settings()
    assert settings.eager_bytes == 64 * 1024
    assert settings.lanes == {"inproc", "map", "cma", "shm", "tcp", "cuda_ipc", "nixl", "nccl"}
    assert not settings.strict_transport
    assert settings.clear_tcp
    assert settings.copy_threads >= 2
    assert 0 < settings.pool_bytes <= 4 << 30
    assert settings.fetch_timeout_s == 60
    assert 256 << 20 < settings.store_bytes < get_system_memory()
    assert settings.store_wait_s == 10
    assert not settings.checksum


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("RAY_RDT_EAGER_BYTES", "0", "eager_bytes", 0),
        ("RAY_RDT_EAGER_BYTES", " 4096 ", "eager_bytes", 4096),
        ("RAY_RDT_LANES", "tcp", "lanes", {"tcp"}),
        ("RAY_RDT_LANES", " shm , cma,", "lanes", {"shm", "cma"}),
        ("RAY_RDT_STRICT_TRANSPORT", "1", "strict_transport", True),
        ("RAY_RDT_STRICT_TRANSPORT", "False", "strict_transport", False),
        ("RAY_RDT_COPY_THREADS", "7", "copy_threads", 7),
        ("RAY_RDT_TCP_STREAMS", "9", "tcp_streams", 9),
        ("RAY_RDT_POOL_BYTES", "1024", "pool_bytes", 1024),
        ("RAY_RDT_HINT_BYTES", "0", "hint_bytes", 0),
        ("RAY_RDT_STORE_BYTES", "1000", "store_bytes", 1000),
        ("RAY_RDT_STORE_WAIT_S", "0.5", "store_wait_s", 0.5),
        ("RAY_RDT_CHECKSUM", "1", "checksum", True),
        ("RAY_RDT_CONNECT_TIMEOUT_S", "0.5", "connect_timeout_s", 0.5),
        ("RAY_RDT_PEER_TIMEOUT_S", "3", "peer_timeout_s", 3.0),
        ("RAY_RDT_GROUP_TIMEOUT_S", "12", "group_timeout_s", 12.0),
    ],
)
def test_each_variable_sets_its_field(monkeypatch, name, text, field, value):
    monkeypatch.setenv(name, text)
    assert getattr(config.settings(), field) == value


@pytest.mark.parametrize("text", ["", "   "])
def test_empty_variable_is_none_at_all(monkeypatch, text):
    monkeypatch.setenv("RAY_RDT_COPY_THREADS", text)
    assert config.settings().copy_threads >= 2


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("RAY_RDT_EAGER_BYTES", "64k", "invalid literal"),
        ("RAY_RDT_LANES", "cma,pigeon", r"pigeon.*inproc.*tcp"),
        ("RAY_RDT_STRICT_TRANSPORT", "maybe", "expected 0, 1"),
        ("RAY_RDT_PEER_TIMEOUT_S", "soon", "could not convert"),
        ("RAY_RDT_EAGER_BYTES", "-1", "at least 0"),
        ("RAY_RDT_COPY_THREADS", "0", "at least"),
        ("RAY_RDT_TCP_STREAMS", "0", "at least"),
        ("RAY_RDT_POOL_BYTES", "-5", "at least"),
        ("RAY_RDT_HINT_BYTES", "-5", "at least"),
        ("RAY_RDT_CONNECT_TIMEOUT_S", "0", "more than 0"),
        ("RAY_RDT_STORE_BYTES", "-1", "at least"),
        ("RAY_RDT_STORE_WAIT_S", "0", "more than 0"),
        ("RAY_RDT_CHECKSUM", "xxh", "expected 0, 1"),
        ("RAY_RDT_PEER_TIMEOUT_S", "-1", "more than 0"),
        ("RAY_RDT_PEER_TIMEOUT_S", "nan", "more than 0"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_variable(monkeypatch, name, text, reason):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"(?s){name}.*{text}.*({reason})"):
        config.settings()


@pytest.mark.parametrize(
    ("uses_tls", "allows", "expected"),
    [
        (None, None, True),
        ("0", None, True),
        ("1", None, False),
        ("1", "1", True),
        ("1", "0", False),
    ],
)
def test_clear_tcp_is_refused_where_ray_uses_tls(monkeypatch, uses_tls, allows, expected):
    if uses_tls is not None:
        monkeypatch.setenv("RAY_USE_TLS", uses_tls)
    if allows is not None:
        monkeypatch.setenv("RAY_RDT_ALLOW_CLEAR_TCP", allows)
    assert config.settings().clear_tcp is expected


def test_reading_settings_writes_nothing_to_the_environment():
    before = dict(os.environ)
    config.settings()
    assert dict(os.environ) == before
