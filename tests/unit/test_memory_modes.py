"""A memory mode is one object, which everybody asks; nobody compares its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opensora_sp.base.errors import UserError
from opensora_sp.request.memory_modes import MEMORY_MODES, MemoryMode, Offload
from opensora_sp.request.runtime import Runtime
from opensora_sp.request.settings import parse_command_line, resolve

PACKAGE = Path(__file__).resolve().parents[2] / "opensora_sp"


def test_only_the_module_of_the_modes_names_them_in_code() -> None:
    """A name as a literal elsewhere would be a place to find when a mode is added."""
    literal = re.compile("|".join(f'"{name}"' for name in MEMORY_MODES))
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if literal.search(path.read_text(encoding="utf-8"))
    }
    # "speed" is also the name of a check of the links between ranks.
    assert found == {"request/memory_modes.py", "verification/doctor/collectives.py"}


def test_a_runtime_takes_over_everything_that_its_mode_chooses() -> None:
    mode = MemoryMode(
        name="mine",
        about="",
        offload=Offload(layers=True),
        tokens=5,
        serial_guidance=True,
        vae_frames=2,
    )
    runtime = Runtime.of(mode, chunks=3)
    assert runtime == Runtime(
        mode=mode,
        offload=Offload(layers=True),
        tokens=5,
        serial_guidance=True,
        vae_frames=2,
        chunks=3,
    )
    assert Runtime.of("speed").serial_guidance is False
    assert Runtime.of("speed", serial_guidance=True).serial_guidance is True


def test_every_mode_can_be_asked_for_by_its_flag() -> None:
    for name in MEMORY_MODES:
        assert resolve(parse_command_line(["--memory", name]))["memory"] == name
    with pytest.raises(UserError, match="auto, speed, balanced, small"):
        resolve(parse_command_line(["--memory", "fast"]))
    with pytest.raises(UserError, match="speed, balanced, small"):
        Runtime.of("fast")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"residency": "streamed"}, "residency='streamed'.*the field is called offload now"),
        ({"offload": "small"}, "offload 'small' is not an Offload: give Offload"),
        ({"offload": True}, "offload True is not an Offload"),
    ],
)
def test_what_is_no_offload_is_refused_in_one_line(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Runtime(**given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
