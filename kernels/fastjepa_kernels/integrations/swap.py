"""Exchanging the class of modules in place: what the integrations share.

A module keeps its identity, parameters, buffers, hooks and place in the model; only its class becomes a
subclass of what it was. So the state dict, optimizers and wrappers around the model see no difference, and a
call that the packed path does not take goes to the class underneath.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from fastjepa_kernels.checks import require


class Swapped(nn.Module):
    """The first base of a class that was put in the place of another, `original`, the second base."""

    original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: a copy or a file names what it is made from.
        return _new_swapped, (type(self).__bases__[0], self.original), self.__getstate__()


def _new_swapped(packed: type[Swapped], original: type[nn.Module]) -> nn.Module:
    cls = swapped_class(packed, original)
    return cls.__new__(cls)


# One class for all modules of a kind: torch.compile would compile each of several anew.
_MADE: dict[tuple[type, type], type[Swapped]] = {}


def swapped_class(packed: type[Swapped], original: type[nn.Module]) -> type[Swapped]:
    """`original` with the forward of `packed`, which finds the former one by super()."""
    if (packed, original) not in _MADE:
        name = f"Packed{original.__name__}"
        _MADE[packed, original] = type(name, (packed, original), {"original": original})
    return _MADE[packed, original]


class Patched:
    """What a patch replaced, and the way back. As a context manager it undoes the patch at the end.

    Attributes:
        names: of the modules that this patch replaced, as in `model.named_modules()`.
        kept: name and reason, for modules of the right class that keep their own attention.
    """

    def __init__(self, replaced: Mapping[str, Any], kept: Mapping[str, str]) -> None:
        self._replaced = dict(replaced)
        self.names = tuple(replaced)
        self.kept = dict(kept)

    def undo(self) -> None:
        """Give the replaced modules their class back. A second call changes nothing."""
        for module in self._replaced.values():
            module.__class__ = module.original
        self._replaced.clear()

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patched(names={list(self.names)}, kept={self.kept})"


def class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def why_unknown(module: nn.Module, parameters: tuple[str, ...], children: frozenset[str]) -> str | None:
    """Why a module of the right name is not what the packed path was written for; None if it is.

    Another version of the library may compute something else under the same name.
    """
    if "forward" in vars(module):
        return "its forward was replaced by another tool"
    if tuple(inspect.signature(type(module).forward).parameters) != ("self", *parameters):
        return f"its forward does not take ({', '.join(parameters)}): another version of the library"
    if unknown := {name for name, _ in module.named_children()} - children:
        return f"it has modules that are not known: {', '.join(sorted(unknown))}"
    return None


def swap(
    model: nn.Module,
    packed: type[Swapped],
    classes: frozenset[str],
    why_not: Callable[[Any], str | None],
) -> Patched:
    """Put `packed` before the class of every module of `model` that `classes` names.

    Args:
        model: anything with modules, wrapped or not.
        packed: whose forward is to run.
        classes: dotted names. Names, so that no library needs to be imported; subclasses, which may compute
            something else, are not taken.
        why_not: the reason for which a module keeps its own attention, or None.

    Raises:
        ValueError: `model` is no module, or has none of these classes.
    """
    require(isinstance(model, nn.Module), f"model must be a torch.nn.Module, got {type(model).__name__}")
    replaced: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    already = False
    for name, module in model.named_modules():
        already |= isinstance(module, packed)
        if class_path(module) not in classes:
            continue
        if reason := why_not(module):
            kept[name] = reason
        else:
            module.__class__ = swapped_class(packed, type(module))
            replaced[name] = module
    if not (replaced or kept or already):
        there = {class_path(m) for m in model.modules() if "Attention" in type(m).__name__}
        raise ValueError(
            f"{type(model).__name__} has nothing to patch: looked for {', '.join(sorted(classes))}; "
            f"of attention it has {', '.join(sorted(there)) or 'nothing by that name'}"
        )
    if not (replaced or already):
        name, reason = next(iter(kept.items()))
        warnings.warn(
            f"{type(model).__name__} keeps its own attention everywhere; {name}: {reason}", stacklevel=3
        )
    return Patched(replaced, kept)
