"""Decoding on a GPU: a step of a Mamba-2 stack as three kernels a layer, replayed as one CUDA graph.

The kernels of csrc/cuda: `project` norms the tokens, multiplies with in_proj and moves the convolution's
window on; `ssd_update` advances the state and gates; `project` norms again, multiplies with out_proj and adds
to the residual stream. With more tokens than that kernel takes, norms, products (cuBLAS) and convolution are
kernels of their own. States are updated where they lie, so a graph belongs to their addresses: it is recorded
the second time that a step comes with the same ones.
"""

import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .decode import UnservableError

MOST_GRAPHS = 4
MOST_ROWS, MOST_TAPS, MOST_STATES = 65535, 16, 256  # of a batch, a convolution, a head: csrc/cuda/update.h
ALIGNMENT = 16  # bytes

Launch = Callable[[], object]


class Mamba2Layer(NamedTuple):
    """A layer's own tensors and numbers; in_proj gives z, x, B, C, dt."""

    norm: Tensor
    in_proj: Tensor
    out_proj: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    gate_norm: Tensor
    eps: float
    nheads: int
    headdim: int
    ngroups: int
    d_state: int
    d_conv: int
    gate_eps: float
    dt_min: float
    dt_max: float
    norm_before_gate: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:9]

    @property
    def d_inner(self) -> int:
        return self.nheads * self.headdim

    @property
    def group_size(self) -> int:
        return self.d_inner // self.ngroups

    @property
    def channels(self) -> int:
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def width(self) -> int:
        return self.d_inner + self.channels + self.nheads

    def check(
        self, d_model: int, dtype: torch.dtype, conv: Tensor, ssm: Tensor, scale: Tensor | None, batch: int
    ) -> None:
        """Raises ValueError unless the layer and a batch's states are what the kernels take."""
        d_inner, channels = self.d_inner, self.channels
        if self.d_conv > MOST_TAPS or self.d_state > MOST_STATES or self.nheads % self.ngroups:
            raise ValueError(
                f"d_conv {self.d_conv}, d_state {self.d_state} or ngroups {self.ngroups}: not served"
            )
        check("norm.weight", self.norm, (d_model,))
        check("in_proj", self.in_proj, (self.width, d_model), dtype)
        check("out_proj", self.out_proj, (d_model, d_inner), dtype)
        check("conv1d.weight", self.conv_weight, (channels, 1, self.d_conv), dtype)
        check("conv1d.bias", self.conv_bias, (channels,), dtype)
        for name in ("dt_bias", "A_log", "D"):
            check(name, getattr(self, name), (self.nheads,))
        check("gated norm.weight", self.gate_norm, (d_inner,))
        check("state conv", conv, (batch, channels, self.d_conv - 1), dtype)
        size = batch, self.nheads, self.headdim
        check("state ssm", ssm, (*size, self.d_state), torch.float32 if scale is None else torch.int8)
        if scale is not None:
            check("state ssm_scale", scale, size)


class Step:
    """A step's buffers, of fixed addresses, and its kernels in order."""

    def __init__(
        self, shape: torch.Size, keep: int, vocab: int, dtype: torch.dtype, device, *, few, masked
    ) -> None:
        self._new = functools.cache(functools.partial(_buffer, device))
        self._dtype, self._few = dtype, few
        self._delta: Tensor | None = None  # what the residual stream still lacks
        self.launches: list[Launch] = []
        self.hidden = self._new("hidden", *shape, dtype=torch.float32)  # the residual stream
        self.marks = self._new("marks", *shape[:2], dtype=torch.uint8) if masked else None  # 1: padding
        self.logits = self._new("logits", shape[0], keep, vocab, dtype=torch.float32)

    def read(self, hidden: Tensor, real: Tensor | None) -> None:
        self.hidden.copy_(hidden)
        if self.marks is not None:
            torch.logical_not(real[:, None], out=self.marks)

    def launch(self) -> None:
        for kernel in self.launches:
            kernel()

    def add_layer(self, layer: Mamba2Layer, conv: Tensor, ssm: Tensor, scale: Tensor | None) -> None:
        tokens, wide = self.hidden.shape[:2], torch.float32 if self._few else self._dtype
        projected = self._new("projected", *tokens, layer.width, dtype=wide)
        y = self._new("y", *tokens, layer.d_inner, dtype=wide)
        window = conv, layer.conv_weight[:, 0], layer.conv_bias
        self.add_projection(
            self.hidden,
            layer.norm,
            layer.eps,
            layer.in_proj,
            projected,
            window=window,
            first_channel=layer.d_inner,
        )
        groups = layer.ngroups * layer.d_state
        z, x, B, C, dt = projected.split([layer.d_inner, layer.d_inner, groups, groups, layer.nheads], dim=-1)
        z_heads, x = (t.unflatten(-1, (layer.nheads, layer.headdim)) for t in (z, x))
        B, C = (t.unflatten(-1, (layer.ngroups, layer.d_state)) for t in (B, C))
        self._add(
            "ssd_update", ssm, scale, x, dt, layer.A_log, True, B, C, layer.D,
            None if layer.norm_before_gate else z_heads, layer.dt_bias, True, layer.dt_min, layer.dt_max,
            self.marks, None, y.view(x.shape), self._few,
        )  # fmt: skip
        self.add_projection(
            y, layer.gate_norm, layer.gate_eps, layer.out_proj, self.hidden, group_size=layer.group_size,
            gate=z if layer.norm_before_gate else None,
        )  # fmt: skip

    def add_projection(
        self, x, norm, eps, weight, to, *, group_size=None, gate=None, window=None, first_channel=0
    ) -> None:
        """Norms tokens, of as many as `to` has the last, and multiplies them with a weight.

        Args:
            x: (batch, seqlen, d).
            to: (batch, keep, out); the residual stream is added to.
            gate: (batch, seqlen, d), behind the norm.
            window: state, weight and bias of a convolution of the outputs from `first_channel` on.
        """
        keep, adds, group_size = to.shape[1], to is self.hidden, group_size or x.shape[-1]
        if self._few:
            self._add(
                "project", x, keep, norm, eps, group_size, gate, weight, to, adds, *(window or [None] * 3),
                first_channel, self.marks if window else None, bool(self.launches),
            )  # fmt: skip
            return
        normed = self._new("normed", x.shape[0], keep, x.shape[2], dtype=self._dtype)
        delta = self._delta if x is self.hidden else None
        self._add("normalize", x, keep, delta, norm, eps, group_size, gate, normed)
        product = self._new("delta" if adds else "product", *to.shape, dtype=self._dtype)
        if adds:
            self._delta = product
        elif to.dtype == self._dtype:
            product = to
        self.launches.append(
            functools.partial(torch.mm, normed.flatten(0, 1), weight.t(), out=product.flatten(0, 1))
        )
        if not adds and product is not to:
            self.launches.append(functools.partial(to.copy_, product))
        if window:
            state, weight, bias = window
            channels = to[..., first_channel : first_channel + len(weight)].transpose(1, 2)
            self._add("conv_update", state, channels, weight, bias, True, self.marks, None, channels)

    def _add(self, kernel: str, *arguments) -> None:
        self.launches.append(
            functools.partial(getattr(torch.ops.vision_scan_cuda, kernel).default, *arguments)
        )


class CudaDecoder:
    """What torch.classes.vision_scan_cpu.Decoder is on a CPU: collects the layers, then makes steps."""

    def __init__(self, norm: Tensor, eps: float, head: list[Tensor], vocab: int) -> None:
        self._norm, self._eps, self._head, self._vocab = norm, eps, _weight(head), vocab
        self._layers: list[Mamba2Layer] = []
        self._tensors = [norm, self._head]
        self._places = None  # of these tensors, once all layers are there
        self._graphs: OrderedDict[tuple, tuple[Step, Launch]] = OrderedDict()
        self._seen: deque[tuple] = deque(maxlen=MOST_GRAPHS)  # the last steps without a graph

    def add_mamba2(self, norm, eps, in_proj, out_proj, parameters, sizes, constants) -> None:
        *numbers, norm_before_gate = constants
        layer = Mamba2Layer(
            norm,
            _weight(in_proj),
            _weight(out_proj),
            *parameters,
            eps,
            *sizes,
            *numbers,
            bool(norm_before_gate),
        )
        self._layers.append(layer)
        self._tensors += layer.tensors

    def add_mamba1(self, *layer) -> None:
        raise UnservableError

    add_attention = add_mlp = add_mamba1

    def step(
        self, hidden: Tensor, states: list[Tensor], starts: Tensor, real: Tensor | None, keep: int
    ) -> Tensor:
        """Reads tokens into the states, conv and ssm of each layer, which are updated in place. An ssm may be
        of 8 bits, (batch, nheads, headdim, d_state) int8; its scale (batch, nheads, headdim) follows it.

        Args:
            hidden: (batch, seqlen, d_model) float32.
            starts: not needed by these layers.
            real: (batch,) bool, False: the row's one token is padding; or None.
            keep: logits of the last so many tokens.
        Returns:
            logits: (batch, keep, vocab) float32.
        Raises:
            ValueError: if a tensor is of another shape, dtype or layout than the kernels take; the states are
                as they were.
        """
        if self._places is None:
            self._places = torch.classes.vision_scan_cuda.Places(self._tensors)
        key = hidden.shape, keep, real is None, self._places.with_others(states)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        else:
            step = self._bind(hidden, states, real, keep)
            if key not in self._seen or not can_record(hidden.device):
                self._seen.append(key)
                step.read(hidden, real)
                step.launch()
                return step.logits
            self._graphs[key] = step, record(step)
            step.launches = []  # they would keep the states alive
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        step, replay = self._graphs[key]
        step.read(hidden, real)
        replay()
        return step.logits.clone()

    def _bind(self, hidden: Tensor, states: list[Tensor], real: Tensor | None, keep: int) -> Step:
        """Checks everything, so that nothing can fail half-way, and lists the kernels."""
        dtype, device = self._head.dtype, hidden.device
        if hidden.dim() != 3:
            raise ValueError(f"hidden must have 3 axes, got {hidden.dim()}")
        batch, seqlen, d_model = hidden.shape
        check("hidden", hidden, (batch, seqlen, d_model))
        if not 1 <= keep <= seqlen:
            raise ValueError(f"keep must be from 1 to seqlen {seqlen}, got {keep}")
        if not 1 <= batch <= MOST_ROWS:
            raise ValueError(f"batch must be from 1 to {MOST_ROWS}, got {batch}")
        if real is not None:
            check("real", real, (batch,), torch.bool)
            if seqlen > 1:
                raise ValueError(f"rows of padding have one token, got {seqlen}")
        found = list(zip(self._layers, split_by_layer(states, len(self._layers)), strict=True))
        check("norm_f.weight", self._norm, (d_model,))
        check("lm_head", self._head, (self._vocab, d_model), dtype)
        for layer, state in found:
            layer.check(d_model, dtype, *state, batch)
        for tensor in [*self._tensors, *states, *([] if real is None else [real])]:
            if tensor.device != device:
                raise ValueError(f"all tensors must be on {device}, got one on {tensor.device}")
        sizes = {(d_model, d_model), *((layer.d_inner, layer.group_size) for layer in self._layers)}
        fits = torch.ops.vision_scan_cuda.project_fits
        few = all(fits(dtype, batch * seqlen, d, group, device.index or 0) for d, group in sizes)
        step = Step(hidden.shape, keep, self._vocab, dtype, device, few=few, masked=real is not None)
        for layer, state in found:
            step.add_layer(layer, *state)
        step.add_projection(step.hidden, self._norm, self._eps, self._head, step.logits)
        return step


def split_by_layer(states: list[Tensor], layers: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """conv and ssm of each layer, and the scale that follows an ssm of int8.

    Raises:
        ValueError: if there are more or fewer.
    """
    rest, found = deque(states), []
    while len(rest) >= 2:
        conv, ssm = rest.popleft(), rest.popleft()
        found.append((conv, ssm, rest.popleft() if ssm.dtype == torch.int8 and rest else None))
    if rest or len(found) != layers:
        raise ValueError(f"expected {2 * layers} states, and a scale behind each of int8, got {len(states)}")
    return found


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Raises ValueError unless a tensor is as the kernels take it."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} must begin at a multiple of {ALIGNMENT} bytes")


def can_record(device: torch.device) -> bool:
    """Whether there are graphs to be recorded, and nobody is recording already."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def record(step: Step) -> Launch:
    """The step's kernels as one graph; recording runs nothing."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(step.hidden.device)
    stream.wait_stream(torch.cuda.current_stream(step.hidden.device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step.launch()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(step.hidden.device).wait_stream(stream)
    return graph.replay


def _buffer(device: torch.device, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """Where something is kept in between. Layers of one size share it: each reads before the next writes."""
    return torch.empty(shape, dtype=dtype, device=device)


def _weight(stored: list[Tensor]) -> Tensor:
    """A projection's weight; codes and scales are for the CPU."""
    if len(stored) != 1:
        raise UnservableError
    return stored[0]
