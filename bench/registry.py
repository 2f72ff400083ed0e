"""The registry: every op that is measured, the numbers of its shapes, its providers, and what is measured unasked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from consequentialism.errors import UserError

from .case import Case
from .coordinate_cases import decayed_gram_case, inverse_root_case, root_product_case
from .op_cases import (
    damped_inverse_case,
    damped_inverses_case,
    emended_input_case,
    fused_weight_grad_case,
    input_gram_case,
    weight_grad_case,
)
from .roofline import DTYPES
from .shapes import Batch, ConvShape, LinearShape, NetworkShape, Order, Shape
from .step_cases import conv_case, linear_case, network_case, step_case
from .timing import Device


@dataclass(frozen=True)
class Op:
    """An op. Its shapes by the occasion: "cpu", "cuda", and "rehearsal" of the latter on the processor."""

    name: str
    make: Callable[[str, Any, str, Device], Case]
    shape: type[Any]
    numbers: str  # that a shape is written with
    shapes: dict[str, Sequence[Any]]
    quick: dict[str, int] = field(default_factory=dict)  # so many of the shapes where it must be quick; else all
    dtypes: tuple[str, ...] | None = None  # measured unasked, where they are not the device's
    halves: bool = True  # whether it takes half-precision types
    not_quick: tuple[str, ...] = ("compiled",)  # providers left out where it must be quick, unless asked for

    def parse(self, numbers: Sequence[int]) -> Shape | None:
        """A shape of these numbers, or None where they are too few or too many."""
        if self.shape is NetworkShape:
            return NetworkShape(numbers[0], tuple(numbers[1:])) if len(numbers) > 2 else None
        return self.shape(*numbers) if len(numbers) == self.numbers.count(",") + 1 else None


LAYERS_CPU = (
    LinearShape(64, 784, 1600, 1.15),
    LinearShape(128, 784, 256, 1.30),
    LinearShape(128, 1024, 1024, 1.25),
    LinearShape(256, 1024, 4096, 1.20),
    LinearShape(512, 2048, 2048, 1.25),
)
LAYERS_CUDA = (
    LinearShape(64, 784, 1600, 1.5),
    LinearShape(128, 1024, 1024, 1.5),
    LinearShape(256, 4096, 4096, 1.25),
    LinearShape(512, 4096, 11008, 1.35),
    LinearShape(1024, 4096, 4096, 1.6),
    LinearShape(8192, 1024, 4096, 1.6),
)
SMALL = (LinearShape(9, 20, 12), LinearShape(40, 12, 7))  # dual and primal
CONVS_CPU = (
    ConvShape(128, 16, 32, 3, 1, 1, 14, 2.0),
    ConvShape(64, 3, 64, 7, 2, 1, 64, 1.6),
    ConvShape(64, 64, 64, 3, 1, 64, 32, 1.3),
    ConvShape(64, 64, 64, 3, 1, 1, 32, 2.5),
    ConvShape(64, 128, 128, 3, 1, 1, 8),  # the middle of a ResNet on small images, and what else networks are made of
    ConvShape(64, 256, 256, 3, 1, 1, 8),
    ConvShape(64, 64, 128, 3, 2, 1, 16),
    ConvShape(64, 256, 64, 1, 1, 1, 8),
    ConvShape(64, 64, 256, 1, 1, 1, 16),
    ConvShape(64, 96, 96, 7, 1, 96, 16),
    ConvShape(8, 32, 32, 31, 1, 32, 32),
)
MLP = (784, 1600, 1600, 1600, 1600, 10)  # ISAAC's network for MNIST
PARTS: dict[str, Sequence[Any]] = {
    "cpu": (LinearShape(128, 784, 256), LinearShape(512, 2048, 2048)),
    "cuda": tuple(shape._replace(target=None) for shape in LAYERS_CUDA),
    "rehearsal": SMALL,
}
STEPS: dict[str, Sequence[Any]] = {  # of steps in coordinates
    "cpu": (LinearShape(4096, 256, 1024),),
    "cuda": (LinearShape(65536, 768, 3072), LinearShape(8192, 1024, 4096), LinearShape(4096, 256, 1024)),
    "rehearsal": SMALL,
}
WHOLE = (  # around the thresholds between one launch and the separate kernels
    LinearShape(60, 1600, 10),
    LinearShape(64, 784, 1600),
    LinearShape(128, 256, 256),
    LinearShape(128, 1024, 1024),
    LinearShape(32, 784, 1600),
    LinearShape(128, 4096, 1024),
    LinearShape(128, 1024, 4096),
)
ORDERS = (32, 64, 128, 256, 512, 1024)
PARTS_QUICK = {"cpu": 1, "cuda": 4}
OTHERS = ("reference", "triton")  # Triton compiles for each shape

# The targets' ops first: what there is no time for stands last.
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "linear",
            linear_case,
            LinearShape,
            "N,I,O",
            {"cpu": LAYERS_CPU, "cuda": LAYERS_CUDA, "rehearsal": SMALL},
            {"cpu": 3, "cuda": 4},
        ),
        Op(
            "conv2d",
            conv_case,
            ConvShape,
            "B,C,O,KERNEL,STRIDE,GROUPS,SIDE",
            {
                "cpu": CONVS_CPU,
                "cuda": (ConvShape(256, 64, 64, 3, 1, 1, 32), ConvShape(128, 16, 32, 3, 1, 1, 14)),
                "rehearsal": (ConvShape(2, 4, 6, 3, 1, 1, 8), ConvShape(2, 4, 4, 3, 2, 4, 8)),
            },
            {"cpu": 1, "cuda": 1},
        ),
        Op(
            "step",
            step_case,
            LinearShape,
            "N,I,O",
            {
                "cpu": (LinearShape(256, 1024, 4096),),
                "cuda": (LinearShape(256, 4096, 4096, 0.8),),
                "rehearsal": SMALL,
            },
        ),
        Op(
            "mlp",
            network_case,
            NetworkShape,
            "N,WIDTH,WIDTH,...",
            {
                "cpu": (NetworkShape(60, MLP),),
                "cuda": (NetworkShape(60, MLP, 1.25),),
                "rehearsal": (NetworkShape(12, (20, 30, 30, 10)),),
            },
            dtypes=("float32",),
        ),
        Op(
            "deep",
            network_case,
            NetworkShape,
            "N,WIDTH,WIDTH,...",
            {
                "cpu": (NetworkShape(128, (256,) * 17),),
                "cuda": (NetworkShape(128, (256,) * 17),),
                "rehearsal": (NetworkShape(8, (16,) * 9),),
            },
            {"cpu": 0},
        ),
        Op(
            "fused_weight_grad",
            fused_weight_grad_case,
            LinearShape,
            "N,I,O",
            {"cpu": WHOLE[1:2], "cuda": WHOLE, "rehearsal": SMALL},
            {"cuda": 4},
            not_quick=OTHERS,
        ),
        Op(
            "damped_inverse",
            damped_inverse_case,
            Order,
            "N",
            {
                "cpu": [Order(n) for n in (128, 256, 512)],
                "cuda": [Order(n) for n in ORDERS],
                "rehearsal": (Order(5), Order(33)),
            },
            {"cpu": 1, "cuda": 4},
            dtypes=("float32",),
            halves=False,
            not_quick=OTHERS,
        ),
        Op(
            "damped_inverses",
            damped_inverses_case,
            Batch,
            "N",
            {"cpu": (Batch(128),), "cuda": [Batch(n) for n in ORDERS], "rehearsal": (Batch(5), Batch(33))},
            {"cpu": 0, "cuda": 4},
            dtypes=("float32",),
            halves=False,
            not_quick=OTHERS,
        ),
        Op(
            "decayed_gram",
            decayed_gram_case,
            LinearShape,
            "N,I,O",
            STEPS,
            {"cuda": 1},
            not_quick=OTHERS,
        ),
        Op(
            "inverse_root",
            inverse_root_case,
            Order,
            "N",
            {
                "cpu": [Order(n) for n in (64, 128, 256, 512)],
                "cuda": [Order(n) for n in ORDERS[1:]],
                "rehearsal": (Order(5), Order(33)),
            },
            {"cpu": 1, "cuda": 3},
            dtypes=("float32",),
            halves=False,
            not_quick=OTHERS,
        ),
        Op(
            "root_product",
            root_product_case,
            LinearShape,
            "N,I,O",
            STEPS,
            {"cuda": 1},
            not_quick=OTHERS,
        ),
        Op("input_gram", input_gram_case, LinearShape, "N,I,O", PARTS, PARTS_QUICK, not_quick=OTHERS),
        Op("emended_input", emended_input_case, LinearShape, "N,I,O", PARTS, PARTS_QUICK, not_quick=OTHERS),
        Op("weight_grad", weight_grad_case, LinearShape, "N,I,O", PARTS, PARTS_QUICK, not_quick=OTHERS),
    )
}


@dataclass(frozen=True)
class Choice:
    """What is to be measured; an empty tuple stands for all."""

    occasion: str  # "cpu", "cuda" or "rehearsal"
    ops: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    quick: bool = False


def plan(choice: Choice, device: Device) -> list[Case]:
    """The cases of a choice, which hold no tensors yet.

    Raises:
        UserError: No chosen op takes a shape or a type, or has one of the chosen providers.
    """
    names = choice.ops or _ops_of(choice.shapes)
    asked = _asked(choice, names)
    cases: list[Case] = []
    for op in (OPS[name] for name in names):
        shapes = asked.get(op.name) or op.shapes[choice.occasion]
        if choice.quick and op.name not in asked:
            shapes = shapes[: op.quick.get(choice.occasion, len(shapes))]
        dtypes = choice.dtypes or op.dtypes or device.dtypes
        dtypes = tuple(name for name in dtypes if op.halves or DTYPES[name].itemsize > 2)
        cases += [op.make(op.name, shape, dtype, device) for shape, dtype in itertools.product(shapes, dtypes)]
    if not cases:
        types = ", ".join(choice.dtypes)
        raise UserError(f"argument --dtype: no half-precision types of {', '.join(names)}, got {types}")
    known = list(dict.fromkeys(provider for case in cases for provider in case.providers))
    for provider in choice.providers:
        if provider not in known:
            raise UserError(f"argument --provider: no chosen op has {provider!r}; there are {', '.join(known)}")
    for case in cases:
        left_out = OPS[case.op].not_quick if choice.quick else ()
        wanted = set(choice.providers) or case.providers.keys() - set(left_out)
        case.providers = {name: p for name, p in case.providers.items() if name == case.baseline or name in wanted}
    return [case for case in cases if not choice.providers or set(choice.providers) & case.providers.keys()]


def _ops_of(shapes: tuple[tuple[int, ...], ...]) -> list[str]:
    """The ops to measure where none is named: all of them, or for each given shape the first op that takes it."""
    if not shapes:
        return list(OPS)
    takers = (next((name for name, op in OPS.items() if op.parse(shape)), None) for shape in shapes)
    return list(dict.fromkeys(name for name in takers if name is not None))


def _asked(choice: Choice, names: Iterable[str]) -> dict[str, list[Shape]]:
    """The chosen shapes, by the ops that take them."""
    found: dict[str, list[Shape]] = {}
    for numbers in choice.shapes:
        taken = {name: shape for name in names if (shape := OPS[name].parse(numbers)) is not None}
        if not taken:
            forms = "; ".join(f"{name} takes {OPS[name].numbers}" for name in choice.ops or OPS)
            raise UserError(f"argument --shape: no op takes {','.join(map(str, numbers))!r}: {forms}")
        for name, shape in taken.items():
            alike = (one for one in OPS[name].shapes[choice.occasion] if one[:-1] == shape[:-1])
            found.setdefault(name, []).append(next(alike, shape))  # that has its target
    return found
