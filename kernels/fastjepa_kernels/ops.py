"""Ops of PyTorch, registered without `torch.library.custom_op`.

Its wrapper around an implementation imports torch._dynamo at the first call, a second at the start of every
process, and it looks for outputs that share memory with inputs at every call.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


class Op:
    """An op; called, it goes through PyTorch's dispatcher to `function`, on every device.

    Args:
        name: "fastjepa::" and the function's.
        function: annotated as `torch.library.infer_schema` wants it; its outputs share no memory with inputs.
        mutates: names of the arguments that it writes to, whose versions it need not count up.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
        self.name = name
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        namespace, _, short = name.partition("::")
        self._overload = getattr(getattr(torch.ops, namespace), short).default
        names = [argument.name for argument in self._overload._schema.arguments]
        places = [names.index(argument) for argument in mutates]

        def run(*arguments: Any) -> Any:
            result = function(*arguments)
            written = [arguments[place] for place in places]
            written = [t for t in written if isinstance(t, Tensor) and not t.is_inference()]
            if written:
                torch.autograd.graph.increment_version(written)
            return result

        torch.library.impl(name, "default")(run if mutates else function)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._overload(*arguments, **keywords)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What gives empty outputs of the right shapes, as `torch.library.register_fake`."""
        return torch.library.register_fake(self.name, function)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """Its gradient, as `torch.library.register_autograd`. An op without one is to `refuse_gradients`."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)

    def refuse_gradients(self) -> None:
        """Raise in a backward pass, where PyTorch would only warn, and leave gradients out."""

        def refuse(_ctx: Any, *_gradients: Any) -> NoReturn:
            raise NotImplementedError(f"{self.name} has no gradient; detach what it is given")

        self.register_autograd(refuse)


def op(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Decorate a function to make it an `Op`."""
    return lambda function: Op(name, function, mutates)
