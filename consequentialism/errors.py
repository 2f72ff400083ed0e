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


def shown(value: Any) -> str:
    """A value of the wrong type and that type, in one line, however many layers a model has."""
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


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


def prepare_folder(folder: Path, argument: str = "--out") -> None:
    """Make ``folder`` and try whether it can be written.

    Args:
        argument: The one that names the folder, for the message.

    Raises:
        UserError: It cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{argument} {folder} cannot be written: it is a file, and must be a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise UserError(f"{argument} {folder} cannot be written: {error.strerror or error}") from None


def prepare_file(path: Path, argument: str = "--out") -> None:
    """Make the folder of a file that will be written, and try whether it can be; what stands there stays.

    Raises:
        UserError: It cannot.
    """
    if path.is_dir():
        raise UserError(f"{argument} {path} cannot be written: it is a folder, and must be a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{argument} {path} cannot be written: Permission denied")
    prepare_folder(path.parent, argument)
