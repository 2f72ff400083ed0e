"""`Muon`: hidden matrices by Muon in emended coordinates, the rest by AdamW, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..options import as_count, as_number
from ..solve.root import Kind as RootKind
from . import steps
from .at_once import AtOnce
from .checks import check_model, check_rate
from .composite import AttentionInput, composite_kinds
from .emended import Emended
from .layers import Kind, Lookup, kind_of
from .rules import kept_share

ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False}
_ADAM_ONLY = {"maximize": False, "capturable": False, "fused": None}


class Muon(Emended):
    """Muon in emended coordinates for the hidden matrices of a model, AdamW for its other parameters.

    The hidden matrices are the weights of linear layers, convolutions and `torch.nn.MultiheadAttention`. A
    convolution's weight is a matrix with a row for each output. Of an attention, ``in_proj_weight`` is stepped as its
    three matrices, and ``out_proj`` without coordinates, because its input arises inside (`left_alone` names it). The
    last such layer of several is taken for the head, and is not hidden; nor is a weight that an embedding shares. AdamW
    steps embeddings, the head, recurrent layers, biases, norms and parameters of no known layer, without coordinates.

        optimizer = cw.optim.Muon(model, lr=0.02, aux=dict(lr=1e-3))

    Args:
        model: The model. All its parameters that require gradients are stepped.
        lr: The learning rate of the hidden matrices.
        aux: AdamW's options: ``lr``, which is required, and ``betas``, ``eps``, ``weight_decay`` and ``amsgrad``.
        momentum: At least 0 and below 1.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: The decoupled weight decay of the hidden matrices.
        ns_coefficients, ns_steps, eps, adjust_lr_fn: As in `torch.optim.Muon`.
        qkv: The last parts of the names of layers whose matrix holds those of queries, keys and values above one
            another, such as ``("c_attn",)``. Each of the three is orthogonalised on its own; without, they are one
            matrix.
        damping, exponent, scale, memory, refresh_every, block, process_group, shard_state, root: As in `Emended`. By
            default the exponent is 1/4, a refresh comes every 25 steps and blocks are of 128 inputs.
        filter_fn: ``filter_fn(module, fully_qualified_name)`` says which layers' weights are hidden matrices; None: as
            above.

    Raises:
        TypeError, ValueError: As `Emended`; an ``aux`` without ``lr`` or with an unknown option.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        *,
        aux: Mapping[str, Any],
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        eps: float = 1e-7,
        adjust_lr_fn: str | None = None,
        qkv: Sequence[str] = (),
        damping: float = 0.03,
        exponent: float | None = None,
        scale: Any = "auto",
        memory: float = 0.95,
        refresh_every: int | None = None,
        block: int | None = None,
        process_group: Any = "auto",
        shard_state: bool = False,
        root: RootKind = "auto",
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
    ) -> None:
        check_model(model, filter_fn)
        options = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "eps": eps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        hidden = hidden_matrices(model, filter_fn)
        inner = MuonWithAdamW(model, hidden, qkv, options, aux)
        chosen = {id(module) for module, _ in hidden.values()}
        super().__init__(
            inner,
            model,
            damping=damping,
            exponent=exponent,
            scale=scale,
            memory=memory,
            refresh_every=refresh_every,
            block=block,
            process_group=process_group,
            shard_state=shard_state,
            root=root,
            filter_fn=lambda module, _: id(module) in chosen,
        )


def hidden_matrices(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None
) -> dict[str, tuple[nn.Module, Kind]]:
    """The layers whose weights Muon takes, by name."""
    found: dict[str, tuple[nn.Module, Kind]] = {}
    looked_up: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            kinds, _ = composite_kinds(module)
            found.update({f"{name}.{own.weight_name}".lstrip("."): (module, own) for own in kinds})
            continue
        kind = kind_of(module)
        if isinstance(kind, Lookup) or isinstance(module, nn.Embedding):
            looked_up.add(id(module.weight) if kind is None or isinstance(kind, str) else id(kind.weight(module)))
        elif isinstance(kind, Kind) and isinstance(kind.weight(module), nn.Parameter):
            found[name] = module, kind
    wanted = {name: pair for name, pair in found.items() if pair[1].weight(pair[0]).requires_grad}
    if filter_fn is not None:
        return {name: pair for name, pair in wanted.items() if filter_fn(pair[0], name)}
    if len(wanted) > 1:
        del wanted[next(reversed(wanted))]
    return {name: pair for name, pair in wanted.items() if id(pair[1].weight(pair[0])) not in looked_up}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, told apart by their groups' ``use_muon``."""

    def __init__(
        self,
        model: nn.Module,
        hidden: Mapping[str, tuple[nn.Module, Kind]],
        qkv: Sequence[str],
        options: dict[str, Any],
        aux: Mapping[str, Any],
    ) -> None:
        options, own = _checked(options), _checked_aux(aux)
        if not hidden:
            raise ValueError("model: it has no hidden matrix; choose some by filter_fn")
        _check_qkv(qkv, hidden)
        parts: dict[int, list[Any]] = {}
        taken: set[int] = set()
        for name, (module, kind) in hidden.items():
            weight = kind.weight(module)
            if id(weight) in taken:
                continue
            taken.add(id(weight))
            count = 3 if any(_ends(name, end) for end in qkv) else 1
            if isinstance(kind, AttentionInput):
                count = 3
            elif count == 3 and (weight.shape[0] % 3 or not kind.outputs_first):
                raise ValueError(
                    f"qkv: layer {name!r} has no three matrices one over the other in a weight {list(weight.shape)}"
                )
            parts.setdefault(count, []).append(weight)
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        groups: list[dict[str, Any]] = [
            {"params": weights, "use_muon": True, "parts": count, **options} for count, weights in parts.items()
        ]
        if rest:
            groups.append({"params": rest, "use_muon": False, **own, **_ADAM_ONLY})
        super().__init__(groups, {"use_muon": True, "parts": 1, **options})

    emended_rule = staticmethod(steps.muon_with_adam)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        for gradient in gradients:
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"gradients must be dense, got a {gradient.layout} one of shape {list(gradient.shape)}"
                )
        at_once = AtOnce(self, (), self.emended_rule, together=True)
        at_once.take()
        done = {id(parameter) for parameter in at_once.others}
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p.grad is not None and id(p) not in done]
            entries = [steps.Entry(p, steps.local(p.grad), self.state[p], group) for p in chosen]
            for entry in entries if group["use_muon"] else steps.adamw_(entries):
                (change,) = self.emended_rule([entry._replace(gradient=entry.gradient.clone())])
                steps.local(entry.parameter).mul_(kept_share(group)).add_(change)
        return loss


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Muon's options, numbers as Python's own."""
    own: dict[str, Any] = {"lr": _rate("lr", options["lr"]), "momentum": as_number("momentum", options["momentum"])}
    if not 0 <= own["momentum"] < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {own['momentum']!r}")
    own |= {name: _at_least_0(name, options[name]) for name in ("weight_decay", "eps")}
    own["nesterov"] = _flag("nesterov", options["nesterov"])
    coefficients = options["ns_coefficients"]
    if not isinstance(coefficients, Sequence) or len(coefficients) != 3:
        raise ValueError(f"ns_coefficients must be three numbers, got {coefficients!r}")
    own["ns_coefficients"] = tuple(as_number("ns_coefficients", value, "three numbers") for value in coefficients)
    own["ns_steps"] = as_count("ns_steps", options["ns_steps"], "an integer of at least 1")
    if options["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        raise ValueError(f"adjust_lr_fn must be None, 'original' or 'match_rms_adamw', got {options['adjust_lr_fn']!r}")
    return {**options, **own}


def _checked_aux(aux: Any) -> dict[str, Any]:
    """AdamW's options, likewise."""
    if not isinstance(aux, Mapping):
        raise TypeError(f"aux must be a dict of AdamW's options, got {aux!r} ({type(aux).__name__})")
    unknown = [name for name in aux if name not in ("lr", *ADAMW)]
    if "lr" not in aux or unknown:
        raise ValueError(f"aux must have 'lr' and may have {', '.join(map(repr, ADAMW))}, got {dict(aux)!r}")
    own: dict[str, Any] = {**ADAMW, **aux}
    own["lr"] = _rate("aux['lr']", own["lr"])
    betas = own["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"aux['betas'] must be two numbers, got {betas!r}")
    own["betas"] = tuple(as_number("aux['betas']", beta, "two numbers") for beta in betas)
    if not all(0 <= beta < 1 for beta in own["betas"]):
        raise ValueError(f"aux['betas'] must be at least 0 and below 1, got {betas!r}")
    own |= {name: _at_least_0(f"aux[{name!r}]", own[name]) for name in ("eps", "weight_decay")}
    own["amsgrad"] = _flag("aux['amsgrad']", own["amsgrad"])
    return own


def _check_qkv(qkv: Any, hidden: Iterable[str]) -> None:
    if isinstance(qkv, str) or not isinstance(qkv, Sequence):
        raise TypeError(f"qkv must be a sequence of names, got {qkv!r} ({type(qkv).__name__})")
    for end in qkv:
        if not isinstance(end, str):
            raise TypeError(f"qkv must be a sequence of names, got one with {end!r} ({type(end).__name__})")
        if not any(_ends(name, end) for name in hidden):
            raise ValueError(
                f"qkv: no name of a hidden matrix ends in {end!r}; they are {', '.join(map(repr, hidden))}"
            )


def _ends(name: str, end: str) -> bool:
    """Whether the last parts of a layer's name are these."""
    return name == end or name.endswith("." + end)


def _rate(name: str, lr: Any) -> float | Tensor:
    check_rate(name, lr)
    return lr if isinstance(lr, Tensor) else float(lr)


def _at_least_0(name: str, value: Any) -> float:
    number = as_number(name, value)
    if not number >= 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value
