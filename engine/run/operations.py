"""Operations that PyTorch dispatches, one by one. Knows no network."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

Args = tuple[Any, ...]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls ``visit`` for every operation inside a ``with`` block.

    In inference mode, operations that are made of others arrive whole; they are taken apart.
    """

    whole: Container[Any] = ()
    """Operations that are not taken apart."""

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Args = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func._overloadpacket not in self.whole:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.visit(func, args, kwargs)

    def visit(self, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """The result of an operation."""
        raise NotImplementedError
