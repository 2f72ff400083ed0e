"""`convert` and `revert`: emended layers into an existing model and out of it, in place."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from typing_extensions import Unpack

from .._torch import is_dtensor
from ..errors import shown
from ..functional.checks import FLOATING_TYPES
from ..options import Options, OptionsDict, as_number, options_from
from .hooks import drop_spent, stepped_by
from .module import OURS, EmendedModule, begin, hidden_name, restored_beside
from .registry import emended_class, form_of, like_name, plain_class
from .watch import Watch

NOT_CONVERTED = "not converted"
IN_COORDINATES = "stepped in coordinates"
Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    **options: Unpack[OptionsDict],
) -> Model:
    """Turn every layer of ``model`` that can be emended into an emended one, in place.

    Modules stay the same objects with the same parameters, hooks and names; only their class changes, so an existing
    optimizer keeps working. Convert before wrapping in DDP or FSDP2. Layers that cannot be emended are left alone and
    named in one warning: parametrised or tied weights, weights of types other than float16, bfloat16, float32 and
    float64, `torch.nn.MultiheadAttention`, layers without an emended form. Subclasses of torch's layers are converted
    if they do not override forward; see `register` for others. Where nothing is converted, the warning says so.

    Where gradients are accumulated over micro-batches, each is emended by its own Gram, and their sum is not the
    emended gradient of the union. `optim.Emended` with ``memory=0`` takes exactly the step of the union.

    Args:
        model: Any module, also a single layer.
        filter_fn: ``filter_fn(module, fully_qualified_name)`` says which layers to convert; None converts all.
        **options: The fields of `consequentialism.Options`; every layer takes those that it uses. A layer that is
            emended already, also one whose class was made at run time (`parametrize`, ``fully_shard``), takes the
            options that are named, and keeps its others.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: A bad option or argument, or a layer that `optim.Emended` steps in coordinates. Nothing
            is converted in that case.
    """
    _check_model(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable or None, got {filter_fn!r} ({type(filter_fn).__name__})")
    settings = options_from(options)
    tied = _tied_parameters(model)
    attention = _inside_attention(model)
    chosen: list[tuple[str, nn.Module, Options]] = []
    left_alone: list[str] = []
    for name, module in model.named_modules():
        if id(module) in attention or not _has_matrix(module):
            continue
        emended = isinstance(module, EmendedModule)
        candidate = emended or form_of(type(module)) is not None or like_name(type(module)) is not None
        if filter_fn is not None and candidate and not filter_fn(module, name):
            continue
        if candidate and stepped_by(module) is not None:
            raise ValueError(
                f"model: consequentialism.optim.Emended steps layer {name!r} in coordinates already, and a gradient is "
                "emended once; leave the layer out by a filter_fn, there or here"
            )
        reason = _obstacle(module, tied) or (None if emended else _class_obstacle(type(module)))
        if reason is None:
            chosen.append((name, module, module.options.changed(**options) if emended else settings))
        else:
            left_alone.append(f"{_place(name, module)}: {reason}")
    for module in model.modules():
        if isinstance(module, EmendedModule) and module.watched is not None:
            module.watched.watch.expect_no_more()
    watch = Watch(_added_since(model))
    for name, module, taken in chosen:
        emended_before = isinstance(module, EmendedModule)
        if not emended_before:
            form = form_of(type(module))
            assert form is not None
            _swap(module, emended_class(type(module), form))
        module.set_options(taken)  # type: ignore[operator]
        module.qualified_name = name  # type: ignore[assignment]
        if not emended_before:
            watch.add(module)  # type: ignore[arg-type]
    if left_alone or not chosen:
        said = [] if chosen else ["consequentialism.convert converted nothing"]
        said += ["consequentialism.convert left alone " + "; ".join(left_alone)] if left_alone else []
        warnings.warn(": ".join(said), UserWarning, stacklevel=2)
    return model


def _class_obstacle(cls: type[nn.Module]) -> str | None:
    """Why no emended class can be made of a layer's class, if none can."""
    form = form_of(cls)
    if form is None:
        return None
    try:
        emended_class(cls, form)
    except Exception as error:  # what a class does where it is subclassed is its own
        return f"its class cannot be subclassed ({type(error).__name__}: {error})"
    return None


def revert(model: Model) -> Model:
    """Give every emended layer of ``model`` torch's own class again, in place, and a copy's layers no hook of ours.

    A class that was derived at run time from an emended one (by `parametrize`, ``fully_shard`` or a user) is derived
    again from torch's own.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or an emended layer has a class that needs emended code. Nothing is
            reverted in that case.
    """
    _check_model(model)
    emended = [(m, plain_class(type(m))) for m in model.modules() if isinstance(m, EmendedModule)]
    for module in model.modules():
        drop_spent(module)
    for module, plain in emended:
        if module.watched is not None:
            module.watched.leave(module)
        _take_beside_away(module)
        _swap(module, plain)
    return model


def emend_again(made: Any, emended: type[EmendedModule], saved: dict[str, Any]) -> None:
    """Called on what a class's own ``__deepcopy__`` or ``__reduce__`` has made: it is plain where it names its class.

    Args:
        made: The copy, or what was unpickled.
        emended: The class of the layer that it was made of.
        saved: What `module.saved_beside` gave for that layer.
    """
    if not isinstance(made, nn.Module):
        return
    if type(made) is emended._emended_plain:  # which this process may not have registered
        _swap(made, emended)
    elif not isinstance(made, EmendedModule):
        convert(made, filter_fn=lambda module, _: module is made)  # warns where it has no emended form
    if isinstance(made, EmendedModule):
        _take_beside_away(made)
        beside = restored_beside(saved, Options())
        made.__dict__.update(beside)
        made.set_options(beside["options"])
        begin(made)


def param_groups(model: nn.Module, *, lr: Any, other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Divide the parameters into optimizer groups: the emended layers' with ``lr``, the rest with ``other``.

    Args:
        model: A model with emended layers.
        lr: The learning rate of the emended parameters; with ``scale="nlms"`` it is NLMS's step size.
        other: The options of the other group, such as ``{"lr": 1e-3, "weight_decay": 0.1}``.

    Returns:
        Up to two groups, each with ``"params"``; a group without parameters is left out.

    Raises:
        TypeError, ValueError: ``model`` is not a module, ``lr`` is not a number, or ``other`` is not a mapping or names
            ``"params"``.
    """
    _check_model(model)
    if not isinstance(lr, torch.Tensor):
        lr = as_number("lr", lr)
    if not isinstance(other, Mapping):
        raise TypeError(f"other must be a dict of optimizer options, got {other!r} ({type(other).__name__})")
    if "params" in other:
        raise ValueError("other must not name 'params': param_groups fills them in")
    emended = {id(p) for m in model.modules() if isinstance(m, EmendedModule) for p in m.emended_parameters()}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in emended], "lr": lr},
        {"params": [p for p in parameters if id(p) not in emended], **other},
    ]
    return [group for group in groups if group["params"]]


def survey(model: nn.Module, optimizers: bool = True) -> Iterator[tuple[str, nn.Module, str, Iterable[nn.Parameter]]]:
    """Every module with a matrix of its own: its name, itself, its state and its parameters.

    The state is whether it is emended, what steps it in coordinates, or why neither.

    Args:
        optimizers: Whether optimizers in coordinates count; without, the state is that of the layer alone.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    tied, attention = _tied_parameters(model), _inside_attention(model)
    for name, module in model.named_modules():
        if id(module) in attention or not _has_matrix(module):
            continue
        if isinstance(module, EmendedModule):
            yield name, module, "emended", module.emended_parameters()
        else:
            whole = isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)
            by = stepped_by(module) if optimizers else None
            state = _obstacle(module, tied) or NOT_CONVERTED if by is None else f"{IN_COORDINATES} by {by}"
            yield name, module, state, module.parameters(recurse=whole)


def _added_since(model: nn.Module) -> Callable[[], list[str]]:
    """A function that names the trained layers that `convert` would take and that ``model`` does not have yet."""
    known, reference = weakref.WeakSet(model.modules()), weakref.ref(model)

    def added() -> list[str]:
        now = reference()
        return [
            name
            for name, module, state, parameters in (() if now is None else survey(now))
            if state == NOT_CONVERTED and module not in known and any(p.requires_grad for p in parameters)
        ]

    return added


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")


def _swap(module: nn.Module, new_class: type[nn.Module]) -> nn.Module:
    module.__class__ = new_class
    return module


def _take_beside_away(module: nn.Module) -> None:
    """Leave an instance the attributes of its plain class alone."""
    for name in OURS:
        module.__dict__.pop(name, None)


def _tied_parameters(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds."""
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {parameter for parameter, count in holders.items() if count > 1}


def _inside_attention(model: nn.Module) -> set[int]:
    """The modules inside a MultiheadAttention; the attention itself is named instead."""
    attention = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    return {id(inner) for m in attention for inner in m.modules() if inner is not m}


def _has_matrix(module: nn.Module) -> bool:
    if isinstance(module, parametrize.ParametrizationList):  # the parametrised module is named
        return False
    weights = (p for p in module._parameters.values() if p is not None)
    return parametrize.is_parametrized(module) or any(is_lazy(p) or p.ndim >= 2 for p in weights)


def _place(name: str, module: nn.Module) -> str:
    """A module's name, or those of its own parameters where it is the parent of layers and no layer."""
    if not _is_parent(module):
        return name or "(the model itself)"
    matrices = [key for key, p in module._parameters.items() if p is not None and (is_lazy(p) or p.ndim >= 2)]
    return ", ".join(f"{name}.{key}" if name else key for key in matrices)


def _is_parent(module: nn.Module) -> bool:
    if isinstance(module, (EmendedModule, nn.MultiheadAttention)) or parametrize.is_parametrized(module):
        return False
    known = form_of(type(module)) is not None or like_name(type(module)) is not None
    return not known and any(True for _ in module.children())


def _obstacle(module: nn.Module, tied: set[int]) -> str | None:
    """Why this module cannot be emended, or None."""
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention passes its weights around its modules"
    if isinstance(module, EmendedModule):
        return None
    if parametrize.is_parametrized(module):
        return "its parameters are parametrised"
    if any(is_lazy(p) for p in module._parameters.values() if p is not None):
        return f"{kind} has no shape yet; convert after its first forward"
    if _is_parent(module):
        return f"a parameter of {kind} itself, which is no layer"
    form = form_of(type(module))
    if form is None:
        like = like_name(type(module))
        return f"{kind} has no emended form" if like is None else f"{kind} is a subclass of {like} with code of its own"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    weight = module._parameters.get(form.weight)
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed, not a parameter"
    for name in (form.weight, form.bias):
        unserved = _unserved(module._parameters.get(name))
        if unserved is not None:
            return f"its {name} is {unserved}"
    if weight.ndim != form.dimensions():
        return f"its {form.weight} has {weight.ndim} dimensions, not the {form.dimensions()} of {form.like.__name__}"
    if any(id(p) in tied for p in module._parameters.values() if p is not None):
        return "its weight is tied to another module's"
    if form.like is nn.Embedding and getattr(module, "scale_grad_by_freq", False):
        return "scale_grad_by_freq already divides by the counts"
    hidden = hidden_name(module, form.like)
    if hidden is not None:
        return f"it has an attribute {hidden!r}, which an emended layer has too, for itself: rename it"
    return form.obstacle(module)


def _unserved(parameter: torch.Tensor | None) -> str | None:
    """What a parameter is that no emended layer takes, or None."""
    if parameter is None:
        return None
    if parameter.dtype not in FLOATING_TYPES:
        return f"{parameter.dtype}"
    if parameter.layout != torch.strided:
        return f"{parameter.layout}"
    if type(parameter) is nn.Parameter or is_dtensor(parameter) or isinstance(parameter, FakeTensor):
        return None
    return f"a {type(parameter).__name__}"
