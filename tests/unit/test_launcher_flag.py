"""--launcher colossalai is refused in one line where ColossalAI is missing or another version."""

from __future__ import annotations

from importlib import metadata

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.parallel.launchers import check_launcher
from opensora_sp.request.settings import build_job, check_request, parse_command_line, resolve


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def answer(name: str) -> str:
        assert name == "colossalai"
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", answer)


@pytest.mark.parametrize("version", ["0.5.0", "0.5.1.post1"])
def test_the_supported_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, version)
    check_launcher("colossalai")


@pytest.mark.parametrize(
    ("version", "told"),
    [(None, "is not installed"), ("0.3.8", "version 0.3.8"), ("0.50.0", "version 0.50.0")],
)
def test_others_are_refused_with_what_to_install(
    version: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, version)
    values = resolve(
        parse_command_line(["--prompt", "x", "--launcher", "colossalai"]), program="infer"
    )
    with pytest.raises(UserError) as caught:
        build_job(values)
    for words in ("--launcher colossalai", told, "pip install --no-deps colossalai==0.5.0"):
        assert words in str(caught.value)
    check_launcher("torch")  # nobody else is asked for it


def test_its_lack_of_a_time_limit_is_said() -> None:
    argv = ["--prompt", "x", "--launcher", "colossalai", "--timeout", "60"]
    notes = check_request(resolve(parse_command_line(argv), program="infer"))
    assert any("--timeout 60 has no effect" in note for note in notes)
