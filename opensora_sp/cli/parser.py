"""The argument parser of commands that do not take the flag table."""

from __future__ import annotations

import argparse
from typing import NoReturn

from opensora_sp.base.errors import UserError


class RefusingParser(argparse.ArgumentParser):
    """Refuses in one line, as every command of the program does."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError where argparse would print its usage and end the process."""
        raise UserError(message)
