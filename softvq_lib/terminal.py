"""What the commands of `softvq` share: errors in one line, exit codes, log lines between progress bars, Ctrl-C."""

import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
EXITS = """\b
Exit codes:
    0  done, or found done already
    1  failed on the way: disk full, no network, out of memory, numbers not finite
    2  refused: wrong usage, bad input, an output that exists
  130  interrupted by Ctrl-C: give the same command again, it goes on
  143  ended by SIGTERM: likewise"""


def run(cli: click.Group, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; what goes wrong is said in one line on standard error."""
    state = {"debug": False}
    try:
        with _logging():
            code = cli.main(arguments, prog_name="softvq", standalone_mode=False, obj=state)
        return code if isinstance(code, int) else OK
    except (KeyboardInterrupt, click.Abort):
        if state["debug"]:
            raise
        click.echo("interrupted: the same command goes on from what was saved", err=True)
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return REFUSED
    except Exception as error:
        if state["debug"] and not isinstance(error, click.ClickException):
            raise
        code, text = _told(error)
        click.echo("error: " + " ".join(text.split()), err=True)
        return code


@contextmanager
def finishing_the_step() -> Iterator[None]:
    """Let the first Ctrl-C end a training as SIGTERM does, after a step that is saved; the second ends it at once."""
    process, asked = os.getpid(), []

    def note(number, frame):
        if os.getpid() != process:
            return  # a loader process, which the main one ends
        stop = signal.getsignal(signal.SIGTERM)
        if asked or not callable(stop):
            raise KeyboardInterrupt
        asked.append(True)
        click.echo("\nfinishing the step and saving; Ctrl-C again stops at once", err=True)
        stop(signal.SIGTERM, frame)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    except SystemExit:
        if asked:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


class _ThroughBars(logging.Handler):
    """Shows the library's log between progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + self.format(record), file=sys.stderr)


@contextmanager
def _logging() -> Iterator[None]:
    library, handler = logging.getLogger("softvq_lib"), _ThroughBars()
    level = library.level
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.removeHandler(handler)
        library.setLevel(level)


def _told(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what is said of it."""
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        asked = f" (see {context.command_path} --help)" if context else ""
        return error.exit_code, error.format_message().rstrip(".") + asked
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename and str(error.filename) not in (error.strerror or "") else ""
        full = (
            "; free some space and run the same command again"
            if error.errno == errno.ENOSPC and "again" not in error.strerror
            else ""
        )
        return FAILED, f"{where}{error.strerror}{full}"
    if isinstance(error, ValueError):
        return REFUSED, str(error)
    if isinstance(error, FloatingPointError | MemoryError | OSError):
        return FAILED, str(error) or type(error).__name__
    return FAILED, f"{type(error).__name__}: {error} (not foreseen: --debug shows where)"
