"""The optimizers that are compared: how each trains, and the grid that it is tuned on.

Every optimizer has eight trials. Those with a learning rate alone have eight of them, each twice the one before; those
with a damping too have four learning rates times two dampings. A trial's ``damping`` is the optimizer's own:
relative for emended layers and in emended coordinates, lambda for ISAAC, and what their packages call damping for SINGD
and K-FAC.

Two forms of this package take part: ``emended-NAME`` converts the layers, ``coordinates-NAME`` steps a plain network in
emended coordinates (`consequentialism.optim.Emended` and ``Muon``), with the package's defaults but for the damping;
``cholesky-NAME`` does so with ``root="cholesky"``, ``outputs-NAME`` with that and with ``output_exponent=1/3``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from consequentialism import convert
from consequentialism.experiments.methods import FACTORIES, Loss, Step, ordinary_step
from consequentialism.experiments.methods import Method as Prepare
from consequentialism.experiments.settings import PREFIX, Trial
from consequentialism.experiments.train import class_loss
from consequentialism.optim import Emended, Muon

COORDINATES = "coordinates-"
CHOLESKY = "cholesky-"
OUTPUTS = "outputs-"
Factory = Callable[[nn.Module, float], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Method:
    """One optimizer.

    Attributes:
        name: As in a CSV.
        label: As in a table.
        prepare: Makes a model's training step of a trial.
        trials: The grid; by whether the task has convolutions.
        module: A package that must be there, None if torch is enough.
        refuses: Why it cannot train a task, by the task's kind: "conv1d", "sequence" or "regression".
    """

    name: str
    label: str
    prepare: Prepare
    trials: Callable[[bool], tuple[Trial, ...]]
    module: str | None = None
    refuses: tuple[tuple[str, str], ...] = ()


def missing(method: Method, kinds: frozenset[str]) -> str | None:
    """Why the method is skipped at a task of these kinds, or None."""
    for kind, reason in method.refuses:
        if kind in kinds:
            return reason
    if method.module is not None:
        try:
            importlib.import_module(method.module)
        except ImportError as error:
            return f"cannot import {method.module}: {error}"
    return None


def is_own(name: str) -> bool:
    """Whether the optimizer is one of this package's forms."""
    return name.startswith((PREFIX, COORDINATES, CHOLESKY, OUTPUTS))


def inside(name: str) -> str:
    """The plain optimizer that a form of this package has inside, or the optimizer itself."""
    return name.removeprefix(PREFIX).removeprefix(COORDINATES).removeprefix(CHOLESKY).removeprefix(OUTPUTS)


def root_of(name: str) -> Literal["auto", "cholesky"]:
    """The root of an optimizer in coordinates."""
    return "cholesky" if name.startswith((CHOLESKY, OUTPUTS)) else "auto"


def output_exponent_of(name: str) -> float:
    """The exponent of an optimizer's roots of outputs, 0 where it has none."""
    return 1 / 3 if name.startswith(OUTPUTS) else 0.0


def _torch(name: str) -> Factory:
    return lambda model, lr: [FACTORIES[name](model.parameters(), lr)]


def _adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=lr)]


def _muon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weights of all linear layers but the last, AdamW with the same rate for the rest."""
    layers = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][:-1]
    chosen = {id(weight) for weight in layers}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr)]
    if layers:
        optimizers.append(torch.optim.Muon(layers, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _soap(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=lr)]


FACTORY: dict[str, Factory] = {name: _torch(name) for name in FACTORIES} | {
    "adamw": _adamw,
    "muon": _muon,
    "soap": _soap,
}


def _prepare(model: nn.Module, trial: Trial, loss: Loss) -> Step:
    if trial.damping is not None:
        convert(model, damping=trial.damping)
    return ordinary_step(model, FACTORY[trial.optimizer.removeprefix(PREFIX)](model, trial.lr), loss)


def _coordinates(model: nn.Module, trial: Trial, loss: Loss) -> Step:
    """Steps in emended coordinates; Muon's as in `_muon`, convolutions counted among its matrices."""
    assert trial.damping is not None
    name = inside(trial.optimizer)
    if name == "muon":
        aux = {"lr": trial.lr}
        muon = Muon(model, trial.lr, aux=aux, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", damping=trial.damping)
        return ordinary_step(model, muon, loss)
    (optimizer,) = FACTORY[name](model, trial.lr)
    beside: dict[str, Any] = {"root": root_of(trial.optimizer), "output_exponent": output_exponent_of(trial.optimizer)}
    return ordinary_step(model, Emended(optimizer, model, damping=trial.damping, **beside), loss)


def _isaac(model: nn.Module, trial: Trial, loss: Loss) -> Step:
    """ISAAC's linear layers, other layers as they are; SGD."""
    import isaac

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                bias = child.bias is not None
                layer = isaac.Linear(child.in_features, child.out_features, la=trial.damping, bias=bias)
                layer.load_state_dict(child.state_dict())
                setattr(module, name, layer.to(child.weight.device))
    return ordinary_step(model, torch.optim.SGD(model.parameters(), lr=trial.lr), loss)


def _singd(model: nn.Module, trial: Trial, loss: Loss) -> Step:
    """SINGD with dense factors for linear layers and convolutions, SGD with momentum for the rest."""
    from singd.optim.optimizer import SINGD

    layers = [module for module in model.modules() if isinstance(module, SINGD.SUPPORTED_MODULES)]
    own = [parameter for layer in layers for parameter in layer.parameters()]
    chosen = {id(parameter) for parameter in own}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    sequences = any(isinstance(module, nn.Embedding) for module in model.modules())
    average = "batch+sequence" if sequences else "batch"
    singd = SINGD(model, own, lr=trial.lr, damping=trial.damping, loss_average=average, warn_unsupported=False)
    others = [torch.optim.SGD(rest, lr=trial.lr, momentum=0.9)] if rest else []
    return ordinary_step(model, [singd, *others], loss)


class _Loss(nn.Module):
    """A loss with torch's ``reduction``, which ASDL sets."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self.reduction = "mean"

    def forward(self, scores: Tensor, y: Tensor) -> Tensor:
        value = self.loss(scores, y)
        return value * y.numel() if self.reduction == "sum" else value


def _kfac(model: nn.Module, trial: Trial, loss: Loss) -> Step:
    """K-FAC of ASDL, its factors inverted every ten steps, and SGD with momentum."""
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    if torch.version.cuda is None:  # ASDL marks its ranges for a profiler that only torch's CUDA build has
        torch.cuda.nvtx.range_push = lambda name: 0  # type: ignore[assignment]
        torch.cuda.nvtx.range_pop = lambda: 0  # type: ignore[assignment]
    kind = "cross_entropy" if loss is class_loss else "mse"
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.lr, momentum=0.9)
    makers: list[KfacGradientMaker] = []

    def step(x: Tensor, y: Tensor) -> Tensor:
        if not makers:  # the number of terms in the loss's mean is known now
            config = PreconditioningConfig(
                data_size=y.numel(), damping=trial.damping, preconditioner_upd_interval=10, ema_decay=0.1
            )
            makers.append(KfacGradientMaker(model, config, loss_type=kind))
        maker = makers[0]
        optimizer.zero_grad()
        scores = maker.setup_model_call(model, x)
        maker.setup_loss_call(_Loss(loss), scores, y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _, value = maker.forward_and_backward()
            except ValueError:  # it draws targets from the scores
                with torch.no_grad():
                    if model(x).isfinite().all():
                        raise
                raise FloatingPointError("the scores are not finite") from None
        optimizer.step()
        return value

    return step


TRIALS = 8


def _rates(name: str, highest: float) -> Callable[[bool], tuple[Trial, ...]]:
    return lambda conv: tuple(Trial(name, float(f"{highest * 2.0**-k:.3g}")) for k in range(TRIALS))


def _product(
    name: str, rates: tuple[float, ...], dampings: tuple[float, ...], conv: tuple[float, ...] | None = None
) -> Callable[[bool], tuple[Trial, ...]]:
    def trials(convolutions: bool) -> tuple[Trial, ...]:
        chosen = conv if convolutions and conv is not None else dampings
        return tuple(Trial(name, lr, damping) for damping in chosen for lr in rates)

    return trials


def _isaac_trials(conv: bool) -> tuple[Trial, ...]:
    """ISAAC's gradient has lambda as a factor: the four rates are of the product."""
    return tuple(Trial("isaac", rate / la, la) for la in (1.0, 10.0) for rate in (0.5, 1.0, 2.0, 4.0))


DAMPINGS = (0.3, 3.0)
# The patches of a convolution are alike, so that few directions hold most of the Gram's trace.
CONV_DAMPINGS = (0.1, 0.4)
LABELS = {
    "sgd": "SGD",
    "nag": "NAG",
    "rmsprop": "RMSProp",
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
}
HIGHEST = {"sgd": 4.0, "nag": 1.0, "rmsprop": 0.032, "adam": 0.032, "adamw": 0.032, "muon": 0.064, "soap": 0.064}
EMENDED_RATES = {
    "sgd": (0.5, 1.0, 2.0, 4.0),
    "nag": (0.05, 0.1, 0.2, 0.4),
    "rmsprop": (0.0005, 0.001, 0.002, 0.004),
    "adam": (0.001, 0.002, 0.004, 0.008),
    "muon": (0.002, 0.004, 0.008, 0.016),
}
# The first of them is the package's default.
COORDINATES_DAMPINGS = (0.03, 0.3)
COORDINATES_RATES = {
    "sgd": (0.25, 0.5, 1.0, 2.0),
    "nag": (0.05, 0.1, 0.2, 0.4),
    "rmsprop": (0.0005, 0.001, 0.002, 0.004),
    "adamw": (0.001, 0.002, 0.004, 0.008),
    "muon": (0.002, 0.004, 0.008, 0.016),
}
CHOLESKY_NAMES = ("rmsprop", "adamw")  # whose steps differ with the root
_ROWS_ONLY = "isaac.Linear takes inputs of two dimensions"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(
            Method(name, label, _prepare, _rates(name, HIGHEST[name]), "pytorch_optimizer" if name == "soap" else None)
            for name, label in LABELS.items()
        ),
        Method("isaac", "ISAAC", _isaac, _isaac_trials, "isaac", (("sequence", _ROWS_ONLY),)),
        Method(
            "singd",
            "SINGD",
            _singd,
            _product("singd", (0.008, 0.02, 0.05, 0.12), (0.001, 0.1)),
            "singd.optim.optimizer",
            (("conv1d", "singd has no Conv1d"),),
        ),
        Method(
            "kfac",
            "K-FAC",
            _kfac,
            _product("kfac", (0.003, 0.01, 0.03, 0.1), (0.03, 0.3)),
            "asdl.precondition",
            (("conv1d", "asdl has no Conv1d"),),
        ),
        *(
            Method(
                PREFIX + name,
                "emended " + LABELS[name],
                _prepare,
                _product(PREFIX + name, rates, DAMPINGS, CONV_DAMPINGS),
            )
            for name, rates in EMENDED_RATES.items()
        ),
        *(
            Method(
                COORDINATES + name,
                LABELS[name] + " in coordinates",
                _coordinates,
                _product(COORDINATES + name, rates, COORDINATES_DAMPINGS),
            )
            for name, rates in COORDINATES_RATES.items()
        ),
        *(
            Method(
                CHOLESKY + name,
                LABELS[name] + " in Cholesky's coordinates",
                _coordinates,
                _product(CHOLESKY + name, COORDINATES_RATES[name], COORDINATES_DAMPINGS),
            )
            for name in CHOLESKY_NAMES
        ),
        Method(
            OUTPUTS + "adamw",
            "AdamW in Cholesky's coordinates, outputs too",
            _coordinates,
            _product(OUTPUTS + "adamw", COORDINATES_RATES["adamw"], COORDINATES_DAMPINGS),
        ),
    )
}
NEVER = {
    "rls": "recursive least squares: no kept package trains networks with it; padasip's filters are single neurons"
}
