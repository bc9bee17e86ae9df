"""The commands as a group: one way to fail, a sentence on stderr and an exit code, and no noise from below."""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from tandem.errors import ConfigError, DataError, RunError
from tandem.train.interrupt import Interrupted

USAGE, FAILURE, CTRL_C = 2, 1, 130
"""Exit codes: a wrong configuration or data, a run that failed, Ctrl-C."""
DEBUG = "tandem.debug"


class Commands(TyperGroup):
    """The commands, with one way to fail: a sentence on stderr and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:
        with warnings_on_stderr():
            try:
                return super().invoke(ctx)
            except (ConfigError, DataError) as error:
                fail(ctx, error, str(error), USAGE)
            except Interrupted as signal:
                fail(ctx, signal, f"stopped by {signal}", signal.exit_code)
            except KeyboardInterrupt as error:
                fail(ctx, error, "stopped by Ctrl-C", CTRL_C)
            except BrokenPipeError:
                raise  # Typer ends quietly when nobody reads the output any more.
            except OSError as error:
                fail(ctx, error, in_words(error), FAILURE)
            except RunError as error:
                fail(ctx, error, str(error), FAILURE)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                fail(ctx, error, f"{first_line(error)}; {SMALLER}", FAILURE)


SMALLER = "out of memory: lower sampling.slots or learner.tokens_per_forward; `tandem check` estimates what a run needs"


def fail(ctx: typer.Context, error: BaseException, text: str, code: int) -> NoReturn:
    """Say what is wrong; the traceback only where it was asked for."""
    from tandem.journal import visible

    if ctx.meta.get(DEBUG) or os.environ.get("TANDEM_DEBUG") == "1":
        traceback.print_exception(error)
    lead = "" if code > 128 else "error: "
    typer.echo(lead + "".join(map(visible, text)), err=True)
    raise typer.Exit(code) from error


def in_words(error: OSError) -> str:
    """A full disk and its like, without a number."""
    where = f"{error.filename}: " if error.filename else ""
    advice = "; free some space, or set run_dir to a folder on another disk"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{where}{error.strerror or error}{advice if full else ''}"


def out_of_memory(error: BaseException) -> bool:
    """On the host or on a device; torch is asked only where it is loaded."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, MemoryError) or on_device or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Stderr(logging.Handler):
    """`warning: ...` on the stderr of the moment: a progress bar puts its own in place while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        from tandem.journal import visible

        said = "".join(map(visible, self.format(record)))
        typer.echo(f"{record.levelname.lower()}: {said}", err=True)


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Warnings of this package are shown, those of the libraries below are not."""
    logger, handler = logging.getLogger("tandem"), Stderr(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = True


def remember_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[DEBUG] = value
    return value
