"""Errors of a command as one line and an exit code, whichever layer raised them."""

from __future__ import annotations

import errno
import os
import shlex

from cyclopts import CycloptsError, RepeatArgumentError, UnusedCliTokensError

from engine.causes import EXHAUSTED, NO_ROOM, is_out_of_memory, is_out_of_threads, system_error
from engine.errors import EngineError, InputError, UsageError, option

TRACEBACK = "ENGINE_TRACEBACK"
"""Variable of the environment that has the tracebacks of errors printed."""

_SHOWN = 300
"""Characters of an unexpected error in a message."""


class PicturesFailed(EngineError):
    """Some pictures of a command for several failed; the others are written."""


def outcome(error: Exception, words: list[str]) -> tuple[str, int]:
    """Message and exit code of an error. The same cause gives the same code, whichever layer has reported it."""
    if isinstance(error, EngineError):
        cause = system_error(error) if error.exit_code == InputError.exit_code else None
        if cause is None or cause.errno not in EXHAUSTED:
            return error.for_command_line(), error.exit_code
        if not is_out_of_memory(cause):  # its advice is not the file's
            return error.for_command_line(), EngineError.exit_code
        error = cause
    if isinstance(error, CycloptsError):
        return _message(error), UsageError.exit_code
    if is_out_of_memory(error):
        return f"out of memory; {_memory_advice(words)}", EngineError.exit_code
    if is_out_of_threads(error):
        advice = "allow more threads or memory (ulimit -u, ulimit -v), or set OMP_NUM_THREADS=1"
        return f"no further thread can be started; {advice}", EngineError.exit_code
    if (system := system_error(error)) is not None:
        subject = f"{os.fsdecode(system.filename)}: " if isinstance(system.filename, str | bytes) else ""
        advice = "choose another path"
        if system.errno in NO_ROOM:
            # Another output of the same command may be finished, and what is unfinished goes on.
            resumes = words[:1] in (["render"], ["upscale"], ["train"])
            advice = f"make room{' and continue with --resume' if resumes else ' and repeat the command'}"
        elif system.errno in (errno.EMFILE, errno.ENFILE):
            advice = "allow more open files (ulimit -n)"
        elif system.errno in EXHAUSTED:
            advice = "check the disk"
        code = EngineError.exit_code if system.errno in EXHAUSTED else InputError.exit_code
        return f"{subject}{system.strerror or system}; {advice}", code
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read; choose another file", InputError.exit_code
    text = " ".join(str(error).split())[:_SHOWN]
    return (
        f"internal error: {type(error).__name__}: {text}; {TRACEBACK}=1 shows where; please report it",
        EngineError.exit_code,
    )


def _memory_advice(words: list[str]) -> str:
    """Advice for a command that ran out of memory."""
    command = words[0] if words else ""
    if command in ("render", "upscale", "plan", "score"):
        return "use a smaller --memory or --tile"
    return "end other programs, or allow this one more memory (ulimit -v)"


def _message(error: CycloptsError) -> str:
    """Message of a parser error, or of the engine's error that caused it, which says more."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EngineError):
            return cause.for_command_line()
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        extra, advice = shlex.join(error.unused_tokens), "see engine --help"
        if "--init" in (error.root_input_tokens or ()):
            advice = f"{option('init')} takes one picture; engine upscale takes several"
        return UsageError(f"{extra}: too many arguments; {advice}").for_command_line()
    if isinstance(error, RepeatArgumentError):
        return f"{error.token.keyword}: given twice, or beside its opposite; give it once"
    return f"{' '.join(str(error).split())} (see engine --help)"
