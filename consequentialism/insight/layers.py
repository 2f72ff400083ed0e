"""What every layer saw of a batch: its inputs, and the loss's gradient at its outputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..autograd.geometry import Geometry, normalized, normalized_transposed
from ..backend import reference
from ..nn.convert import survey
from ..nn.module import EmendedModule
from ..nn.registry import Form, emended_class, form_of, plain_class
from ..options import Options
from .batch import loss_of, with_stand_ins

READY = ("emended", "not converted")  # the states of `survey` in which a layer can be looked at
BLOCK_BYTES = 2**26  # of rows in float64 that are looked at together, where there are more rows than inputs
_OWN = ("_parameters", "_buffers", "_modules", "training")


@dataclass
class Seen:
    """A layer and its calls.

    Attributes:
        name: The layer's name in the model.
        module: The layer.
        inputs: A copy of the input of each call.
        errors: The loss's gradient at the output of each call.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def form(self) -> Form:
        """Which map the layer computes."""
        form = form_of(_plain(type(self.module)))
        assert form is not None
        return form

    def twin(self, emended: bool, options: Options) -> Any:
        """A layer with the same weight, plain or emended, that no hook or recorder knows of."""
        plain = _plain(type(self.module))
        cls: Any = emended_class(plain, self.form) if emended else plain
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        blank = set(made.__dict__) - set(_OWN) | {"watched", "recorder"}
        made.__dict__.update({key: value for key, value in self.module.__dict__.items() if key not in blank})
        changes_weight = getattr(self.module, "max_norm", None) is not None
        made.__dict__["_parameters"] = {
            key: None if p is None else nn.Parameter(p.detach().clone() if changes_weight else p.detach())
            for key, p in self.module._parameters.items()
        }
        if emended:
            made.set_options(options)
        return made

    def options(self, default: Options) -> Options:
        """The layer's own where it is emended, without a process group: of this rank's batch alone."""
        module = self.module
        return replace(module.options, process_group=None) if isinstance(module, EmendedModule) else default

    @functools.cached_property
    def shape(self) -> Any:
        """An emended twin of a convolution or embedding without weights: for its geometry."""
        made = self.twin(True, Options())
        for name, p in made._parameters.items():
            made._parameters[name] = None if p is None else nn.Parameter(torch.empty_like(p, device="meta"))
        return made

    @property
    def has_bias(self) -> bool:
        """Whether rows have a column of ones."""
        return self.module._parameters.get(self.form.bias) is not None

    def count(self) -> int:
        """How many rows there are, ``N``."""
        linear = self.form.like is nn.Linear
        outputs = [dy.shape[-1] if linear else dy.shape[dy.ndim - self.form.dimensions() + 1] for dy in self.errors]
        return sum(dy.numel() // max(size, 1) for dy, size in zip(self.errors, outputs, strict=True))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Rows ``[groups, N, I]``, with the bias's column of ones, and errors ``[groups, N, O]``, in float64."""
        x = torch.cat([self.rows_of(x) for x in self.inputs], 1)
        return x, torch.cat([self.errors_of(dy) for dy in self.errors], 1)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`rows`, in their order, in pieces of at most `BLOCK_BYTES`, or one line of a sample's positions."""
        for x, dy in zip(self.inputs, self.errors, strict=True):
            if self.form.like is nn.Linear:
                step = max(1, BLOCK_BYTES // (8 * x.shape[-1]))
                for some, errors in zip(_rows(x).split(step), _rows(dy).split(step), strict=True):
                    yield self.rows_of(some), self.errors_of(errors)
                continue
            batch, geometry = self._convolved(x)
            dy = dy if dy.ndim == self.form.dimensions() else dy[None]
            for block in geometry.blocks(batch, BLOCK_BYTES, torch.float64):
                yield self._with_ones(geometry.of_blocks().patches(block.x)), self.errors_of(block.of(dy))

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows of one call's input, as `rows` gives them."""
        if self.form.like is nn.Linear:
            return self._with_ones(_rows(x)[None].to(torch.float64))
        batch, geometry = self._convolved(x)
        return self._with_ones(geometry.patches(batch.to(torch.float64)))

    def _convolved(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """A convolution's input as it reads it, and where."""
        twin = self.shape
        x = x if x.ndim == self.form.dimensions() else x[None]
        kernel, padding = tuple(twin.weight.shape[2:]), twin.padding
        if self.form.like in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
            more = twin.output_padding
            return x, normalized_transposed(kernel, twin.stride, padding, more, twin.groups, twin.dilation)
        if twin.padding_mode != "zeros":
            x, padding = F.pad(x, twin._reversed_padding_repeated_twice, mode=twin.padding_mode), 0
        normal = normalized(x, kernel, twin.stride, padding, twin.dilation, twin.groups)
        assert normal is not None  # forward has run
        return normal

    def errors_of(self, dy: Tensor) -> Tensor:
        """The rows of the gradient at one call's output, as `rows` gives them."""
        dy = dy.to(torch.float64)
        if self.form.like is nn.Linear:
            return _rows(dy)[None]
        return reference.conv_errors(dy if dy.ndim == self.form.dimensions() else dy[None], self.shape.groups)

    def _with_ones(self, rows: Tensor) -> Tensor:
        return rows if not self.has_bias else torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)

    def indices(self) -> tuple[Tensor, Tensor, int, int | None]:
        """An embedding's indices ``[N]``, errors ``[N, E]`` in float64, ``V`` and the index of its zero row."""
        twin = self.shape
        indices = torch.cat([x.reshape(-1) for x in self.inputs]).long()
        errors = torch.cat([dy.reshape(-1, dy.shape[-1]) for dy in self.errors]).to(torch.float64)
        return indices, errors, twin.weight.shape[0], twin.padding_idx


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _plain(cls: type[nn.Module]) -> type[nn.Module]:
    return plain_class(cls) if issubclass(cls, EmendedModule) else cls


def eligible(model: nn.Module) -> tuple[list[Seen], dict[str, str]]:
    """The layers that can be looked at, and why the others cannot, by name.

    Raises:
        ValueError: There is none.
    """
    chosen: list[Seen] = []
    left_out: dict[str, str] = {}
    for name, module, state, parameters in survey(model, optimizers=False):
        name = name.replace("_orig_mod.", "").removeprefix("_orig_mod")  # of torch.compile
        if state not in READY or parametrize.is_parametrized(module):
            left_out[name] = "its parameters are parametrised" if state in READY else state
        elif not any(p.requires_grad for p in parameters):
            left_out[name] = "its parameters want no gradient"
        else:
            chosen.append(Seen(name, module))
    if not chosen:
        why = (
            "; ".join(f"{name or '(itself)'}: {reason}" for name, reason in left_out.items())
            or "it has no layer with a weight"
        )
        raise ValueError(f"model has no layer that can be emended ({why})")
    return chosen, left_out


def look(model: nn.Module, batch: Any, loss_fn: Callable[..., Any]) -> tuple[float, list[Seen], dict[str, str]]:
    """Run a batch: its loss, the layers that took part, and why the others did not, by name.

    Raises:
        ValueError: No layer can be looked at, or none took part.
    """
    chosen, left_out = eligible(model)
    watching = True

    def hook_of(seen: Seen) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            # What no gradient would reach begins a graph here; what follows gets a copy that it may change in place.
            output = output if output.requires_grad else output.detach().requires_grad_()
            if watching:  # and not once more while checkpointing repeats a forward
                seen.inputs.append((args[0] if args else next(iter(kwargs.values()))).detach().clone())
                seen.outputs.append(output)
            return output.clone()

        return hook

    def run() -> tuple[float, Iterator[Tensor | None]]:
        nonlocal watching
        loss = loss_of(model, batch, loss_fn)
        watching = False
        outputs = [output for seen in chosen for output in seen.outputs]
        if not outputs or not loss.requires_grad:
            raise ValueError("loss_fn ran none of the layers that can be emended, or ran them without gradients")
        return float(loss.detach()), iter(torch.autograd.grad(loss, outputs, allow_unused=True))

    handles = [
        seen.module.register_forward_hook(hook_of(seen), prepend=True, with_kwargs=True)  # type: ignore[arg-type]
        for seen in chosen
    ]
    try:
        loss, found = with_stand_ins(model, run)
    finally:
        for handle in handles:
            handle.remove()
    for seen in chosen:
        gradients = [next(found) for _ in seen.outputs]
        reached = [(x, dy) for x, dy in zip(seen.inputs, gradients, strict=True) if dy is not None]
        calls = [(x, dy) for x, dy in reached if dy.numel()]
        seen.inputs, seen.errors, seen.outputs = [x for x, _ in calls], [dy for _, dy in calls], []
        if not calls:
            left_out[seen.name] = "it saw no rows" if reached else "the loss does not depend on it"
    return loss, [seen for seen in chosen if seen.errors], left_out
