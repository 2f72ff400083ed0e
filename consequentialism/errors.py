"""Errors of a user, optional packages and folders for results."""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake that the user can mend; the message is the one line shown on stderr."""


class Parser(argparse.ArgumentParser):
    """A command's arguments; what is wrong with them is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def need(module: str) -> Any:
    """Import a module of an optional package.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        own = module.split(".")[0]
        package = own if own in ("mlxtend", "mnist1d") else "consequentialism[demo]"
        raise UserError(f"{error.name} is not installed: pip install {package}") from None


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` and try whether it can be written.

    Raises:
        UserError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from None
