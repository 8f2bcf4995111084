"""A module and example inputs -> which indices of which parameters are one and the same unit.

The module runs once, under a mode that sees every torch function. Beside each tensor goes one of the same shape that says of
each number which unit it belongs to. What only moves numbers (views, slices, concatenations, padding) is done to these as it is
to the numbers, and needs no rules; what works on each number for itself makes units one where it joins them; convolutions and
linear layers end units, along their columns, and begin new ones, along their rows. Anything else *pins* the units that come to
it: they cannot be folded, and the reason is kept.

Torch-Pruning's dependency graph, which follows autograd's functions instead, knows no channels padded on (the shortcuts of
ResNets without parameters) and gives no reason for what it leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

NOBODY = -1  # of padding: zeros that no unit makes


class Axis(NamedTuple):
    """A dimension of a parameter or buffer along which units lie. ``block``: of a grouped convolution, which group."""

    name: str
    dim: int
    block: int | None = None


class Producer(NamedTuple):
    """A convolution or linear layer: the axis of its rows, and its bias."""

    rows: Axis
    bias: str | None


class Normalisation(NamedTuple):
    """A BatchNorm with statistics. ``producer``: what it alone reads the output of; None: it reads a sum, a concatenation, or
    what others read too."""

    producer: Producer | None
    mean: str
    var: str
    weight: str | None
    shift: str | None
    eps: float


@dataclass
class Traced:
    """What a run has shown.

    Attributes
    ----------
    axes : dict of Axis to Tensor, (size,), int64
        The unit at every index.
    roles : dict of Axis to str
        ``out`` (rows that make units), ``in`` (columns that read them), ``rider`` (values beside them).
    pinned : dict of int to str
        Units that cannot be folded, and why.
    normalisations : list of Normalisation
    layer_norms : list of Axis
        The weights of ``nn.LayerNorm`` along units.
    repeated : set of str
        Weights that more than one product uses.
    """

    axes: dict[Axis, Tensor] = field(default_factory=dict)
    roles: dict[Axis, str] = field(default_factory=dict)
    pinned: dict[int, str] = field(default_factory=dict)
    normalisations: list[Normalisation] = field(default_factory=list)
    layer_norms: list[Axis] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)


def trace(module: nn.Module, example_inputs: Sequence[Any]) -> Traced:
    """Run ``module`` on ``example_inputs``, in the mode it is in, and see which units it has."""
    run = _Trace(module)
    with torch.no_grad(), run:
        outputs = module(*example_inputs)
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            run.pin(run.units(leaf), "they are the module's output")
    return run.result()


class _Trace(TorchFunctionMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._traced = Traced()
        self._parent: list[int] = []
        self._units: dict[int, Tensor] = {}
        self._seen: list[Tensor] = []  # or id() could be another's later
        self._used: Counter[int] = Counter()
        self._made: dict[int, Producer] = {}
        self._normalised: list[tuple[int, Normalisation]] = []
        self._reasons: list[tuple[Tensor, str]] = []
        self._layers = dict(module.named_modules())
        self._names = {id(tensor): name for name, tensor in [*module.named_buffers(), *module.named_parameters()]}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "out" or value is not None}
        shapes = {id(leaf): leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        self._name = name.rpartition(".")[2].strip("_")
        if not outs:
            if self._name in _LEAVES:
                self._unknown(f"forward takes them out of torch by {name}", args, kwargs, [])
            return out
        self._used.update(shapes.keys())
        rule = _RULES.get(self._name)
        if rule is None or any(each.shape != shapes.get(id(each), each.shape) for each in outs):
            self._unknown(f"{name} takes them together", args, kwargs, outs)
        else:
            what = (func, out) if rule in (_Trace._move, _Trace._pad) else (out,)
            try:
                rule(self, *what, *args, **kwargs)
            except (TypeError, ValueError, IndexError, AssertionError, RuntimeError):  # called in a way the rule does not know
                self._unknown(f"{name} takes them together", args, kwargs, outs)
        return out

    # Units

    def new(self, count: int) -> Tensor:
        """So many new units."""
        begin = len(self._parent)
        self._parent.extend(range(begin, begin + count))
        return torch.arange(begin, begin + count)

    def units(self, tensor: Tensor) -> Tensor:
        """Of each of its numbers. Of what no rule made, an input or a constant, pinned ones."""
        if id(tensor) not in self._units:
            wide = [dim for dim, size in enumerate(tensor.shape) if size > 1]
            name = self._names.get(id(tensor))
            if name is not None and len(wide) == 1:
                along = self.axis(Axis(name, wide[0]), tensor.shape[wide[0]], "rider")
                self.put(tensor, _spread(along, wide[0], tensor.shape))
            else:
                for axis in self._axes_of(tensor):
                    self.pin(axis, f"{name} is used whole")
                self._one(tensor, f"they meet {name or 'an input or a constant'}, which is used whole")
        return self._units[id(tensor)]

    def _one(self, tensor: Tensor, reason: str) -> None:
        """All of it is one new unit, pinned."""
        self.put(tensor, self.pin(self.new(1), reason).view(()).expand(tensor.shape))

    def put(self, tensor: Tensor, units: Tensor) -> None:
        assert units.shape == tensor.shape, (units.shape, tensor.shape)
        self._units[id(tensor)] = units
        self._seen.append(tensor)

    def axis(self, axis: Axis, size: int, role: str) -> Tensor:
        """The units along a parameter's dimension: new ones where it is met for the first time."""
        if axis not in self._traced.axes:
            self._traced.axes[axis] = self.new(size)
            self._traced.roles[axis] = role
        elif (role == "in") != (self._traced.roles[axis] == "in"):
            self.pin(self._traced.axes[axis], f"{axis.name} both makes and reads them")
        return self._traced.axes[axis]

    def join(self, a: Tensor, b: Tensor) -> None:
        """Index by index, one and the same unit from now on; zeros that nobody makes are anybody's."""
        pairs = torch.stack((a.flatten(), b.flatten()))
        for one, other in pairs[:, (pairs != NOBODY).all(0)].unique(dim=1).T.tolist():
            one, other = self._root(one), self._root(other)
            self._parent[max(one, other)] = min(one, other)

    def pin(self, units: Tensor, reason: str) -> Tensor:
        self._reasons.append((_compact(units).unique(), reason))
        return units

    def along(self, units: Tensor, dim: int) -> Tensor:
        """The units along one dimension: all that lie at the same index of it become one."""
        flat = _compact(units, dim).movedim(dim, 0).flatten(1)
        first = flat.max(1).values
        if flat.shape[1] > 1:
            self.join(first[:, None].expand_as(flat), flat)
        return first

    def result(self) -> Traced:
        traced = self._traced
        for axis, units in traced.axes.items():
            traced.axes[axis] = torch.tensor([self._root(unit) for unit in units.tolist()])
        makers = Counter(
            unit for axis, units in traced.axes.items() if traced.roles[axis] == "out" for unit in set(units.tolist())
        )
        for axis in traced.layer_norms:
            units = traced.axes[axis]
            if any(makers[unit] > 1 for unit in units.tolist()):
                self.pin(units, f"{axis.name.rpartition('.')[0]}, a layer_norm, takes a sum of layers together")
        for units, reason in self._reasons:
            for unit in units.tolist():
                if unit != NOBODY:
                    traced.pinned.setdefault(self._root(unit), reason)
        ids = {name: number for number, name in self._names.items()}
        for made, each in self._normalised:
            alone = each.producer and self._used[made] == 1 and each.producer.rows.name not in traced.repeated
            for name in (each.mean, each.var, each.weight, each.producer and each.producer.bias):
                alone = alone and (name is None or self._used[ids[name]] == 1)
            traced.normalisations.append(each if alone else each._replace(producer=None))
        return traced

    def _root(self, unit: int) -> int:
        while self._parent[unit] != unit:
            self._parent[unit] = unit = self._parent[self._parent[unit]]
        return unit

    # What functions do to them

    def _unknown(self, reason: str, args: Any, kwargs: Any, outs: Sequence[Tensor]) -> None:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                for axis in self._axes_of(leaf):
                    self.pin(axis, reason)
                self.pin(self.units(leaf), reason)
        for each in outs:
            self._one(each, reason)

    def _axes_of(self, tensor: Tensor) -> list[Tensor]:
        """Of a parameter that a rule has seen, or will see: its rows and columns."""
        name = self._names.get(id(tensor))
        if name is None:
            return []
        axes = [Axis(name, dim) for dim in range(tensor.dim())]
        roles = [self._traced.roles.get(axis, "in" if axis.dim else "out") for axis in axes]
        return [self.axis(axis, size, role) for axis, size, role in zip(axes, tensor.shape, roles, strict=True)]

    def _move(self, func: Any, out: Any, *args: Any, **kwargs: Any) -> None:
        """Numbers change places: so do the units, by the same function."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        before = [self.units(tensor) for tensor in tensors]
        if self._name == "roll":
            dims = kwargs.get("dims", args[2] if len(args) > 2 else None)
            dims = [dims] if isinstance(dims, int) else dims or range(out.dim())
            if {dim % out.dim() for dim in dims} & set(_varying(before[0])):
                return self._unknown("forward rolls them by a fixed number", args, kwargs, [out])
        of = {id(tensor): units for tensor, units in zip(tensors, before, strict=True)}
        args, kwargs = tree_map(lambda leaf: of.get(id(leaf), leaf), (args, kwargs))
        after = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor, units in zip(outs, [leaf for leaf in tree_leaves(after) if isinstance(leaf, Tensor)], strict=True):
            self.put(tensor, units)
            for whole in before:
                if len(_varying(units)) > max(len(_varying(each)) for each in before):
                    self.pin(whole, "forward splits them into parts of a fixed size")
                elif _known(whole) - _known(units) and not _known(units).isdisjoint(_known(whole)):
                    self.pin(whole, "forward takes a fixed part of them")

    def _pad(self, func: Any, out: Tensor, x: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> None:
        units = self.units(x)
        beside = NOBODY
        if any(out.shape[dim] != x.shape[dim] for dim in _varying(units)):
            reason = "forward pads them with a fixed number of channels"
            self.pin(units, reason)
            beside = int(self.pin(self.new(1), reason))
        elif value:
            self.pin(units, f"forward pads them with {value}")
        self.put(out, func(units.double(), pad, mode, beside if mode == "constant" else None).long())

    def _each(self, out: Tensor, *args: Any, **kwargs: Any) -> None:
        """Each number for itself, or with those at its place of other tensors, of which some are repeated there."""
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        sizes = {id(each): (1,) * (out.dim() - each.dim()) + tuple(each.shape) for each in operands}
        known = [each for each in operands if id(each) in self._units and id(each) not in self._names] or operands[:1]
        if not known:
            return self._one(out, "they meet a number that is computed")
        known.sort(key=lambda each: -len(_varying(self.units(each))))
        units = self.units(known[0]).view(sizes[id(known[0])]).expand(out.shape)
        vary = _varying(units)
        for operand in [*known[1:], *(each for each in operands if all(each is not one for one in known))]:
            size, name = sizes[id(operand)], self._names.get(id(operand))
            meets = any(size[dim] > 1 for dim in vary)
            if name is not None and meets and len(vary) == 1:
                axis = Axis(name, vary[0] - (out.dim() - operand.dim()))
                other = _spread(self.axis(axis, size[vary[0]], "rider"), vary[0], out.shape)
            elif id(operand) not in self._units:
                if meets:
                    self.pin(units, "they meet a constant of fixed size" if name is None else f"they meet {name}")
                continue
            else:
                other = self.units(operand).view(size).expand(out.shape)
            if meets and set(_varying(other)) <= set(vary):
                self._join_places(units, other)
                units = torch.where(units == NOBODY, other, units) if bool((_compact(units) == NOBODY).any()) else units
            elif _varying(other):
                self.pin(units, "forward joins each with each of others")
                self.pin(other, "forward joins each with each of others")
        self.put(out, units)

    def _join_places(self, a: Tensor, b: Tensor) -> None:
        dims = [dim for dim in range(a.dim()) if dim not in {*_varying(a), *_varying(b)}]
        for dim in dims:
            a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
        self.join(a, b)

    def _convolution(self, out: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        values = dict(zip(("bias", "stride", "padding", "dilation", "groups"), args, strict=False), **kwargs)
        self._product(out, x, weight, values.get("bias"), values.get("groups", 1), -(weight.dim() - 1), (0, 1))

    def _transposed(self, out: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        names = ("bias", "stride", "padding", "output_padding", "groups", "dilation")
        values = dict(zip(names, args, strict=False), **kwargs)
        if values.get("groups", 1) > 1:
            self._unknown("a grouped transposed convolution takes them together", (x, weight), {}, [out])
        else:
            self._product(out, x, weight, values.get("bias"), 1, -(weight.dim() - 1), (1, 0))

    def _linear(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self._product(out, x, weight, bias, 1, -1, (0, 1))

    def _product(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, dim: int, at: tuple[int, int]
    ) -> None:
        """Columns of the weight end the units of x along ``dim``; rows begin new ones. ``at``: the weight's rows, columns."""
        name = self._names.get(id(weight))
        if name is None:
            reason = "their weight is computed, not a parameter (parametrized layers: remove_parametrizations first)"
            return self._unknown(reason, (x, weight), {}, [out])
        rows, columns = at
        width, made = weight.shape[columns], weight.shape[rows]
        read = self.along(self.units(x), x.dim() + dim)
        first = not any(Axis(name, rows, block) in self._traced.axes for block in (None, 0))
        if groups == 1:
            self.join(read, self.axis(Axis(name, columns), width, "in"))
            begun = self.axis(Axis(name, rows), made, "out")
        elif width == 1:  # depthwise: what comes out of a channel is of its unit
            begun = self.axis(Axis(name, rows), made, "out")
            self.join(read.repeat_interleave(made // groups), begun)
        else:
            for block, part in enumerate(read.chunk(groups)):
                self.join(part, self.axis(Axis(name, columns, block), width, "in"))
            blocks = [self.axis(Axis(name, rows, block), made // groups, "out") for block in range(groups)]
            begun = torch.cat(blocks)
        biased = None
        if bias is not None:
            biased = self._names.get(id(bias))
            if biased is None:
                self.pin(begun, "their bias is computed, not a parameter")
            else:
                self.join(begun, self.axis(Axis(biased, 0), made, "rider"))
        self.put(out, _spread(begun, out.dim() + dim, out.shape))
        if not first:
            self._traced.repeated.add(name)
        if rows == 0 and (groups == 1 or width == 1):
            self._made[id(out)] = Producer(Axis(name, rows), biased)

    def _embedding(self, out: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        name = self._names.get(id(weight))
        if name is None:
            return self._unknown("their weight is computed, not a parameter", (weight,), {}, [out])
        self.put(out, _spread(self.axis(Axis(name, 1), weight.shape[1], "out"), out.dim() - 1, out.shape))

    def _batch_norm(
        self,
        out: Tensor,
        x: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        use_input_stats: bool = True,
    ) -> None:
        values = [running_mean, running_var, weight, bias]
        names = [None if value is None else self._names.get(id(value)) for value in values]
        along = self.along(self.units(x), 1)
        if any(value is not None and name is None for value, name in zip(values, names, strict=True)):
            self.pin(along, "what their BatchNorm multiplies by is computed, not a parameter")
        for name in names:
            if name is not None:
                self.join(along, self.axis(Axis(name, 0), len(along), "rider"))
        self.put(out, _spread(along, 1, out.shape))
        if self._name == "batch_norm" and names[0] is not None and names[1] is not None:
            made = Normalisation(self._made.get(id(x)), names[0], names[1], names[2], names[3], eps)
            self._normalised.append((id(x), made))

    def _layer_norm(
        self,
        out: Tensor,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        """Of an ``nn.LayerNorm``, which can be told how many units each stands for; along them alone."""
        names = [self._names.get(id(each)) for each in (weight, bias) if each is not None]
        layer = (names[0] or "").rpartition(".")[0] if names else ""
        own = names in ([f"{layer}.weight"], [f"{layer}.weight", f"{layer}.bias"])
        last = x.dim() - 1
        if type(self._layers.get(layer)) is not nn.LayerNorm or not own or _varying(self.units(x)) != [last]:
            return self._unknown("layer_norm takes them together", (x, weight, bias), {}, [out])
        along = self.along(self.units(x), last)
        for name in names:
            self.join(along, self.axis(Axis(str(name), 0), len(along), "rider"))
        self._traced.layer_norms.append(Axis(f"{layer}.weight", 0))
        self.put(out, _spread(along, last, out.shape))

    def _per_channel(self, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Within channels, dimension 1, whatever happens along those behind it."""
        along = self.along(self.units(x), 1)
        for each in tree_leaves(out):
            self.put(each, _spread(along, 1, each.shape))

    def _pool(self, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
        dim = x.dim() - 1 - int(self._name[-2])
        along = self.along(self.units(x), dim)
        for each in tree_leaves(out):
            self.put(each, _spread(along, dim, each.shape))

    def _prelu(self, out: Tensor, x: Tensor, weight: Tensor) -> None:
        units = self.units(x)
        if weight.numel() > 1:
            name = self._names.get(id(weight))
            if name is None:
                self.pin(units, "their slope is computed, not a parameter")
            else:
                self.join(self.along(units, 1), self.axis(Axis(name, 0), weight.numel(), "rider"))
        self.put(out, units)

    def _reduce(self, out: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> None:
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if isinstance(dim, Tensor):
            return self._each(out, x, dim)
        dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
        dims = [each % max(1, x.dim()) for each in dims]
        units = self.units(x)
        if not isinstance(keepdim, bool) or set(dims) & set(_varying(units)):
            return self._unknown(f"{self._name} takes them together", (x,), {}, outs)
        for each in outs:
            self.put(each, units.amax(tuple(dims), keepdim))

    def _normalize(self, out: Tensor, x: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> None:
        self._along_dim(out, x, dim)

    def _along_dim(self, out: Tensor, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> None:
        if not isinstance(dim, int) or dim % x.dim() in _varying(self.units(x)):
            return self._unknown(f"{self._name} takes them together", (x,), {}, [out])
        self.put(out, self.units(x))


def _spread(along: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Units along one dimension, the same everywhere else."""
    return along.view([-1 if each == dim else 1 for each in range(len(shape))]).expand(*shape)


def _varying(units: Tensor) -> list[int]:
    """The dimensions along which not all is one unit."""
    wide = [dim for dim in range(units.dim()) if units.shape[dim] > 1 and units.stride(dim) != 0]
    return [dim for dim in wide if bool((units != units.narrow(dim, 0, 1)).any())]


def _compact(units: Tensor, keep: int | None = None) -> Tensor:
    """One index is enough where all are alike."""
    for dim in range(units.dim()):
        if dim != keep and units.shape[dim] > 1 and units.stride(dim) == 0:
            units = units.narrow(dim, 0, 1)
    return units


def _known(units: Tensor) -> set[int]:
    return set(_compact(units).unique().tolist()) - {NOBODY}


_LEAVES = {"setitem", "numpy", "array", "tolist", "item"}  # no tensor comes back, but numbers get where units are not followed
_MOVES = """
view reshape flatten unflatten ravel permute transpose swapaxes movedim t squeeze unsqueeze expand expand_as chunk split
tensor_split unbind select narrow getitem cat concat concatenate stack repeat flip roll pixel_shuffle pixel_unshuffle
view_as reshape_as
"""
_EACH = """
relu relu6 elu selu celu gelu silu mish sigmoid logsigmoid tanh softplus softsign hardtanh hardswish hardsigmoid leaky_relu
threshold hardshrink dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout clone contiguous detach to
float double half bfloat16 type clamp clamp_min clamp_max abs neg exp log sqrt rsqrt square pow add sub mul div radd rsub
rmul rtruediv iadd isub imul itruediv truediv subtract multiply divide maximum minimum where nan_to_num erf sin cos gt lt ge le
eq ne logical_and logical_or logical_not
"""
_POOLS = [f"{kind}_pool{dims}d" for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max") for dims in (1, 2, 3)]
_RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(_MOVES.split(), _Trace._move),
    **dict.fromkeys(_EACH.split(), _Trace._each),
    **dict.fromkeys(_POOLS, _Trace._pool),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _Trace._convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _Trace._transposed),
    **dict.fromkeys(["interpolate", "upsample"], _Trace._per_channel),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "max", "min", "std", "var"], _Trace._reduce),
    **dict.fromkeys(["softmax", "log_softmax", "cumsum"], _Trace._along_dim),
    **dict.fromkeys(["batch_norm", "instance_norm"], _Trace._batch_norm),
    "layer_norm": _Trace._layer_norm,
    "normalize": _Trace._normalize,
    "linear": _Trace._linear,
    "embedding": _Trace._embedding,
    "prelu": _Trace._prelu,
    "pad": _Trace._pad,
}
