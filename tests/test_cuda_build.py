"""A build with CUDA kernels, on a machine without a GPU: what can be known of it before it runs (`make cuda-build`)."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import consequentialism as cw
from consequentialism import ops

pytestmark = pytest.mark.skipif(
    ops.module is None or ops.module.build_info()["cuda"] is None, reason="the extension was built for the CPU only"
)
X = (5, 7)


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
        inverse = ops.factor(gram, 1.0, "relative", "raw", n, X[0])
        assert (inverse.shape, inverse.dtype, inverse.device.type) == ((n, n), wide, "cuda")
        emended, column = ops.emended_input(x, bias, form, 1.0, "relative", "raw")
        assert (emended.shape, emended.dtype) == (X, torch.float32 if dtype == torch.float16 else dtype)
        assert (column.shape, column.dtype) == ((X[0] if bias else 0,), wide)
        dw, db = ops.weight_grad(dy, emended, column)
        assert (dw.shape, dw.dtype, dw.device.type) == ((3, X[1]), dtype, "cuda")
        assert db.shape == (3 if bias else 0,)


def test_layer_on_cuda_under_fake_tensors() -> None:
    # Forward only: without a device torch's autograd engine does not run even fake backward passes.
    with FakeTensorMode():
        layer = cw.Linear(7, 3, device="cuda", dtype=torch.bfloat16)
        y = layer(torch.empty(2, 5, 7, device="cuda", dtype=torch.bfloat16))
        assert (y.shape, y.device.type, y.requires_grad) == ((2, 5, 3), "cuda", True)
