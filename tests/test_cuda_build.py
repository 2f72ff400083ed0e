"""A build with CUDA kernels, on a machine without a GPU: what can be known of it before it runs (`make cuda-build`)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import consequentialism as cw
from consequentialism.backend import compiled as ops

pytestmark = pytest.mark.skipif(
    ops.module is None or ops.module.build_info()["cuda"] is None, reason="the extension was built for the CPU only"
)
X = (5, 7)
OPTIONS = (1.0, "relative", "nlms")


def cuda_kernel(name: str, *arguments: Any, overload: str = "default") -> Any:
    """Calls the CUDA kernel itself on tensors of the CPU: it checks its arguments before it needs a device."""
    return getattr(getattr(torch.ops.consequentialism, name), overload).redispatch(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments
    )


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def test_build_info() -> None:
    info = ops.module.build_info()
    assert info["cuda"] == torch.version.cuda
    assert info["architectures"].split(";")[0].startswith(("8.", "9.", "10.", "12."))
    assert info["version"] == cw.__version__


def test_every_op_has_a_cuda_kernel() -> None:
    assert ops.device_types == ("cpu", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backend_says_why_not() -> None:
    assert cw.backends()["cuda"] == "torch sees no CUDA device"
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        cw.emended_weight_grad(torch.ones(2, 3), torch.ones(2, 4), backend="cuda")
    assert ops.breakdowns() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["dual", "primal"])
def test_fakes_on_cuda(form: str, bias: bool, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n = X[0] if form == "dual" else X[1] + bias
    with FakeTensorMode():
        x, dy = torch.empty(X, dtype=dtype, device="cuda"), torch.empty(X[0], 3, dtype=dtype, device="cuda")
        gram = ops.input_gram(x, bias, form)
        inverse = ops.damped_inverse(gram, 1.0, "relative", "raw", n, X[0])
        assert (inverse.shape, inverse.dtype, inverse.device.type) == ((n, n), wide, "cuda")
        emended, column = ops.emended_input(x, bias, form, 1.0, "relative", "raw")
        assert (emended.shape, emended.dtype) == (X, torch.float32 if dtype == torch.float16 else dtype)
        assert (column.shape, column.dtype) == ((X[0] if bias else 0,), wide)
        dw, db = ops.weight_grad(dy, emended, column)
        assert (dw.shape, dw.dtype, dw.device.type) == ((3, X[1]), dtype, "cuda")
        assert db.shape == (3 if bias else 0,)
        dw, db = ops.fused_weight_grad(x, dy, bias, 1.0, "relative", "raw")
        assert (dw.shape, dw.dtype, dw.device.type) == ((3, X[1]), dtype, "cuda")
        assert (db.shape, db.dtype) == ((3 if bias else 0,), dtype)


def test_layer_on_cuda_under_fake_tensors() -> None:
    # Forward only: without a device torch's autograd engine does not run even fake backward passes.
    with FakeTensorMode():
        layer = cw.Linear(7, 3, device="cuda", dtype=torch.bfloat16)
        y = layer(torch.empty(2, 5, 7, device="cuda", dtype=torch.bfloat16))
        assert (y.shape, y.device.type, y.requires_grad) == ((2, 5, 3), "cuda", True)


BAD_X = [
    ((ones(5), True, "dual"), ValueError, "x must have the shape"),
    ((ones(2, 2, 2), True, "dual"), ValueError, "x must have the shape"),
    ((ones(5, 7, dtype=torch.int32), True, "dual"), TypeError, "x must be float16"),
    ((ones(5, 7, dtype=torch.complex64), True, "dual"), TypeError, "x must be float16"),
    ((ones(5, 7), True, "both"), ValueError, "form must be 'dual' or 'primal', got 'both'"),
]
CONVOLUTION = ((3, 3), (1, 1), (0, 0), (1, 1), 1, True, 2**20, torch.float32, "direct")
BAD_TYPES = ((ones(5, 7, dtype=torch.float64), torch.float32), (ones(5, 7), torch.float16))
BAD_CALLS = [
    *(("input_gram", *case) for case in BAD_X),
    *((name, (*a, *OPTIONS), *rest) for name in ("gram_inverse", "emended_input") for a, *rest in BAD_X),
    *(
        (name, (ones(5, 7), True, "dual", damping, "relative", "nlms"), ValueError, "damping must be finite")
        for name in ("gram_inverse", "emended_input")
        for damping in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        (name, (x, True, "dual", *OPTIONS, gram_dtype), TypeError, "gram_dtype must be float64, or float32 for an x")
        for name in ("gram_inverse", "emended_input")
        for x, gram_dtype in BAD_TYPES
    ),
    *(
        ("damped_inverse", (torch.eye(4), d, "relative", "nlms", 4, 4), ValueError, "damping must be finite")
        for d in (0.0, math.nan)
    ),
    ("conv_gram", (ones(4, 5), *CONVOLUTION), ValueError, "x must have the shape"),
    ("conv_gram", (ones(2, 4, 2, 2), *CONVOLUTION), ValueError, "does not fit"),
    ("damped_inverse", (ones(4, 3), *OPTIONS, 4, 4), ValueError, "gram must have the shape"),
    ("damped_inverse", (ones(4), *OPTIONS, 4, 4), ValueError, "gram must have the shape"),
    ("damped_inverse", (ones(4, 4, dtype=torch.float16), *OPTIONS, 4, 4), TypeError, "gram must be float32 or float64"),
    ("damped_inverse", (torch.eye(4), 1.0, "other", "nlms", 4, 4), ValueError, "damping_mode must be 'relative'"),
    ("damped_inverse", (torch.eye(4), 1.0, "relative", "other", 4, 4), ValueError, "scale must be 'nlms'"),
    ("damped_inverse", (torch.eye(4), *OPTIONS, 0, 4), ValueError, "rank must be at least 1, got 0"),
    ("weight_grad", (ones(4, 3), ones(5, 7), ones(5)), ValueError, "must have the same N"),
    ("weight_grad", (ones(5), ones(5, 7), ones(5)), ValueError, "must have the same N"),
    ("weight_grad", (ones(5, 3), ones(5, 7), ones(4)), ValueError, "column must have the shape"),
    ("weight_grad", (ones(5, 3), ones(5, 7, dtype=torch.int32), ones(5)), TypeError, "must be float16"),
    ("fused_weight_grad", (ones(5), ones(5, 3), True, *OPTIONS), ValueError, "x must have the shape"),
    ("fused_weight_grad", (ones(5, 7), ones(4, 3), True, *OPTIONS), ValueError, "must have the same N"),
    ("fused_weight_grad", (ones(5, 7), ones(5), True, *OPTIONS), ValueError, "must have the same N"),
    ("fused_weight_grad", (ones(5, 7), ones(5, 3).double(), True, *OPTIONS), TypeError, "must have the same type"),
    ("fused_weight_grad", (ones(5, 7).int(), ones(5, 3).int(), True, *OPTIONS), TypeError, "x must be float16"),
    (
        "fused_weight_grad",
        (ones(5, 7), ones(5, 3), True, 0.0, "relative", "nlms"),
        ValueError,
        "damping must be finite",
    ),
    ("fused_weight_grad", (ones(5, 7), ones(5, 3), True, 1.0, "other", "nlms"), ValueError, "damping_mode must be"),
    ("fused_weight_grad", (ones(5, 7), ones(5, 3), True, 1.0, "relative", "other"), ValueError, "scale must be"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), BAD_CALLS)
def test_bad_arguments_of_the_cuda_kernels(
    name: str, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cuda_kernel(name, *arguments)


def test_bad_arguments_of_a_named_variant() -> None:
    x, dy = ones(5, 7), ones(5, 3)
    with pytest.raises(ValueError, match="variant must be 'warps' or 'warpgroups', got 'both'"):
        cuda_kernel("input_gram", x, True, "dual", "both", overload="by")
    with pytest.raises(RuntimeError, match="non-CUDA"):
        cuda_kernel("input_gram", x, True, "dual", "warpgroups", overload="by")
    with pytest.raises(ValueError, match="variant must be 'recompute' or 'cooperative', got 'both'"):
        cuda_kernel("fused_weight_grad", x, dy, True, *OPTIONS, "both", overload="by")
    with pytest.raises(RuntimeError, match="non-CUDA"):
        cuda_kernel("fused_weight_grad", x, dy, True, *OPTIONS, "recompute", overload="by")
    inverse = (torch.eye(4), *OPTIONS, 4, 4)
    with pytest.raises(ValueError, match="variant must be 'block' or 'cluster', got 'both'"):
        cuda_kernel("damped_inverse", *inverse, "both", overload="by")
    with pytest.raises(RuntimeError, match="non-CUDA"):
        cuda_kernel("damped_inverse", *inverse, "cluster", overload="by")


@pytest.mark.parametrize("name", ops.NEEDED)
def test_a_tensor_of_the_cpu_is_refused(name: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "input_gram": (ones(5, 7), True, "dual"),
        "conv_gram": (ones(2, 4, 5, 5), *CONVOLUTION),
        "damped_inverse": (torch.eye(4), *OPTIONS, 4, 4),
        "gram_inverse": (ones(5, 7), True, "dual", *OPTIONS),
        "emended_input": (ones(5, 7), True, "dual", *OPTIONS),
        "weight_grad": (ones(5, 3), ones(5, 7), ones(5)),
        "fused_weight_grad": (ones(5, 7), ones(5, 3), True, *OPTIONS),
    }
    with pytest.raises(RuntimeError, match="non-CUDA"):
        cuda_kernel(name, *arguments[name])
