"""The argument parser of commands that do not take the flag table."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from opensora_sp.base.errors import UserError
from opensora_sp.base.value_types import shown


class RefusingParser(argparse.ArgumentParser):
    """Refuses in one line, as every command of the program does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", int, _whole)

    def error(self, message: str) -> NoReturn:
        """Raise UserError where argparse would print its usage and end the process."""
        raise UserError(message)


def _whole(text: str) -> int:
    """What `type=int` reads, with a refusal that says what is allowed and quotes no 5000 digits."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from None
