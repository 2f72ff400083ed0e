"""Random configurations of layers and optimizers against float64: `python tools/fuzz.py --count 10000 --seed 0`.

Configuration ``i`` of a seed is the same on every machine and whatever ran before it; ``--only I`` repeats one. A miss
prints the configuration and the error; the exit status is 1 where there was one.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cases import BF16, CONDITION_FACTOR, F16, F32, F64, FACTOR, FLOOR, error_of, join, oracle, with_ones
from conv_cases import EMENDED, conv_gradients, conv_oracle

import consequentialism as cw
from consequentialism.solve.root import eigen_power

SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 257)
LARGE = (513, 1000, 2049, 4097)
# S is kept in float32: in directions that rows span, of small eigenvalues beside those of the rest, that leaves the
# condition number times the rounding unit, times this.
ROOT_FACTOR = 0.1
WORK = 4e7  # of a configuration's largest product
LAYOUTS = ("contiguous", "transposed", "expanded", "sliced", "offset", "reversed")
WAYS = ("backward", "autograd.grad", "checkpoint", "twice", "no_grad", "eval")
KINDS = ("linear", "linear", "conv", "embedding", "emended")


@dataclass
class Configuration:
    kind: str
    seed: int
    dtype: torch.dtype
    shape: dict[str, Any]
    layout: str = "contiguous"
    way: str = "backward"
    wanted: tuple[bool, bool, bool] = (True, True, True)  # gradients of the input, weight and bias
    options: dict[str, Any] = field(default_factory=dict)


def configuration(seed: int, index: int) -> Configuration:
    """The configuration ``index`` of a seed."""
    pick = random.Random(f"{seed}/{index}")
    kind = pick.choice(KINDS)
    dtype = pick.choice((F32, F32, F32, F64, BF16, F16) if kind == "linear" else (F32, F32, F64))
    options: dict[str, Any] = {"damping": pick.choice((1.0, 1.0, 10.0, 0.1, 0.01, 1e-3))}
    if kind != "emended":
        options["scale"] = pick.choice(("nlms", "raw", "gradient"))
        options["damping_mode"] = pick.choice(("relative", "relative", "absolute"))
    if kind in ("linear", "conv"):
        options["backend"] = pick.choice(("auto", "auto", "reference"))
    wanted = pick.choice([(x, w, b) for x in (True, False) for w in (True, False) for b in (True, False)])
    shape = {"linear": linear_shape, "emended": linear_shape, "conv": conv_shape, "embedding": lookup_shape}[kind](pick)
    return Configuration(
        kind, pick.randrange(2**31), dtype, shape, pick.choice(LAYOUTS), pick.choice(WAYS), wanted, options
    )


def linear_shape(pick: random.Random) -> dict[str, Any]:
    while True:
        rows, inputs, outputs = (pick.choice(SIZES) for _ in range(3))
        if pick.random() < 0.05:
            rows = 0
        elif pick.random() < 0.05:
            rows = pick.choice(LARGE)
        if rows * inputs * max(inputs, outputs) <= WORK:
            split = pick.choice([n for n in (1, 2, 3, 5) if rows % n == 0])
            leading = pick.choice([(rows,), (split, rows // split), (1, split, rows // split)])
            return {"leading": leading, "inputs": inputs, "outputs": outputs, "bias": pick.random() < 0.7}


def conv_shape(pick: random.Random) -> dict[str, Any]:
    spatial, groups = pick.choice((1, 1, 2, 2, 2, 3)), pick.choice((1, 1, 1, 2, 3))
    kernel = tuple(pick.choice((1, 2, 3)) for _ in range(spatial))
    dilation = tuple(pick.choice((1, 1, 2)) for _ in range(spatial))
    size = tuple(d * (k - 1) + 1 + pick.randrange(6) for k, d in zip(kernel, dilation, strict=True))
    stride = tuple(pick.choice((1, 1, 2, 3)) for _ in range(spatial))
    padding: Any = tuple(pick.choice((0, 1)) for _ in range(spatial))
    if set(stride) == {1} and pick.random() < 0.3:
        padding = pick.choice(("same", "valid"))
    arguments = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    arguments["padding_mode"] = pick.choice(("zeros", "zeros", "replicate"))
    batch = pick.choice((0, 1, 1, 2, 3, 5))
    channels = groups * pick.choice((1, 2, 5, 8)), groups * pick.choice((1, 2, 4))
    return {"batch": batch, "channels": channels, "size": size, "bias": pick.random() < 0.7, "arguments": arguments}


def lookup_shape(pick: random.Random) -> dict[str, Any]:
    words, width = pick.choice((1, 2, 7, 100)), pick.choice((1, 3, 16))
    padding = pick.choice((None, None, 0))
    return {
        "leading": (pick.choice((0, 1, 3, 20)), pick.choice((1, 7))),
        "words": words,
        "width": width,
        "pad": padding,
    }


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor with the same values, or fewer of them repeated, in another memory layout."""
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and x.ndim > 1 and x.shape[0] > 1:
        return x[:1].expand(x.shape)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        flat = x.new_full((x.numel() + 1,), torch.nan)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    if layout == "reversed" and x.ndim > 1:
        return x.flip(0).contiguous().flip(0)
    return x


def bound_of(config: Configuration, trace: float, rank: int) -> float:
    """The relative error allowed: rounding of the result, and of a matrix with that condition number."""
    damping = config.options["damping"]
    relative = config.options.get("damping_mode", "relative") == "relative"
    condition = 1 + (rank / damping if relative else trace / damping)
    wide = F64 if config.dtype == F64 else F32
    return FLOOR.get(config.dtype, 1e-12) + CONDITION_FACTOR * condition * torch.finfo(wide).eps


def misses_of(config: Configuration) -> list[str]:
    """What is wrong; nothing where all is right."""
    torch.manual_seed(config.seed)
    return {"linear": linear, "conv": conv, "embedding": embedding, "emended": emended}[config.kind](config)


def ran(config: Configuration, layer: nn.Module, x: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The gradient at the outputs, and at the input."""
    layer.train(config.way != "eval")
    if config.way == "no_grad":
        with torch.no_grad():
            y = layer(x)
    else:
        y = checkpoint(layer, x, use_reentrant=False) if config.way == "checkpoint" else layer(x)
    dy = torch.randn(y.shape, dtype=F64).to(y.dtype)
    if not y.requires_grad:
        return dy, None
    leaves = [p for p in (x, *layer.parameters()) if p.requires_grad]
    if config.way == "autograd.grad":
        for leaf, gradient in zip(leaves, torch.autograd.grad(y, leaves, dy), strict=True):
            leaf.grad = gradient
    else:
        y.backward(dy, retain_graph=config.way == "twice")
        if config.way == "twice":
            for leaf in leaves:
                leaf.grad = None
            y.backward(dy)
    return dy, x.grad


def compared(
    config: Configuration,
    own: list[tuple[str, Tensor | None, Tensor | None, bool]],
    bound: float,
    plain: Callable[[], dict[str, Tensor | None]] = dict,
) -> list[str]:
    """Misses among (name, gradient, expected, wanted); the error of ``db`` is relative to ``dw`` and ``db`` together.

    Beyond the bound, as where sums cancel, a gradient may still be off by twice what the same expression in plain
    PyTorch, ``plain``, is off by.
    """
    found = []
    sizes = [expected.double().norm().item() for name, _, expected, _ in own if expected is not None and name != "dx"]
    for name, gradient, expected, wanted in own:
        part = 1.0
        if name == "db" and expected is not None:
            part = expected.double().norm().item() / max(math.hypot(*sizes), 1e-300)
        wanted = wanted and config.way != "no_grad"
        if (gradient is not None) != wanted:
            found.append(f"{name} is {'missing' if wanted else 'there, and nobody wants it'}")
        elif wanted and expected is not None and gradient is not None:
            if gradient.dtype != config.dtype or gradient.shape != expected.shape:
                found.append(f"{name}: {gradient.dtype} {list(gradient.shape)}, expected {list(expected.shape)}")
            elif not (error := part * error_of(gradient, expected)) <= bound and not (
                (same := plain().get(name)) is not None and error <= bound + FACTOR * part * error_of(same, expected)
            ):
                found.append(f"{name}: relative error {error:.3g}, allowed {bound:.3g}")
    return found


def plain_gradients(x: Tensor, dy: Tensor, bias: bool, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    return cw.reference.emended_weight_grad(x, dy, bias, **{k: v for k, v in options.items() if k != "backend"})


def linear(config: Configuration) -> list[str]:
    shape, options = config.shape, config.options
    layer = cw.Linear(shape["inputs"], shape["outputs"], shape["bias"], dtype=config.dtype, **options)
    x = laid_out(torch.randn(*shape["leading"], shape["inputs"], dtype=F64).to(config.dtype), config.layout)
    x = x.detach().requires_grad_(config.wanted[0])
    layer.weight.requires_grad_(config.wanted[1])
    if shape["bias"]:
        layer.bias.requires_grad_(config.wanted[2])
    dy, dx = ran(config, layer, x)
    rows, errors = x.detach().reshape(-1, shape["inputs"]), dy.reshape(-1, shape["outputs"])
    dw, db = oracle(rows, errors, shape["bias"], **options)
    whole = with_ones(rows.double(), shape["bias"])
    bound = bound_of(config, whole.square().sum().item(), min(whole.shape))
    expected_dx = dy.double() @ layer.weight.detach().double()
    bias = layer.bias
    return compared(
        config,
        [
            ("dx", dx, expected_dx, config.wanted[0]),
            ("dw", layer.weight.grad, dw, config.wanted[1]),
            ("db", None if bias is None else bias.grad, db, bias is not None and config.wanted[2]),
        ],
        bound + 8 * torch.finfo(config.dtype).eps,
        lambda: dict(zip(("dw", "db"), plain_gradients(rows, errors, shape["bias"], options), strict=True)),
    )


def conv(config: Configuration) -> list[str]:
    shape = config.shape
    spatial = len(shape["size"])
    (inputs, outputs), arguments = shape["channels"], shape["arguments"]
    layer = EMENDED[spatial](inputs, outputs, bias=shape["bias"], dtype=config.dtype, **arguments, **config.options)
    x = laid_out(torch.randn(shape["batch"], inputs, *shape["size"], dtype=config.dtype), config.layout)
    x = x.detach().requires_grad_(config.wanted[0])
    layer.weight.requires_grad_(config.wanted[1])
    if shape["bias"]:
        layer.bias.requires_grad_(config.wanted[2])
    if shape["batch"] == 0 and layer.padding_mode != "zeros":
        return []  # torch's own pad refuses it
    dy, _ = ran(config, layer, x)
    dw, db = conv_oracle(layer, x, dy, **config.options)
    own_dw, own_db = conv_gradients(layer)
    columns = inputs // arguments["groups"] * torch.Size(arguments["kernel_size"]).numel() + shape["bias"]
    rows = dy.shape[0] * dy[0, 0].numel() if dy.shape[0] else 0
    largest = (x.detach().double().square().sum().item() * torch.Size(arguments["kernel_size"]).numel()) + rows
    bound = bound_of(config, largest, min(rows, columns))
    wanted = (config.wanted[1], shape["bias"] and config.wanted[2])
    return compared(config, [("dw", own_dw, dw, wanted[0]), ("db", own_db, db, wanted[1])], bound)


def embedding(config: Configuration) -> list[str]:
    shape, options = config.shape, config.options
    layer = cw.Embedding(shape["words"], shape["width"], shape["pad"], dtype=config.dtype, **options)
    indices = torch.randint(shape["words"], shape["leading"])
    layer.weight.requires_grad_(config.wanted[1])
    if config.way == "autograd.grad" and not config.wanted[1]:
        return []
    dy, _ = ran(config, layer, indices)
    errors = dy.reshape(-1, shape["width"])

    def gradient(dy: Tensor) -> Tensor:
        return cw.reference.emended_embedding_grad(indices.reshape(-1), dy, shape["words"], shape["pad"], **options)

    own = [("dw", layer.weight.grad, gradient(errors.double()), config.wanted[1])]
    return compared(config, own, bound_of(config, 0, 0) + 1e-6, lambda: {"dw": gradient(errors)})


def exact_root(parts: list[Tensor], damping: float) -> Tensor:
    """``S = (A + c I)^(-1/2)`` in float64, its Gram of batches of rows ``[N, I]`` in their type."""
    columns = parts[0].shape[1]
    moment = sum(rows.T @ rows for rows in parts).double() / max(sum(map(len, parts)), 1)
    t = moment.trace() / columns
    return eigen_power(moment / t, damping, 0.5) / t.sqrt() if t > 0 else torch.eye(columns, dtype=F64)


def emended(config: Configuration) -> list[str]:
    """A step of SGD without memory, over one batch or two, against ``W - lr [g | g_b] S S`` in float64."""
    shape, damping = config.shape, config.options["damping"]
    layer = nn.Linear(shape["inputs"], shape["outputs"], shape["bias"], dtype=config.dtype)
    layer.weight.requires_grad_(config.wanted[1])
    if shape["bias"]:
        layer.bias.requires_grad_(config.wanted[2])
    if not config.wanted[1]:
        return []
    own = config.options
    inner = torch.optim.SGD(layer.parameters(), 0.1)
    optimizer = cw.optim.Emended(inner, layer, memory=0, refresh_every=1, block=4096, **own)
    before, gathered = [p.detach().clone() for p in layer.parameters()], []
    config.way = "backward" if config.way in ("no_grad", "eval", "twice", "autograd.grad") else config.way
    for part in range(1 + config.seed % 2):
        x = torch.randn(*shape["leading"], shape["inputs"], dtype=config.dtype) * (1 + part)
        x = laid_out(x, config.layout).detach().requires_grad_(config.wanted[0])
        ran(config, layer, x)
        gathered.append(x.detach().reshape(-1, shape["inputs"]))
    optimizer.step()
    with_bias = shape["bias"] and config.wanted[2]
    parts = [with_ones(rows, with_bias) for rows in gathered]
    gradient = join(layer.weight.grad, layer.bias.grad if with_bias else None)
    root = exact_root([rows.double() for rows in parts], damping)
    expected = -0.1 * gradient @ root @ root
    # The same expression in plain PyTorch at that type. Of many equal rows the Gram's own rounding is not small.
    rounded = exact_root(parts, damping).to(config.dtype)
    plain = -0.1 * (gradient.to(config.dtype) @ rounded @ rounded)
    changes = [p.detach().double() - old.double() for p, old in zip(layer.parameters(), before, strict=True)]
    change = join(changes[0], changes[1] if with_bias else None)
    rounding = torch.finfo(config.dtype).eps * sum(old.double().norm().item() for old in before)
    bound = FACTOR * error_of(plain, expected) + 1e-6 + 2 * rounding / max(expected.norm().item(), 1e-30)
    if config.dtype == F32:
        bound += ROOT_FACTOR * (1 + len(root) / damping) * torch.finfo(F32).eps
    error = error_of(change, expected)
    return [] if error <= bound else [f"change: relative error {error:.3g}, allowed {bound:.3g}"]


def run(seed: int, indices: range) -> tuple[Counter[str], list[str]]:
    """How many configurations of each kind there were, and every miss."""
    counts: Counter[str] = Counter()
    misses = []
    for index in indices:
        config = configuration(seed, index)
        counts[config.kind] += 1
        try:
            found = misses_of(config)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        misses += [f"--seed {seed} --only {index}: {miss}: {config}" for miss in found]
    return counts, misses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one configuration")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    indices = range(arguments.count) if arguments.only is None else range(arguments.only, arguments.only + 1)
    counts, misses = run(arguments.seed, indices)
    print("\n".join(misses))
    print(f"{sum(counts.values())} configurations ({dict(counts)}), {len(misses)} misses")
    sys.exit(bool(misses))


if __name__ == "__main__":
    main()
