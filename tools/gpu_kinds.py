"""The kinds of kernel calls that `gpu_first.py` makes: each returns its error against float64, or raises.

On a device without the CUDA kernels the same calls go to its own ops: a rehearsal of the script, not of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import consequentialism as cw
from consequentialism import reference
from consequentialism.backend import compiled as ops
from consequentialism.backend.reference import coordinates
from consequentialism.precision import emended_dtype
from consequentialism.solve import root

OPTIONS: tuple[Any, ...] = (1.0, "relative", "nlms")
TYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}
FLOAT32_SUMS = ("gram_", "conv_gram", "decayed_gram")  # kinds whose sums, of exact products, are float32 at least
NO_ROOM = "has no room on this device"  # csrc/cuda/damped_inverse_binding.cpp's words
REPEATS = 50  # `gpu_first.py --repeats` sets it
Kind = Callable[[torch.dtype, str], float]


def bound_of(kind: str, dtype: torch.dtype) -> float:
    """The error that a kind may have: no type's rounding hides a few wrong entries of a Gram."""
    wide = dtype.itemsize < 4 and kind.startswith(FLOAT32_SUMS)
    return BOUNDS[torch.float32 if wide else dtype]


def _rows(rows: int, columns: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(device, dtype)


def error_of(own: Any, expected: Any) -> float:
    """The largest difference of a tensor's norm, relative to the expected one's; infinite where it is not finite."""
    pairs = zip((own,), (expected,), strict=True) if isinstance(own, Tensor) else zip(own, expected, strict=True)
    worst = 0.0
    for one, right in pairs:
        if right.numel() > 0:
            error = float((one.double().cpu() - right).norm() / right.norm().clamp_min(1e-300))
            worst = max(worst, error) if error == error else float("inf")
    return worst


def _wide(x: Tensor) -> Tensor:
    return x.double().cpu()


def gram(rows: int, inputs: int, form: str) -> Kind:
    def run(dtype: torch.dtype, device: str) -> float:
        x = _rows(rows, inputs, dtype, device)
        return error_of(ops.input_gram(x, True, form), reference.input_gram(_wide(x), True, form))

    return run


def gram_by_warpgroups(rows: int, inputs: int, form: str) -> Kind:
    """The kernel that is named, as far as the device and the type have it, and the same bits again."""

    def run(dtype: torch.dtype, device: str) -> float:
        x = _rows(rows, inputs, dtype, device)
        hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
        if not hopper or dtype not in (torch.bfloat16, torch.float16):
            return gram(rows, inputs, form)(dtype, device)
        own, again = (torch.ops.consequentialism.input_gram.by(x, True, form, "warpgroups") for _ in range(2))
        _same(1, int(not torch.equal(own, again)), "runs")
        return error_of(own, reference.input_gram(_wide(x), True, form))

    return run


def conv_gram(
    batch: int, channels: int, size: int, stride: int, groups: int = 1, patch_bytes: int = 2**26, method: str = ""
) -> Kind:
    """The Gram of a convolution by the named method, else as planned: displaced products from 48 channels on."""

    def run(dtype: torch.dtype, device: str) -> float:
        x = _rows(batch * channels, size * size, dtype, device).view(batch, channels, size, size)
        wide = dtype if dtype == torch.float64 else torch.float32
        geometry = ((3, 3), (stride, stride), (1, 1), (1, 1), groups)
        arguments = (x, *geometry, True, patch_bytes, wide)
        own = torch.ops.consequentialism.conv_gram(*arguments, method) if method else ops.conv_gram(*arguments)
        return error_of(own, reference.conv_gram(_wide(x), *geometry, True, patch_bytes, torch.float64))

    return run


def inverse(order: int) -> Kind:
    """Of a Gram of that order, with a bias in it: 1025 is 1024 inputs and their bias."""

    def run(dtype: torch.dtype, device: str) -> float:
        x = _rows(2 * order, order - 1, dtype, device)
        return error_of(
            ops.gram_inverse(x, True, "primal", *OPTIONS), reference.gram_inverse(_wide(x), True, "primal", *OPTIONS)
        )

    return run


def _inverse_by(team: str, gram: Tensor, options: tuple[Any, ...]) -> Tensor | None:
    """None where the device, such as a slice of a chip, has no room for the team: this is said, as no error."""
    try:
        found: Tensor = torch.ops.consequentialism.damped_inverse.by(gram, *options, team)
    except ValueError as problem:
        if NO_ROOM not in str(problem):
            raise
        print(f"passed over: {str(problem).splitlines()[0]}", flush=True)
        return None
    return found


def inverse_teams(order: int) -> Kind:
    """By one block and by a cluster, the same bits; a team without room on the device is named and passed over."""

    def run(dtype: torch.dtype, device: str) -> float:
        wide = dtype if dtype == torch.float64 else torch.float32
        x = _rows(order, 2 * order, dtype, device).to(wide)
        gram, options = x @ x.T, (1.0, "relative", "raw", order, order)
        own = ops.damped_inverse(gram, *options)
        if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
            teams = [one for team in ("block", "cluster") if (one := _inverse_by(team, gram, options)) is not None]
            _same(len(teams), sum(not torch.equal(own, one) for one in teams), "teams")
        return error_of(own, reference.damped_inverse(_wide(gram), *options))

    return run


def decayed_gram(rows: int, inputs: int, blocks: int) -> Kind:
    def run(dtype: torch.dtype, device: str) -> float:
        x, order = _rows(rows, inputs, dtype, device), coordinates.block_order(inputs, blocks, True)
        wide = dtype if dtype == torch.float64 else torch.float32
        before = torch.zeros(blocks, order, order, dtype=wide, device=device)
        for _ in range(2):
            before = ops.decayed_gram(before, x, True, 0.5, 2.0)
        nothing = torch.zeros(before.shape, dtype=torch.float64)
        return error_of(before, reference.decayed_gram(nothing, _wide(x), True, 0.0, 3.0))

    return run


def inverse_root(count: int, order: int) -> Kind:
    def run(dtype: torch.dtype, device: str) -> float:
        wide = dtype if dtype == torch.float64 else torch.float32
        rows = torch.stack([_rows(2 * order, order, torch.float64, "cpu", seed) for seed in range(count)])
        matrix = rows.mT @ rows / (10 * order) + 0.1 * torch.eye(order)
        plan = root.plan(4, 0.05, torch.float64)
        own = ops.inverse_root(matrix.to(device, wide), plan.root, plan.coefficients)
        return error_of(own, reference.inverse_root(matrix.to(wide).double(), plan.root, plan.coefficients))

    return run


def root_product(count: int, outputs: int, order: int) -> Kind:
    """A product written, and one added to a weight."""

    def run(dtype: torch.dtype, device: str) -> float:
        wide = dtype if dtype == torch.float64 else torch.float32
        rows = _rows(count * outputs, order, dtype, device).view(count, outputs, order)
        square = _rows(count * order, order, wide, device, 1).view(count, order, order)
        s, weight = square + square.mT, rows.clone()
        expected = _wide(rows) @ _wide(s)
        ops.add_root_product_(weight, rows, s, -0.5)
        return error_of((ops.root_product(rows, s), weight), (expected, _wide(rows) - 0.5 * expected))

    return run


def inverse_retry_in(order: int) -> Kind:
    """One matrix that breaks down in its middle, by a cluster: of order 1100, what cuSOLVER could not."""

    def run(dtype: torch.dtype, device: str) -> float:
        wide = dtype if dtype == torch.float64 else torch.float32
        gram = torch.eye(order, dtype=wide, device=device)
        gram[order // 2, order // 2] = -0.5
        before = cw.ops.breakdowns()
        own = ops.damped_inverse(gram, 0.1, "absolute", "raw", order, order)
        if cw.ops.breakdowns() - before != 1:
            raise AssertionError(f"{cw.ops.breakdowns() - before} breakdowns were counted, expected 1")
        return error_of(own, reference.damped_inverse(_wide(gram), 0.1, "absolute", "raw", order, order))

    return run


def inverse_retry(dtype: torch.dtype, device: str) -> float:
    """An indefinite matrix breaks down, is counted and gets more damping; three more of its batch are not disturbed."""
    wide = dtype if dtype == torch.float64 else torch.float32
    grams = torch.eye(70, dtype=wide, device=device).repeat(4, 1, 1)
    grams[2, 0, 0] = -0.5  # minus, once the ridge of 0.1 is added; plus with ten times the ridge
    before = cw.ops.breakdowns()
    own = ops.damped_inverse(grams, 0.1, "absolute", "raw", 70, 70)
    if cw.ops.breakdowns() - before != 1:
        raise AssertionError(f"{cw.ops.breakdowns() - before} breakdowns were counted, expected 1")
    return error_of(own, reference.damped_inverse(_wide(grams), 0.1, "absolute", "raw", 70, 70))


def apply(rows: int, inputs: int, form: str) -> Kind:
    def run(dtype: torch.dtype, device: str) -> float:
        x = _rows(rows, inputs, dtype, device)
        arguments = (True, form, *OPTIONS)
        return error_of(ops.emended_input(x, *arguments), reference.emended_input(_wide(x), *arguments))

    return run


def bias_poison(dtype: torch.dtype, device: str) -> float:
    """Right where ``dy`` is finite, NaN everywhere where one entry of it is not; several strips of columns, and one."""
    worst = 0.0
    for outputs in (130, 64):
        x, dy = _rows(300, 65, dtype, device), _rows(300, outputs, dtype, device, seed=1)
        column = torch.ones(300, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        own = ops.weight_grad(dy, x, column)
        dy_poisoned = dy.clone()
        dy_poisoned[-1, -1] = float("nan")
        for _ in range(REPEATS):
            if not all(bool(one.isnan().all()) for one in ops.weight_grad(dy_poisoned, x, column)):
                raise AssertionError(f"a NaN in dy of {outputs} outputs did not make the whole gradient NaN")
        worst = max(worst, error_of(own, (_wide(dy).T @ _wide(x), _wide(dy).T @ _wide(column))))
    return worst


def weight_grad_range(dtype: torch.dtype, device: str) -> float:
    """Emended inputs outside of float16's range, and errors that bring their product back into it."""
    worst = 0.0
    for exponent in (-16, 0, 16):
        y = _rows(300, 700, emended_dtype(dtype), device) * 2.0**exponent
        dy = _rows(300, 130, dtype, device, seed=1) * 2.0 ** (-exponent * 3 // 4)
        nothing = y.new_empty(0)
        worst = max(worst, error_of(ops.weight_grad(dy, y, nothing)[0], _wide(dy).T @ _wide(y)))
    return worst


def fused(variant: str) -> Kind:
    def run(dtype: torch.dtype, device: str) -> float:
        rows = 64 if dtype == torch.float64 else 128
        x, dy = _rows(rows, 1000, dtype, device), _rows(rows, 333, dtype, device, seed=1)
        if device == "cuda":
            own = torch.ops.consequentialism.fused_weight_grad.by(x, dy, True, *OPTIONS, variant)
        else:
            own = ops.fused_weight_grad(x, dy, True, *OPTIONS)
        return error_of(own, reference.fused_weight_grad(_wide(x), _wide(dy), True, *OPTIONS))

    return run


def _calls(dtype: torch.dtype, device: str) -> Callable[[], list[Tensor]]:
    """Every op once: few rows, a cluster's order, and all in one launch."""
    small, dy = _rows(60, 300, dtype, device), _rows(60, 130, dtype, device, seed=1)
    large, errors = _rows(700, 400, dtype, device), _rows(700, 65, dtype, device, seed=1)

    def run() -> list[Tensor]:
        found = [*ops.fused_weight_grad(small, dy, True, *OPTIONS), ops.input_gram(large, True, "primal")]
        y, column = ops.emended_input(large, True, "primal", *OPTIONS)
        images = large[:640].view(2, 20, 16, 400)
        wide = dtype if dtype == torch.float64 else torch.float32
        found.append(ops.conv_gram(images, (3, 3), (1, 1), (1, 1), (1, 1), 1, True, 2**26, wide))
        return [*found, y, column, *ops.weight_grad(errors, y, column)]

    return run


def _differences(first: list[Tensor], other: list[Tensor]) -> int:
    return sum(not torch.equal(one, two) for one, two in zip(first, other, strict=True))


def _same(times: int, wrong: int, what: str) -> float:
    if wrong:
        raise AssertionError(f"{wrong} results of {times} {what} differ from the first")
    return 0.0


def repeat(dtype: torch.dtype, device: str) -> float:
    """Every op `REPEATS` times, bit for bit."""
    run = _calls(dtype, device)
    first = run()
    return _same(REPEATS, sum(_differences(first, run()) for _ in range(REPEATS)), "runs")


def graph(dtype: torch.dtype, device: str) -> float:
    """Replays of a captured graph, bit for bit what eager mode gives."""
    run = _calls(dtype, device)
    return _replayed(run, run(), device)


def _replayed(run: Callable[[], list[Tensor]], first: list[Tensor], device: str) -> float:
    if device != "cuda":
        return _same(1, _differences(first, run()), "runs")
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        held = run()
    wrong = 0
    for _ in range(REPEATS):
        for one in held:
            one.fill_(float("nan"))
        captured.replay()
        wrong += _differences(first, held)
    return _same(REPEATS, wrong, "replays")


def streams(dtype: torch.dtype, device: str) -> float:
    """Two streams at once, each bit for bit what one alone gives."""
    runs = [_calls(dtype, device) for _ in range(2)]
    return _on_two_streams(runs, runs[0](), device)


def _on_two_streams(runs: list[Callable[[], list[Tensor]]], first: list[Tensor], device: str) -> float:
    if device != "cuda":
        return _same(2, _differences(first, runs[1]()), "runs")
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream(), torch.cuda.Stream()]
    found: list[list[Tensor]] = []
    for _ in range(max(1, REPEATS // 2)):
        for lane, run in zip(lanes, runs, strict=True):
            with torch.cuda.stream(lane):
                found.append(run())
    torch.cuda.synchronize()
    return _same(len(found), sum(_differences(first, one) for one in found), "runs on two streams")


def side_stream(dtype: torch.dtype, device: str) -> float:
    """Layers within `cw.side_stream`, bit for bit those without: again and again, on two streams, and in a graph."""

    def model() -> Callable[[], list[Tensor]]:
        torch.manual_seed(0)
        layers = nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 60, bias=False), nn.ReLU(), nn.Linear(60, 9)
        emended = cw.convert(nn.Sequential(*layers).to(device, dtype))
        x = _rows(200, 300, dtype, device)  # too many rows for one launch to do all

        def step() -> list[Tensor]:
            return list(torch.autograd.grad(emended(x).square().mean(), list(emended.parameters())))

        return step

    def beside(step: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with cw.side_stream():
                return step()

        return run

    steps = [model(), model()]
    runs, first = [beside(step) for step in steps], steps[0]()
    repeated = _same(REPEATS, sum(_differences(first, runs[0]()) for _ in range(REPEATS)), "runs beside forward")
    return repeated + _on_two_streams(runs, first, device) + _replayed(runs[0], first, device)


KINDS: dict[str, Kind] = {
    "gram_dual": gram(100, 700, "dual"),
    "gram_primal": gram(700, 100, "primal"),
    "gram_split": gram(64, 8192, "dual"),
    "gram_large": gram(1024, 2048, "dual"),
    "gram_warpgroups": gram_by_warpgroups(1000, 2048, "dual"),
    "gram_warpgroups_primal": gram_by_warpgroups(2100, 1000, "primal"),
    "gram_warpgroups_chains": gram_by_warpgroups(2200, 2000, "primal"),
    "conv_gram": conv_gram(3, 7, 9, 1),
    "conv_gram_large": conv_gram(16, 64, 32, 1, method="direct"),
    "conv_gram_displaced": conv_gram(16, 64, 32, 1),
    "conv_gram_displaced_wide": conv_gram(5, 200, 14, 1),
    "conv_gram_displaced_pieces": conv_gram(9, 64, 13, 1, patch_bytes=2**18),
    "conv_gram_pieces": conv_gram(5, 24, 13, 2, patch_bytes=2**14),
    "conv_gram_depthwise": conv_gram(2, 40, 12, 1, groups=40),
    "inverse_block": inverse(60),
    "inverse_block_big": inverse(160),
    "inverse_teams": inverse_teams(190),
    "inverse_cluster_small": inverse(250),
    "inverse_cluster": inverse(400),
    "inverse_cluster_large": inverse(700),
    "inverse_1025": inverse(1025),
    "inverse_stock": inverse(1100),
    "inverse_retry": inverse_retry,
    "inverse_retry_cluster": inverse_retry_in(400),
    "inverse_retry_1100": inverse_retry_in(1100),
    "apply_dual": apply(100, 700, "dual"),
    "apply_primal": apply(700, 100, "primal"),
    "apply_large": apply(1024, 2048, "dual"),
    "bias_poison": bias_poison,
    "weight_grad_range": weight_grad_range,
    "recompute": fused("recompute"),
    "cooperative": fused("cooperative"),
    "decayed_gram": decayed_gram(65, 130, 3),
    "decayed_gram_split": decayed_gram(9000, 70, 1),
    "inverse_root": inverse_root(3, 65),
    "inverse_root_large": inverse_root(40, 260),
    "root_product": root_product(2, 33, 70),
    "root_product_large": root_product(4, 1024, 512),
    "repeat": repeat,
    "graph": graph,
    "streams": streams,
    "side_stream": side_stream,
}
