"""The page on Better Auth shows the files that ``make test-better-auth`` runs."""

from __future__ import annotations

import json
import re

import pytest

from better_auth import FOLDER, GUIDE, exported
from kitrocket.settings import Settings

PAGE = GUIDE.read_text(encoding="utf-8")


def test_the_files_are_shown_as_they_are() -> None:
    shown = re.findall(r"^`([\w.]+\.ts)`.*?^```ts\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in shown] == ["auth.ts", "schema.ts", "drizzle.config.ts"]
    for name, text in shown:
        assert text == (FOLDER / name).read_text(encoding="utf-8"), name


def test_the_settings_are_those_of_the_shared_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in exported().items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.session_tokens, settings.password_scheme) == ("plain", "better-auth")
    assert len(settings.better_auth_secret) == 1
    auth = (FOLDER / "auth.ts").read_text(encoding="utf-8")
    seconds = {name: eval(text) for name, text in re.findall(r"(expiresIn|updateAge): ([\d *]+),", auth)}
    assert seconds["expiresIn"] == settings.session_ttl.total_seconds()
    assert seconds["updateAge"] == settings.session_update_age.total_seconds()


def test_the_versions_are_those_that_are_installed() -> None:
    package = json.loads((FOLDER / "package.json").read_text(encoding="utf-8"))
    versions = package["dependencies"] | package["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions.values())
    assert f"Better\nAuth {versions['better-auth']}" in PAGE
    for name, words in (("drizzle-orm", "Drizzle"), ("drizzle-kit", "drizzle-kit")):
        assert f"{words} {versions[name].rpartition('.')[0]}" in PAGE
