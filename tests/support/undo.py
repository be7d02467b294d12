"""A mend taken out again, so that a test shows what it would meet without it."""

import inspect
import textwrap


def without(monkeypatch, module, name, text, instead=""):
    """Run a function of a module without a part of its source.

    Args:
        monkeypatch: fixture of the test.
        module: module of the function.
        name: its name.
        text: part of the source, which must be there once.
        instead: what stands in its place.
    """
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    assert source.count(text) == 1
    scope = dict(vars(module))
    exec(compile(source.replace(text, instead), f"{name} without {text!r}", "exec"), scope)
    monkeypatch.setattr(module, name, scope[name])
