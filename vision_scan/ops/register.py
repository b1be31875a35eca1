"""Declares the operators of the library `vision_scan`, each once, in Python.

An operator is a schema, a reference kernel, a fake and an autograd formula. The reference is registered
as `CompositeExplicitAutograd`, so everything works where nothing is compiled; a compiled kernel takes
over by registering the same name for `CPU` or `CUDA` and inherits fake, autograd and tests. The backward
of an operator is an operator of its own, `<name>_backward`, which a compiled kernel may replace too; its
reference differentiates the reference forward, recomputing it, so that only inputs are kept for it. It is
called with a gradient of the first output, and with those of others that have one, else None.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, library

LIBRARY = library.Library("vision_scan", "DEF")
OPERATORS: list[str] = []
REFERENCES: dict[str, Callable] = {}  # of operators and their backward operators
MISSING_KERNELS: dict[str, str] = {}  # device -> why it has no compiled kernels at all
KERNELS: dict[
    tuple[str, str], list["Kernel"]
] = {}  # (operator, device) -> what is asked before the reference
FALLBACKS: dict[str, int] = {}  # calls that went to the reference although there are kernels
GIVEN_UP: dict[str, str] = {}  # operator or its backward -> why another package's kernel is not asked any more
KEEP_INTERMEDIATES = 4_000_000  # elements of the first argument of an operator

_CUT_DISPATCH = torch._C._SetExcludeDispatchKeyGuard
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


class Kernel(NamedTuple):
    """One that may run an operator on a device."""

    backend: str  # its name in reports: "compiled" for one of ours, else the package it comes from
    run: Callable
    serves: Callable[..., bool]  # of the arguments of `run`: whether it can do this call


def register(name: str, inputs: str, num_outputs: int, reference: Callable, fake: Callable) -> Callable:
    """Registers a differentiable operator.

    Args:
        name: operator name, `vision_scan::<name>`.
        inputs: the schema of the arguments, for instance "Tensor x, Tensor? bias, bool flag".
        num_outputs: 1 or 2 tensors are returned.
        reference: the kernel that runs where nothing is compiled; torch functions only.
        fake: the same signature, gives empty outputs of the right shape and dtype.
    Returns:
        The operator, to be called with positional arguments.
    """
    outputs = "Tensor" if num_outputs == 1 else f"({', '.join(['Tensor'] * num_outputs)})"
    LIBRARY.define(f"{name}({inputs}) -> {outputs}")
    _implement(name, _in_full_precision(reference))
    library.register_fake(f"vision_scan::{name}", fake, lib=LIBRARY)
    _register_backward(name, inputs, reference)
    OPERATORS.append(name)
    return _differentiate_directly(name, _in_full_precision(reference))


def _differentiate_directly(name: str, reference: Callable) -> Callable:
    """The operator, or the reference itself where autograd may record it at little cost: there is no
    compiled kernel for them, and they are small enough to keep intermediates instead of computing them
    again."""
    operator = getattr(torch.ops.vision_scan, name).default

    def call(*args):
        first = args[0]
        direct = (
            torch.is_grad_enabled()
            and type(first) is Tensor
            and not first.is_meta
            and first.numel() <= KEEP_INTERMEDIATES
            and not torch.compiler.is_compiling()
            and not any(kernel.serves(*args) for kernel in KERNELS.get((name, first.device.type), ()))
        )
        return reference(*args) if direct else operator(*args)

    return call


def register_inplace(name: str, inputs: str, reference: Callable, fake: Callable) -> Callable:
    """Registers an operator that updates an argument in place (marked `Tensor(a!)`) and returns one
    tensor. It has no gradient: it serves decoding."""
    LIBRARY.define(f"{name}({inputs}) -> Tensor")
    _implement(name, _in_full_precision(reference))
    library.register_fake(f"vision_scan::{name}", fake, lib=LIBRARY)
    OPERATORS.append(name)
    return getattr(torch.ops.vision_scan, name).default


def _implement(name: str, reference: Callable) -> None:
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    REFERENCES[name] = reference


def take_over(
    name: str, device: str, kernel: Callable, serves: Callable[..., bool], backend: str = "compiled"
) -> None:
    """Registers a kernel of an operator (or of `<name>_backward`) for a device type, behind those that are
    registered already: the first that serves a call runs it, and the reference if none does. One of another
    package that fails where the reference does not is not asked again.

    Args:
        device: "cpu" or "cuda".
        kernel: the operator's signature.
        serves: of the same arguments: whether the kernel can do this call.
        backend: the kernel's name in `backend_report`.
    """
    if (name, device) in KERNELS:
        KERNELS[name, device].append(Kernel(backend, kernel, serves))
        return
    chain = KERNELS[name, device] = [Kernel(backend, kernel, serves)]
    reference = REFERENCES[name]

    def run(*args):
        kernel, reason = next((kernel for kernel in chain if kernel.serves(*args)), None), ""
        if kernel is not None:
            try:
                return kernel.run(*args)
            except Exception as error:  # whatever a package built for another torch or another GPU raises
                if kernel.backend == "compiled" or isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = f"{kernel.backend} cannot be used: {type(error).__name__}: {error}".splitlines()[0]
        FALLBACKS[name] = FALLBACKS.get(name, 0) + 1
        result = reference(*args)  # which raises what is the caller's mistake
        if kernel is not None:
            _give_up(name, chain, kernel, reason)
        return result

    LIBRARY.impl(name, run, device.upper())


def _give_up(name: str, chain: list[Kernel], kernel: Kernel, reason: str) -> None:
    if reason not in GIVEN_UP.values():  # a forward and its backward fail to import for one reason
        warnings.warn(f"{reason}; our form in torch takes its place in {name}", stacklevel=3)
    GIVEN_UP[name] = reason
    if kernel in chain:
        chain.remove(kernel)


def take_over_with_gradients(
    name: str,
    device: str,
    kernel: Callable,
    serves: Callable[..., bool],
    serves_backward: Callable[..., bool],
    backend: str,
) -> None:
    """`take_over` of an operator and its backward by a function that autograd can record, such as another
    package's.

    Args:
        serves_backward: of the arguments of `<name>_backward`.
    """
    take_over(name, device, torch.no_grad()(_in_full_precision(kernel)), serves, backend)
    take_over(f"{name}_backward", device, _gradients_of(kernel), serves_backward, backend)


def _in_full_precision(kernel: Callable) -> Callable:
    """A scan accumulates in float32 whatever autocast is active around it."""

    def run(*args):
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if not torch.is_autocast_enabled(device.type):
            return kernel(*args)
        with torch.autocast(device.type, enabled=False):
            return kernel(*args)

    return run


def _gradients_of(function: Callable) -> Callable:
    """The backward of an operator by autograd through a function that computes it."""

    def gradients(grads: Sequence[Tensor | None], *args) -> list[Tensor]:
        *values, needs = args
        # A kernel runs below autograd; the function's own graph has to be recorded nevertheless.
        with _CUT_DISPATCH(_AUTOGRAD, False), torch.enable_grad():
            leaves = [
                value.detach().requires_grad_(need) if isinstance(value, Tensor) else value
                for value, need in zip(values, needs, strict=True)
            ]
            result = function(*leaves)
            result = result if isinstance(result, tuple) else (result,)
            pairs = [
                (out, grad)
                for out, grad in zip(result, grads, strict=True)
                if out.requires_grad and grad is not None
            ]
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        # As the fake promises: memory of its own, laid out like the input.
        return [
            torch.empty_like(leaf, requires_grad=False).copy_(grad)
            for leaf, grad in zip(wanted, found, strict=True)
        ]

    return lambda grads, *args: _in_full_precision(lambda *rest: gradients(grads, *rest))(*args)


def _register_backward(name: str, inputs: str, reference: Callable) -> None:
    def fake_gradients(grads: Sequence[Tensor | None], *args) -> list[Tensor]:
        *values, needs = args
        return [torch.empty_like(value) for value, need in zip(values, needs, strict=True) if need]

    backward_name = f"{name}_backward"
    LIBRARY.define(f"{backward_name}(Tensor?[] grads, {inputs}, bool[] needs) -> Tensor[]")
    _implement(backward_name, _gradients_of(reference))
    library.register_fake(f"vision_scan::{backward_name}", fake_gradients, lib=LIBRARY)
    backward_op = getattr(torch.ops.vision_scan, backward_name).default

    def setup_context(ctx, inputs, output):
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        # A final state that nothing depends on has no gradient, rather than one of zeros.
        ctx.set_materialize_grads(False)
        first = output if isinstance(output, Tensor) else output[0]
        ctx.first_output = first.shape, first.dtype, first.device

    def backward(ctx, *grads):
        if grads[0] is None:
            shape, dtype, device = ctx.first_output
            grads = (torch.zeros(shape, dtype=dtype, device=device), *grads[1:])
        tensors = iter(ctx.saved_tensors)
        values = [
            next(tensors) if is_tensor else constant
            for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
        ]
        needs = list(ctx.needs_input_grad)
        found = iter(backward_op(list(grads), *values, needs))
        return tuple(next(found) if need else None for need in needs)

    library.register_autograd(f"vision_scan::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def backend_report() -> dict[str, dict[str, str | int]]:
    """What runs each operator: {operator: {"cpu": backend, "cuda": backend, "why": str, "fallbacks": int}}.

    A backend is "compiled" (a kernel of ours), the package whose function is asked first where there is none,
    or "reference"; `why` says why one is not "compiled". `fallbacks` counts the calls that went to the
    reference although there are kernels."""
    report = {}
    for name in OPERATORS:
        chains = {device: KERNELS.get((name, device), ()) for device in ("cpu", "cuda")}
        backends = {device: chain[0].backend if chain else "reference" for device, chain in chains.items()}
        missing = [device for device, backend in backends.items() if backend != "compiled"]
        reasons = [MISSING_KERNELS[device] for device in missing if device in MISSING_KERNELS]
        failed = [GIVEN_UP[part] for part in (name, f"{name}_backward") if part in GIVEN_UP]
        reasons += dict.fromkeys(failed)
        report[name] = {
            **backends,
            "why": "; ".join([f"no kernel for {' and '.join(missing)}", *reasons]) if missing else "",
            "fallbacks": FALLBACKS.get(name, 0) + FALLBACKS.get(f"{name}_backward", 0),
        }
    return report
