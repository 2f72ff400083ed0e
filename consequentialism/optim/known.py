"""The optimizers of which steps in coordinates know what they must: a table of packages and classes.

A class stands under the package that it is imported from, wherever in it the class is defined. docs/optimizers.md is
held to this table, and the table to the packages, by tests/test_emended_known.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Decay = Literal["coupled", "decoupled", "proximal", "within", "none"]
Reads = Literal["change", "weights", "position"]


class Rule(NamedTuple):
    """The properties of a class of optimizers that steps in coordinates depend on.

    Attributes:
        decay: Of its ``weight_decay`` where no option of its own says: added to the gradient; taken from the weights;
            the weights are divided by ``1 + lr * weight_decay`` after the step; a part of the update that the optimizer
            scales; or there is none. None: not known.
        orthogonalises: Whether it makes its update orthogonal, as Muon.
        reads: What its parameter stands for: a zero that becomes the change; the weights, where it reads their size; or
            a position in the coordinates, where it keeps others to compare it with.
        refused: Why it cannot be wrapped.
        without: Options, or attributes of the optimizer, with which its weight decay is another one that is not known.
        only_with: Options, each with the one value with which its weight decay is known.
    """

    decay: Decay | None = None
    orthogonalises: bool = False
    reads: Reads = "change"
    refused: str | None = None
    without: tuple[str, ...] = ()
    only_with: tuple[tuple[str, float], ...] = ()


_COUPLED, _DECOUPLED, _PROXIMAL, _NONE = Rule("coupled"), Rule("decoupled"), Rule("proximal"), Rule("none")
_POSITION, _ORTHOGONAL = Rule("coupled", reads="position"), Rule("decoupled", orthogonalises=True)
_SIZED, _SIZED_WITHIN = Rule("decoupled", reads="weights"), Rule("within", reads="weights")
_BY_OTHER_RATES = ("relative_step", "scale_parameter")
_BY_RATE = Rule("decoupled", reads="weights", without=_BY_OTHER_RATES)
# AdamP decays by wd_ratio of its rate where it projects, which it does not with delta=0, and SGDP over 1 - momentum;
# pytorch_optimizer's add a coupled decay to a gradient that they have read already.
_ADAMP = Rule("decoupled", reads="weights", without=("delta",), only_with=(("weight_decouple", True),))
_SGDP = _ADAMP._replace(without=("delta", "momentum"))
_SHAMPOO = Rule("coupled", without=("momentum",))  # it mixes the momentum in before the decay
_CORRECTED = ("corrected_weight_decay",)
_TIMM, _TIMM_SIZED_WITHIN = Rule("decoupled", without=_CORRECTED), Rule("within", reads="weights", without=_CORRECTED)

_MOVES = Rule(refused="it moves the parameters within a step and asks for the loss there")
_CURVATURE = Rule(refused="it takes a curvature from gradients that it sees outside of its step, in no coordinates")
_LOSS = Rule(refused="it reads the loss that a closure gives it")
_INSIDE = Rule(refused="it steps inside backward, before there is a gradient")
_PROJECTS = Rule(refused="it changes the weights' size itself, which is another one in coordinates")

_BY_PACKAGE: dict[str, dict[Rule, str]] = {
    "torch": {
        _COUPLED: "SGD Adam NAdam RAdam Adamax Adagrad Adadelta RMSprop",
        _DECOUPLED: "AdamW",
        _NONE: "Rprop",
        Rule("coupled", reads="weights"): "ASGD",
        _SIZED: "Adafactor",
        _ORTHOGONAL: "Muon",
        _MOVES: "LBFGS",
        Rule(refused="it takes sparse gradients alone, which have no rows to multiply"): "SparseAdam",
    },
    "consequentialism": {
        _ORTHOGONAL: "MuonWithAdamW",
        _INSIDE: "FusedSGD",
        Rule(refused="it steps in coordinates already"): "Emended",
    },
    "pytorch_optimizer": {
        _COUPLED: "AdaDelta AdaMax Adai AdEMAMix ADOPT AggMo DiffGrad PAdam PID QHAdam QHM RAdam SGDW SWATS",
        _SHAMPOO: "Shampoo",
        _DECOUPLED: "AdaBelief AdaBound AdamC AdaMod AdaNorm AdaPNM AdamWSN Ano BCOS CAME Conda EXAdam Fira GaLore "
        "Grams GrokFastAdamW Kate LaProp Lion PNM RACS SGDSaI SignSGD SimplifiedAdEMAMix SOAP SPAM StableSPAM TAM "
        "Tiger VSGD Yogi",
        _PROXIMAL: "Adan",
        _NONE: "AdaShift Gravity MSVAG SM3",
        _SIZED: "Lamb",
        _BY_RATE: "AdaFactor",
        _ADAMP: "AdamP",
        _SGDP: "SGDP",
        _SIZED_WITHIN: "LARS",
        Rule("within"): "NovoGrad ScalableShampoo",
        _POSITION: "DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD MADGRAD Prodigy Ranger ScheduleFreeAdamW "
        "ScheduleFreeRAdam ScheduleFreeSGD",
        Rule(orthogonalises=True): "MuonBase",
        _CURVATURE: "AdaHessian SophiaH",
        _LOSS: "AliG",
        _PROJECTS: "Fromage Nero",
    },
    "adan_pytorch": {_PROXIMAL: "Adan"},
    "apex": {
        Rule("decoupled", without=("use_master",)): "FusedAdam",
        Rule("coupled", without=("wd_after_momentum",)): "FusedSGD",
        _SIZED_WITHIN: "FusedLAMB",
    },
    "bitsandbytes": {
        _COUPLED: "Adagrad Adagrad8bit Adagrad32bit RMSprop RMSprop8bit RMSprop32bit SGD SGD8bit SGD32bit",
        _DECOUPLED: "Adam Adam8bit Adam32bit AdamW AdamW8bit AdamW32bit AdEMAMix AdEMAMix8bit Lion Lion8bit Lion32bit "
        "PagedAdam PagedAdam8bit PagedAdam32bit PagedAdamW PagedAdamW8bit PagedAdamW32bit PagedAdEMAMix "
        "PagedAdEMAMix8bit PagedLion PagedLion8bit PagedLion32bit",
        _SIZED_WITHIN: "LAMB LAMB8bit LAMB32bit LARS LARS8bit LARS32bit",
    },
    "came_pytorch": {_DECOUPLED: "CAME"},
    "dadaptation": {_POSITION: "DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD"},
    "deepspeed": {_DECOUPLED: "DeepSpeedCPUAdam FusedAdam", _SIZED_WITHIN: "FusedLamb"},
    "galore_torch": {_DECOUPLED: "AdamW"},
    "grokadamw": {_DECOUPLED: "GrokAdamW"},
    "lion_pytorch": {Rule("decoupled", without=("decoupled_wd",)): "Lion"},
    "lomo_optim": {_INSIDE: "Lomo AdaLomo"},
    "optimi": {
        _COUPLED: "Adam RAdam SGD",
        _DECOUPLED: "AdamW Lion",
        Rule("proximal", without=("adam_wd",)): "Adan",  # which it takes, and in some versions leaves aside
        _POSITION: "Ranger",
    },
    "prodigyopt": {_POSITION: "Prodigy"},
    "schedulefree": {
        _POSITION: "AdamWScheduleFree AdamWScheduleFreePaper AdamWScheduleFreeReference RAdamScheduleFree "
        "SGDScheduleFree SGDScheduleFreeReference"
    },
    "timm": {
        _COUPLED: "NAdamLegacy",
        Rule("coupled", without=_CORRECTED): "Adopt RMSpropTF",
        _TIMM: "AdaBelief AdamWLegacy LaProp Lion NAdamW SGDW",
        _DECOUPLED: "RAdamLegacy",
        Rule("decoupled", only_with=(("lr_1d_factor", 1),)): "Mars",
        Rule("decoupled", without=("unscaled_wd", *_CORRECTED)): "AdafactorBigVision",
        Rule("decoupled", reads="weights", without=_BY_OTHER_RATES[:1]): "Adafactor",
        _PROXIMAL: "Adan",
        _ADAMP: "AdamP",
        _SGDP: "SGDP",
        _TIMM_SIZED_WITHIN: "Lamb Lars",
        Rule("within", without=_CORRECTED): "NvNovoGrad",
        _POSITION: "MADGRAD",
        _CURVATURE: "Adahessian",
    },
    "torch_optimizer": {
        _COUPLED: "AdaBound AggMo DiffGrad PID QHAdam SWATS Yogi",
        Rule("coupled", without=("_weight_decouple",)): "AdaBelief",
        _SHAMPOO: "Shampoo",
        _DECOUPLED: "AdaMod RAdam",
        _BY_RATE: "Adafactor",
        _ADAMP: "AdamP",
        _SGDP: "SGDP",
        _SIZED_WITHIN: "Lamb LARS",
        Rule("within"): "NovoGrad",
        _POSITION: "MADGRAD",
        _CURVATURE: "Adahessian",
    },
    "torchao": {
        _COUPLED: "Adam4bit Adam8bit AdamFp8",
        _DECOUPLED: "AdamW4bit AdamW8bit AdamWFp8",
    },
    "transformers": {_BY_RATE: "Adafactor"},
}
KNOWN: dict[tuple[str, str], Rule] = {
    (package, name): rule
    for package, by_rule in _BY_PACKAGE.items()
    for rule, names in by_rule.items()
    for name in names.split()
}
