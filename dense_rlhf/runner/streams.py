"""Standard input and output of the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dense_rlhf.types import InputError


@contextmanager
def streams() -> Iterator[None]:
    """Standard streams that are open and take any text; raises what is wrong with the output, when all is written."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:  # a closed one must not become a lock or a log
        continue
    os.close(handle)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        try:
            print(end="", flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # the reader has seen enough
                raise
            raise InputError(f"standard output cannot be written: {error.strerror}") from error
