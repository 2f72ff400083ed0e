"""Every CUDA op once, on small shapes of each type: what the sanitizer watches (tools/gpu.sh)."""

from __future__ import annotations

import torch

from consequentialism.backend import compiled as ops

SHAPES = ((1, 1, 1), (5, 7, 3), (33, 31, 12), (64, 65, 33), (64, 200, 300), (130, 70, 40), (300, 310, 20))

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for rows, inputs, outputs in SHAPES:
        x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
        dy = torch.randn(rows, outputs, device="cuda", dtype=dtype)
        for form in ("dual", "primal"):
            for bias in (True, False):
                gram = ops.input_gram(x, bias, form)
                inverse = ops.gram_inverse(x, bias, form, 1.0, "relative", "nlms")
                emended, column = ops.emended_input(x, bias, form, 1.0, "relative", "nlms")
                dw, db = ops.weight_grad(dy, emended, column)
                for one in (gram, inverse, emended, column, dw, db):
                    assert one.isfinite().all()
        for bias in (True, False):
            for one in ops.fused_weight_grad(x, dy, bias, 1.0, "relative", "nlms"):
                assert one.isfinite().all()
            if rows <= min(64, inputs + bias):
                for variant in ("recompute", "cooperative"):
                    by = torch.ops.consequentialism.fused_weight_grad.by
                    for one in by(x, dy, bias, 1.0, "relative", "nlms", variant):
                        assert one.isfinite().all()
    xs = [torch.randn(rows, inputs, device="cuda", dtype=dtype) for rows, inputs, _ in SHAPES for _ in range(20)]
    biases, applied = [i % 2 == 0 for i in range(len(xs))], [i % 4 < 2 for i in range(len(xs))]
    for form in ("dual", "primal"):
        kept, columns = ops.emended_inputs(xs, biases, [form] * len(xs), applied, 1.0, "relative", "nlms")
        assert all(one.isfinite().all() for one in (*kept, *columns))
torch.cuda.synchronize()
print("gpu_small: every op ran")
