"""Where the user's cache is, how large, and its command line."""

from __future__ import annotations

import pytest
from stores import some_tensors

from lora_init.cache import DEFAULT_LIMIT, Cache, default_cache, key, location
from lora_init.cache.__main__ import main
from lora_init.cache.store import Usage


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in ("LORA_INIT_CACHE", "LORA_INIT_CACHE_BYTES", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return monkeypatch


@pytest.mark.parametrize("value", ["off", "0", "OFF"])
def test_switched_off(environment, value):
    environment.setenv("LORA_INIT_CACHE", value)
    assert default_cache() is None


@pytest.mark.parametrize(
    ("platform", "settings", "expected"),
    [
        ("linux", {}, ".cache/lora_init"),
        ("linux", {"XDG_CACHE_HOME": "{home}/xdg"}, "xdg/lora_init"),
        ("darwin", {}, "Library/Caches/lora_init"),
        ("win32", {"LOCALAPPDATA": "{home}/Local"}, "Local/lora_init"),
        ("win32", {}, "AppData/Local/lora_init"),
        ("linux", {"LORA_INIT_CACHE": "{home}/mine"}, "mine"),
        ("linux", {"LORA_INIT_CACHE": "~/mine"}, "mine"),
        ("linux", {"LORA_INIT_CACHE": ""}, ".cache/lora_init"),
    ],
)
def test_where_it_is(environment, tmp_path, platform, settings, expected):
    environment.setattr(location.sys, "platform", platform)
    for name, value in settings.items():
        environment.setenv(name, value.format(home=tmp_path))
    store = default_cache()
    assert store.folder == tmp_path / expected
    assert store.limit == DEFAULT_LIMIT == 5 * 2**30
    assert default_cache() is store
    assert not store.folder.exists()


def test_limit_of_the_default_cache(environment):
    environment.setenv("LORA_INIT_CACHE_BYTES", "123456")
    assert default_cache().limit == 123456


@pytest.mark.parametrize("value", ["5GB", "-1", "0", "1e9"])
def test_a_wrong_limit_is_refused(environment, value):
    environment.setenv("LORA_INIT_CACHE_BYTES", value)
    message = f"LORA_INIT_CACHE_BYTES='{value}' is not supported: must be a positive"
    with pytest.raises(ValueError, match=message):
        default_cache()


def test_a_user_without_a_home_has_no_cache(environment):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    environment.setattr(location.Path, "home", homeless)
    environment.setattr(location.sys, "platform", "linux")
    assert default_cache() is None


def test_the_command_line(tmp_path, environment, capsys):
    store = Cache(tmp_path / "cache", 2_000_000)
    store.put(key("svd", 1), some_tensors(), {})
    usage = store.usage()
    environment.setenv("LORA_INIT_CACHE", str(store.folder))
    environment.setenv("LORA_INIT_CACHE_BYTES", "2000000")
    main([])
    assert capsys.readouterr().out == (
        f"{store.folder}: 1 entries, {usage.bytes:,} bytes of 2,000,000\n"
    )
    main(["clear"])
    assert capsys.readouterr().out == (
        f"{store.folder}: removed 1 entries, {usage.bytes:,} bytes\n"
    )
    assert store.usage() == Usage(0, 0)
    environment.setenv("LORA_INIT_CACHE", "off")
    main([])
    assert capsys.readouterr().out == "the cache is off (LORA_INIT_CACHE)\n"
