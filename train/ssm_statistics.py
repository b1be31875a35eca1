"""How far the recurrences of a language model step, and how large their states grow."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from train.objectives import Objective


class SSMStatistics:
    """Looks on while an objective runs, between `begin` and `end`; it reads, and changes no number.

    Of the micro-batches of this process, padding left out:

    - `dt_mean`, `dt_max`: of the step sizes dt = softplus(dt + dt_bias), over tokens, heads (Mamba-2,
      Gated DeltaNet) or channels (Mamba) and layers;
    - `state_norm`: the root mean square of an element of the states behind the last token, over layers and rows; where
      rows are padded, those without padding.

    What an objective reads behind its `input_ids`, or a second time, is not looked at.

    Args:
        objective: its language model is looked at.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._pad_id = objective.model.tokenizer.pad_id
        mixers: Iterable[Any] = objective.model.lm.layers.modules()
        self._mixers = [mixer for mixer in mixers if hasattr(mixer, "step_projection")]
        self._hooks: list[RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        self._real: Tensor | None = None
        self._read: dict[nn.Module, int] = {}
        self._states: dict[nn.Module, Tensor] = {}
        self._dt: list[Tensor] = []  # sum, count, largest
        self._squares: list[Tensor] = []  # sum, count

    def begin(self) -> None:
        """From now on."""
        self.end()
        if not self._mixers:
            return
        self._hooks = [
            self._objective.register_forward_pre_hook(self._begin_batch),
            self._objective.register_forward_hook(self._end_batch),
        ]
        for mixer in self._mixers:
            projection = getattr(mixer, mixer.step_projection)
            self._hooks.append(projection.register_forward_hook(self._step_hook(mixer)))
            self._hooks.append(mixer.register_forward_hook(self._keep_state))

    def end(self) -> dict[str, float]:
        """No longer; what was seen, empty if that is nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        found: dict[str, float] = {}
        if self._dt:
            sums, counts, largest = torch.stack(self._dt).unbind(1)
            found["dt_mean"] = (sums.sum() / counts.sum()).item()
            found["dt_max"] = largest.amax().item()
        if self._squares:
            squares, counts = torch.stack(self._squares).sum(0).tolist()
            found["state_norm"] = (squares / counts) ** 0.5
        self._forget()
        return found

    def _begin_batch(self, module: nn.Module, arguments: tuple) -> None:
        ids = arguments[0].get("input_ids")
        self._real = None if ids is None else ids != self._pad_id
        self._read = dict.fromkeys(self._mixers, 0)

    def _end_batch(self, module: nn.Module, arguments: tuple, result: object) -> None:
        """Takes the last state of each layer: a row that is read in segments has several. What runs later, to compute
        activations again, is not looked at."""
        if self._real is not None:
            full = self._real[:, -1].float()
            for state in self._states.values():
                squares = state.float().square().flatten(1).mean(1)
                self._squares.append(torch.stack([(squares * full).sum(), full.sum()]))
        self._real, self._states = None, {}

    def _step_hook(self, mixer: Any) -> Callable[..., None]:
        def look(projection: nn.Module, arguments: tuple, projected: Tensor) -> None:
            if self._real is None:
                return
            start = self._read[mixer]
            self._read[mixer] = end = start + projected.shape[1]
            if end > self._real.shape[1]:
                return
            real = self._real[:, start:end, None]
            with torch.no_grad():
                dt = mixer.step_sizes(projected.detach()) * real
                self._dt.append(torch.stack([dt.sum(), (real.sum() * dt.shape[-1]).float(), dt.amax()]))

        return look

    def _keep_state(self, mixer: nn.Module, arguments: tuple, result: tuple) -> None:
        if self._real is not None and self._read[mixer] <= self._real.shape[1]:
            self._states[mixer] = result[1]["ssm"].detach()
