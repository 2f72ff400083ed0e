"""Steps by one call of a compiled operator: the numbers of the steps in Python, what is served, and what is not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, F64, TOLERANCE, assert_close, assert_identical, needs_kernels, randn
from emended_helpers import gradients_of, mlp, parameters_of, squares, train
from torch import Tensor, nn

import consequentialism as cw
from consequentialism.backend import compiled
from consequentialism.backend.reference.coordinates import block_order, block_spans
from consequentialism.optim import outputs
from consequentialism.optim.at_once import AtOnce
from consequentialism.optim.steps import orthogonalised

OPERATORS = torch.ops.consequentialism


class Turned(nn.Module):
    """A linear layer with a weight ``[I, O]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(inputs, outputs, dtype=F32) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Network(nn.Module):
    """Every way in which a weight lies beside its root, in blocks and groups, and parameters without one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.conv = nn.Conv1d(4, 6, 2, groups=2)
        self.norm = nn.LayerNorm(12)
        self.turned = Turned(12, 10)
        self.wide = nn.Linear(10, 9)
        self.head = nn.Linear(9, 5, bias=False)
        self.one = nn.Linear(5, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.table(tokens).view(-1, 4, 3)).flatten(1))
        return self.one(self.head(torch.tanh(self.wide(self.turned(x)))))


@pytest.fixture(autouse=True)
def registered() -> None:
    cw.register(Turned, like=nn.Linear, transposed=True)


def groups_of(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Biases and norms without decay and with another rate."""
    flat = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": flat, "weight_decay": 0.0, "lr": 0.02},
    ]


RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, 0.01),
    "momentum": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9, dampening=0.3),
    "Nesterov": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.9, nesterov=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, 0.01, alpha=0.9),
    "RMSprop with momentum": lambda groups: torch.optim.RMSprop(groups, 0.01, momentum=0.9),
    "Adam": lambda groups: torch.optim.Adam(groups, 0.01, betas=(0.8, 0.99)),
    "AdamW": lambda groups: torch.optim.AdamW(groups, 0.01, eps=1e-6),
}


def steps_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "step_device_types", ())


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("name", "exponent"), [*((name, 0.0) for name in RULES), ("momentum", 0.25), ("AdamW", 0.25)])
def test_numbers_are_those_of_the_steps_in_python(
    name: str, exponent: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "BLOCK", 4)
    torch.manual_seed(0)
    model = Network().to(dtype)
    twin = copy.deepcopy(model)
    tokens = torch.randint(11, (40,), generator=torch.Generator().manual_seed(1))
    left: list[str] = []
    found = AtOnce.take

    def take(self: AtOnce) -> None:
        left[:] = [part.unit.name for part in self.left]
        found(self)

    monkeypatch.setattr(AtOnce, "take", take)
    options: dict[str, Any] = {"block": 5, "refresh_every": 3, "output_exponent": exponent}
    own = cw.optim.Emended(RULES[name](groups_of(model, 0.1)), model, **options)
    train(model, own, tokens, 6)
    assert left == ["one"]  # a single output
    steps_in_python(monkeypatch)
    other = cw.optim.Emended(RULES[name](groups_of(twin, 0.1)), twin, **options)
    train(twin, other, tokens, 6)
    assert len(left) == 6
    for (key, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(key, parameter, expected, 10 * TOLERANCE[dtype])
        for moment, value in other.state[expected].items():
            assert_close(f"{key} {moment}", own.state[parameter][moment], value, 10 * TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_numbers_of_muon_are_those_of_the_steps_in_python(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of matrices, one, and three in one weight, and AdamW's parameters beside them."""
    torch.manual_seed(0)
    model = Network().to(dtype)
    model.one = nn.Linear(5, 2, dtype=dtype)
    twin = copy.deepcopy(model)
    tokens = torch.randint(11, (40,), generator=torch.Generator().manual_seed(1))
    served: list[int] = []
    found = AtOnce.take

    def take(self: AtOnce) -> None:
        served[:] = [len(self.left), *sorted(len(call.entries) for call in self._calls.values()), self.all_others]
        found(self)

    monkeypatch.setattr(AtOnce, "take", take)
    results = []
    for network in (model, twin):
        own = cw.optim.Muon(network, 0.02, aux={"lr": 0.01}, qkv=("wide",), block=5, refresh_every=3, damping=0.1)
        train(network, own, tokens, 6)
        results.append(own)
        if network is model:
            # wide; conv, turned and head; the table, biases, the norm and the last layer; nothing is left
            assert served == [0, 1, 3, 8, True]
        steps_in_python(monkeypatch)
    for (key, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(key, parameter, expected, 10 * TOLERANCE[dtype])  # the iteration multiplies rounding
        for moment, value in results[1].state[expected].items():
            assert_close(f"{key} {moment}", results[0].state[parameter][moment], value, 10 * TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize(("inputs", "blocks"), [(1, 1), (63, 1), (64, 1), (65, 1), (128, 1), (150, 1), (171, 2)])
@pytest.mark.parametrize("columns", [False, True])
def test_products_with_a_triangular_root_leave_out_its_zeros(
    inputs: int, blocks: int, columns: bool, triangular: bool
) -> None:
    """A weight and its bias, in blocks: ``W - [g | g_bias] S S^T``. One entry below the diagonal counts too."""
    order = block_order(inputs, blocks, True)
    root = randn(1, blocks, order, order).triu()
    if not triangular:
        root[..., -1, 0] = 1.0
    weight, gradient = randn(5, inputs), randn(5, inputs, seed=1)
    bias, slope = randn(5, seed=2), randn(5, seed=3)
    whole, expected = torch.cat([gradient, slope[:, None]], 1), torch.cat([weight, bias[:, None]], 1)
    begin = 0
    for i, (first, last) in enumerate(block_spans(inputs, blocks)):
        size = last - first + (i == blocks - 1)
        square = root[0, i, :size, :size]
        expected[:, begin : begin + size] -= whole[:, begin : begin + size] @ square @ square.mT
        begin += size
    pairs = (weight, bias), (gradient, slope)
    lists = [[values.T.contiguous() if columns else values, beside] for values, beside in pairs]
    kind = 2 if columns else 1
    OPERATORS.sgd_step_(*lists, [], [root], [], [kind], [2], [1.0] * 2, [0.0] * 2, [1.0] * 2, 0.0, 0.0, False)
    own = lists[0][0].T if columns else lists[0][0]
    assert_close("weight and bias", torch.cat([own, bias[:, None]], 1), expected, 10 * TOLERANCE[F64])


SPECTRA = {"even": 0, "to 1e-8": 8, "of rank 3": math.inf}


@needs_kernels
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (5, 9), (40, 30), (24, 48), (90, 30), (1, 12), (150, 310)], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 5, 8])
def test_polar_factor_errs_no_more_than_twice_as_much_as_one_step_at_a_time(
    shape: tuple[int, int], steps: int, spectrum: str
) -> None:
    order, exponent = min(shape), SPECTRA[spectrum]
    left, right = (torch.linalg.qr(randn(n, order, seed=n)).Q for n in shape)
    values = (
        (torch.arange(order) < 3).double() if exponent == math.inf else torch.logspace(0, -exponent, order).double()
    )
    matrix = (left * values) @ right.mT
    coefficients = (3.4445, -4.7750, 2.0315)
    made = {}
    for dtype in (F32, F64):
        parameter = torch.zeros(shape, dtype=dtype)
        lists = [[parameter], [matrix.to(dtype)], [torch.zeros(shape, dtype=dtype)], [], [], [0], [1], [0.0], [0.0]]
        OPERATORS.muon_step_(*lists, [-1.0], 0.0, False, coefficients, steps, 1e-7, 1)
        made[dtype] = parameter.double()
    exact = orthogonalised(matrix.float().double(), coefficients, steps, 1e-7)
    plain = orthogonalised(matrix.float(), coefficients, steps, 1e-7).double()
    assert_close("float64", made[F64], orthogonalised(matrix, coefficients, steps, 1e-7), 10 * TOLERANCE[F64])
    allowed = 2 * float((plain - exact).norm()) + 1e-5 * float(exact.norm())
    assert float((made[F32] - exact).norm()) <= allowed


CHANGES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "a maximum": lambda model, inner: inner.param_groups[0].update(maximize=True),
    "a rate on the device": lambda model, inner: inner.param_groups[0].update(lr=torch.tensor(0.01)),
    "amsgrad": lambda model, inner: inner.param_groups[0].update(amsgrad=True),
    "a moment anew": lambda model, inner: inner.state[model[0].weight].update(exp_avg=torch.ones_like(model[0].weight)),
    "a moment's strides": lambda model, inner: inner.state[model[0].weight].update(exp_avg_sq=torch.ones(6, 9).T),
    "strides": lambda model, inner: model[0].weight.data.set_(model[0].weight.data.T.contiguous().T),
}


@needs_kernels
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a step before is kept: the next one takes the numbers that it finds."""
    model = mlp(F32)
    twin, x = copy.deepcopy(model), randn(30, 6, dtype=F32)
    results = []
    for network in (model, twin):
        inner = torch.optim.AdamW(network.parameters(), 0.01)
        optimizer = cw.optim.Emended(inner, network, refresh_every=50)
        train(network, optimizer, x, 6)
        CHANGES[change](network, inner)
        if change == "amsgrad":
            for parameter in network.parameters():
                inner.state[parameter]["max_exp_avg_sq"] = torch.zeros_like(parameter)
        optimizer.zero_grad()
        squares(network(x)).backward()
        optimizer.step()
        results.append(parameters_of(network))
        steps_in_python(monkeypatch)
    for own, expected in zip(*results, strict=True):
        assert_close(change, own, expected, 10 * TOLERANCE[own.dtype])


@needs_kernels
def test_the_optimizer_inside_steps_what_is_not_served_and_knows_that_there_was_a_step() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    model[1].half()
    inner = torch.optim.AdamW(model.parameters(), 0.01)
    optimizer = cw.optim.Emended(inner, model)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1)  # looks whether step was called
    for _ in range(3):
        for seed, parameter in enumerate(model.parameters()):
            parameter.grad = randn(*parameter.shape, seed=seed, dtype=F32).to(parameter.dtype)
        before, gradients = parameters_of(model), gradients_of(model)
        optimizer.step()
        for parameter, was in zip(model.parameters(), before, strict=True):
            assert not torch.equal(parameter, was)
        for name, gradient in gradients_of(model).items():
            assert_identical(name, gradient, gradients[name])
    schedule.step()


@needs_kernels
@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_counts_that_are_integers_are_stepped_in_python(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
        optimizer = cw.optim.Emended(getattr(torch.optim, name)(model.parameters(), 0.01), model)
        train(model, optimizer, randn(20, 6, dtype=F32), 2)
        for parameter in model.parameters():
            optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].long()
        train(model, optimizer, randn(20, 6, dtype=F32), 2)
        results.append(parameters_of(model))
        steps_in_python(monkeypatch)
    for own, expected in zip(*results, strict=True):
        assert_close(name, own, expected, 10 * TOLERANCE[own.dtype])


@needs_kernels
def test_a_rule_that_keeps_nothing_is_served_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of SGD without a momentum there is no state, nor of the norms."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    inner = torch.optim.SGD(model.parameters(), 0.1)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: pytest.fail("the optimizer inside steps"))
    optimizer = cw.optim.Emended(inner, model)
    seen: list[int] = []
    inner.register_step_post_hook(lambda own, *_: seen.append(len(own.param_groups)))
    before = parameters_of(model)
    train(model, optimizer, randn(20, 6, dtype=F32), 2)
    assert seen == [1, 1]
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert not torch.equal(parameter, was)


@needs_kernels
def test_a_weight_that_was_stepped_is_too_new_for_an_older_backward() -> None:
    model = mlp(F64)
    optimizer = cw.optim.Emended(torch.optim.AdamW(model.parameters(), 0.01), model)
    x = randn(30, 6)
    train(model, optimizer, x, 3)
    loss = squares(model(x))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def arguments(order: int = 6) -> list[Any]:
    """Of a step of Adam on a weight ``[4, 5]`` with its bias, and a norm's."""
    shapes = ((4, 5), (4,), (3,))
    lists = [[randn(*shape, seed=i).abs() for shape in shapes] for i in range(4)]
    counts = [torch.tensor(2.0) for _ in shapes]
    root, left = (torch.eye(n, dtype=F64)[None, None] for n in (order, 2))
    return [
        *lists,
        counts,
        [root],
        [left.expand(1, 2, 2, 2).contiguous()],
        [1, 0],
        [2, 1],
        [0.9, 1.0, 1.0],
        [0.0, 0.1, 0.0],
        [0.1] * 3,
        0.9,
        0.99,
        1e-8,
    ]


WRONG: dict[str, tuple[int, Any, str]] = {
    "a gradient too few": (1, [torch.ones(4, 5, dtype=F64)], "gradients must have 3 entries, got 1"),
    "a moment's type": (2, [torch.ones(4, 5), *[torch.ones(n) for n in (4, 3)]], r"first moments\[0\] must be contig"),
    "a root's order": (5, [torch.eye(5, dtype=F64)[None, None]], r"roots\[0\] of shape \[1, 1, 5, 5\]"),
    "no root": (5, [], "roots must have more than 0 entries"),
    "a root too many": (5, [torch.eye(6, dtype=F64)[None, None]] * 2, "roots must have 1 entries, got 2"),
    "a root of outputs' order": (
        6,
        [torch.eye(3, dtype=F64)[None, None]],
        r"output_roots\[0\] of shape \[1, 1, 3, 3\]",
    ),
    "a root of outputs too many": (
        6,
        [torch.eye(4, dtype=F64)[None, None]] * 2,
        "output_roots must have 1 entries, got 2",
    ),
    "a kind": (7, [4, 0], "kinds must be from 0 to 3, got 4"),
    "members of a plain one": (7, [0, 0], "members must be 1, or 2 for a weight and its bias, got 2"),
    "members": (8, [1, 1], r"roots\[0\]"),
    "rates": (11, [0.1], "rates must have 3 entries, got 1"),
    "a count": (4, [torch.tensor([1.0, 2.0])] * 3, "counts must have one number each"),
}


@needs_kernels
@pytest.mark.parametrize("case", WRONG)
def test_the_operator_refuses_what_does_not_fit_and_changes_nothing(case: str) -> None:
    given = arguments()
    place, value, message = WRONG[case]
    before = [tensor.clone() for tensor in given[0]]
    given[place] = value
    with pytest.raises(ValueError, match=message):
        OPERATORS.adam_step_(*given)
    for own, expected in zip(given[0], before, strict=True):
        assert_identical(case, own, expected)


@needs_kernels
def test_the_operator_of_muon_takes_matrices_alone() -> None:
    parameters, gradients, buffers, _, _, *places, _, _, _ = arguments()
    with pytest.raises(ValueError, match=r"parameters\[1\] must have 2 matrices one above the other"):
        OPERATORS.muon_step_(parameters, gradients, buffers, *places, 0.9, True, [3.0, -4.0, 2.0], 5, 1e-7, 2)
    matrices = [parameters[:1], gradients[:1], buffers[:1], [], [], [0], [1], [1.0], [0.0], [0.1], 0.9, True]
    for wrong, message in (
        (([3.0], 5, 1e-7, 1), "coefficients must be 3, got 1"),
        (([3.0, -4.0, 2.0], -1, 1e-7, 1), "steps must be at least 0, got -1"),
        (([3.0, -4.0, 2.0], 5, 1e-7, 0), "parts must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            OPERATORS.muon_step_(*matrices, *wrong)


@needs_kernels
@pytest.mark.parametrize("name", ["sgd_step_", "rmsprop_step_", "adam_step_", "muon_step_"])
def test_opcheck(name: str) -> None:
    parameters, gradients, first, second, counts, *places, _, _, _ = arguments()
    calls = {
        "sgd_step_": (parameters, gradients, first, *places, 0.9, 0.1, True),
        "rmsprop_step_": (parameters, gradients, first, second, counts, *places, 0.9, 0.8, 1e-8),
        "adam_step_": (parameters, gradients, first, second, counts, *places, 0.9, 0.99, 1e-8),
        "muon_step_": (
            *(own[:1] for own in (parameters, gradients, first)),
            *([torch.eye(5, dtype=F64)[None, None]], places[1], [1], [1], [0.9], [0.1], [0.1]),
            *(0.9, True, [3.0, -4.0, 2.0], 2, 1e-7, 2),
        ),
    }
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(OPERATORS, name).default, calls[name], test_utils=checks)
