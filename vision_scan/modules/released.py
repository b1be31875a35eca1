"""Released weights under the names and in the shapes that earlier versions of the authors' code gave them."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


class Released(nn.Module):
    """A module that also loads weights of older names and of other shapes with the same entries.

    `load_state_dict` takes them as they are; where tensors are assigned in another way, `adapt_released` rewrites
    them first. A subclass names in `old_names` the beginnings of names, relative to itself, and what they are here.
    """

    old_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_before_loading)

    def adapt(self, tensors: dict[str, Any], prefix: str) -> None:
        """Rewrites in place what of `tensors` lies below `prefix`: names first, then shapes."""
        for name in [name for name in tensors if name.startswith(prefix)]:
            own = name[len(prefix) :]
            old = next((old for old in self.old_names if own.startswith(old)), None)
            if old is not None:
                tensors[prefix + self.old_names[old] + own[len(old) :]] = tensors.pop(name)
        for name, parameter in self.named_parameters():
            given = tensors.get(prefix + name)
            if isinstance(given, Tensor) and _is_other_view(given, parameter):
                tensors[prefix + name] = given.reshape(parameter.shape)


def adapt_released(module: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under the names and in the shapes of `module`, as far as its parts know how; the rest as it is."""
    adapted = dict(tensors)
    for name, part in module.named_modules():
        if isinstance(part, Released):
            part.adapt(adapted, f"{name}." if name else "")
    return adapted


def _before_loading(module: Released, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    module.adapt(tensors, prefix)


def _is_other_view(given: Tensor, own: Tensor) -> bool:
    """Whether a matrix is given as a convolution of one cell, or with an axis of its own for the visiting lists."""
    if own.dim() != 2 or given.dim() <= 2:
        return False
    is_convolution = given.shape[:2] == own.shape and given.numel() == own.numel()
    return is_convolution or (given.dim() == 3 and given.flatten(0, 1).shape == own.shape)
