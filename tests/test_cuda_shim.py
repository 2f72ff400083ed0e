"""The shim that runs CUDA kernels on the host: what kernels may use works, and what is wrong is caught."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import cuda_shim
import pytest
import torch
from torch import Tensor

FOLDER = Path(cuda_shim.__file__).parent
SEEDS = tuple(range(6))


@pytest.fixture(scope="module")
def shim() -> cuda_shim.Library:
    return cuda_shim.load([FOLDER / "self_test.cu"])


@pytest.fixture(scope="module")
def broken() -> cuda_shim.Library:
    return cuda_shim.load([FOLDER / "broken.cu"])


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).tolist()


def test_indices(shim: cuda_shim.Library) -> None:
    (out,) = shim.run("call_index", shim.empty(12, 24, dtype=torch.int32), seeds=SEEDS)
    assert torch.equal(out, torch.arange(12)[:, None].int() * 10000 + torch.arange(24).int())


@pytest.mark.parametrize("count", [1, 31, 64, 100, 256])
def test_block_barriers_with_threads_that_left(shim: cuda_shim.Library, count: int) -> None:
    x = torch.randint(-50, 50, (5, count)).float()
    _, out = shim.run("call_block_sum", shim.guarded(x), shim.empty(5), 5, count, 256, seeds=SEEDS)
    assert torch.equal(out, x.sum(1))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("int", torch.int32), ("unsigned", torch.int32), ("float", torch.float32), ("double", torch.float64)],
)
def test_shuffles(shim: cuda_shim.Library, name: str, dtype: torch.dtype) -> None:
    x = torch.randn(32, dtype=torch.float64).mul(1000).to(dtype)
    lane = torch.arange(32)
    _, out = shim.run(f"call_shuffle_{name}", shim.guarded(x), shim.empty(5, 32, dtype=dtype), seeds=SEEDS)
    sources = [
        torch.full((32,), 5),
        torch.where(lane < 3, lane, lane - 3),
        torch.where(lane > 27, lane, lane + 4),
        lane ^ 17,
        torch.where(lane < 16, 2, 20),
    ]
    assert torch.equal(out, torch.stack([x[source] for source in sources]))


def test_votes(shim: cuda_shim.Library) -> None:
    (out,) = shim.run("call_vote", shim.empty(5, dtype=torch.int32), seeds=SEEDS)
    assert out.tolist() == [0xAAAAAAAA - (1 << 32), 1, 0, 1, 0]


def test_atomics(shim: cuda_shim.Library) -> None:
    dtypes = (torch.int32, torch.int32, torch.int64, torch.int32)
    out = shim.run("call_atomic", *(shim.guarded(torch.zeros(1, dtype=dtype)) for dtype in dtypes), seeds=SEEDS)
    assert [int(one) for one in out] == [-240, 360, 120 << 33, -1]


def tf32(x: Tensor) -> Tensor:
    """To 10 bits of mantissa, ties away from zero."""
    rounded = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def test_mathematics(shim: cuda_shim.Library) -> None:
    x = torch.tensor([0.0, 1.0, -2.5, 1e20, float("inf"), 1.00048828125, -1.00048828125, 3.14159])
    _, out = shim.run("call_math", shim.guarded(x), shim.empty(8, 13), 8)
    double = x.double()
    expected = torch.stack(
        [
            (double * double + 1).float(),
            x.abs().sqrt(),
            (double.abs() + 1).rsqrt().float(),
            x.isfinite().float(),
            x.clamp(min=0.5),
            x.clamp(max=0.5),
            x,
            (double * 2 + 1).float(),
            ((double.abs() + 1).rsqrt() + 2).float(),
            tf32(x),
        ],
        1,
    )
    torch.testing.assert_close(out[:, :10], expected, rtol=2e-7, atol=0)
    for column, exact, error in (
        (10, 1 / double, 2.0**-23),
        (11, 1 / double, 2.0**-19),
        (12, double.abs().rsqrt(), 2.0**-22.9),
    ):
        # As far off as the chip may be, and rounding beside it.
        torch.testing.assert_close(out[:, column].double(), exact, rtol=error + 2.0**-24, atol=0)
        off = (out[:, column] / exact - 1).abs()
        assert off[exact.isfinite() & (exact != 0)].max() > error / 8
    assert bits(out[:, 9]) == bits(tf32(x))


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_types_round_as_torch(shim: cuda_shim.Library, name: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    between = (every.double() + every.double().roll(1)).div(2).float()  # ties among them
    special = torch.tensor([float("inf"), -float("inf"), 65519.9, 65520.0, 3.4e38, 1e-45, -0.0, 2**-24, 2**-25])
    x = torch.cat([every, between, special, torch.randn(1000), torch.randn(1000) * 1e-6])
    out, back = shim.run(
        f"call_convert_{name}",
        shim.guarded(x),
        shim.empty(len(x), dtype=dtype),
        shim.empty(len(x)),
        len(x),
        seeds=(0,),
    )[1:]
    assert bits(out) == bits(x.to(dtype))
    assert bits(back) == bits(x.to(dtype).float())
    nan = shim.run(
        f"call_convert_{name}",
        shim.guarded(torch.tensor([float("nan")])),
        shim.empty(1, dtype=dtype),
        shim.empty(1),
        1,
    )
    assert nan[1].isnan()
    assert nan[2].isnan()


@pytest.mark.parametrize("count", [96, 95, 50, 3])
def test_asynchronous_copies_fill_with_zeros(shim: cuda_shim.Library, count: int) -> None:
    x = torch.randn(count)
    _, out = shim.run("call_copy", shim.guarded(x), shim.empty(97), count, seeds=SEEDS)
    assert torch.equal(out, torch.cat([x, torch.zeros(96 - count), x[:1]]))


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_mma_and_ldmatrix(shim: cuda_shim.Library, name: str, dtype: torch.dtype) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    out = shim.run(
        f"call_mma_{name}",
        shim.guarded(a),
        shim.guarded(b),
        shim.guarded(b.t().contiguous()),
        shim.guarded(d),
        shim.empty(16, 8),
    )
    expected = (d.double() + a.double() @ b.double().t()).float()
    torch.testing.assert_close(out[3], expected, rtol=2e-7, atol=1e-7)
    assert torch.equal(out[3], out[4])


def test_tf32_mma(shim: cuda_shim.Library) -> None:
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    out = shim.run("call_mma_tf32", shim.guarded(a), shim.guarded(b), shim.guarded(d))[2]
    torch.testing.assert_close(out, (d.double() + tf32(a).double() @ tf32(b).double()).float(), rtol=2e-7, atol=1e-7)
    assert not torch.allclose(out, d + a @ b, rtol=1e-6, atol=1e-6)


def test_f64_mma(shim: cuda_shim.Library) -> None:
    a, b, d = (torch.randn(*shape, dtype=torch.float64) for shape in ((8, 4), (4, 8), (8, 8)))
    out = shim.run("call_mma_f64", shim.guarded(a), shim.guarded(b), shim.guarded(d))[2]
    torch.testing.assert_close(out, d + a @ b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("cluster", [1, 2, 8, 16])
def test_clusters(shim: cuda_shim.Library, cluster: int) -> None:
    x = torch.randint(-50, 50, (16, 40)).float()
    _, out = shim.run("call_cluster", shim.guarded(x), shim.empty(16, 40), 16, cluster, 40, seeds=SEEDS)
    sums = x.view(-1, cluster, 40).sum(1).repeat_interleave(cluster, 0)
    assert torch.equal(out, sums + 1000 * (torch.arange(16) % cluster)[:, None])


@pytest.mark.parametrize(("blocks", "rounds"), [(1, 2), (5, 3), (16, 1)])
def test_grid_barrier_again_and_again(shim: cuda_shim.Library, blocks: int, rounds: int) -> None:
    x = torch.randn(blocks, 33)
    counter = shim.guarded(torch.zeros(1, dtype=torch.int32))
    shim.reset_counts()
    out = shim.run("call_grid", shim.guarded(x), shim.empty(blocks, 33), counter, blocks, 33, rounds, seeds=SEEDS)
    expected = x
    for _ in range(2 * rounds):
        expected = expected.roll(-1, 0) + 1
    assert torch.equal(out[0], expected)
    assert int(out[2]) & 0x7FFFFFFF == 0
    assert shim.launches == 2 * len(SEEDS)


def test_blocks_come_in_any_order(shim: cuda_shim.Library) -> None:
    x = torch.randint(-50, 50, (9,)).float()
    last = shim.guarded(torch.zeros(1, dtype=torch.int32))
    out = shim.run("call_last_block", shim.guarded(x), shim.empty(9), last, shim.empty(1), 9, seeds=SEEDS)
    assert float(out[3]) == float(2 * x.sum())


def test_vectors(shim: cuda_shim.Library) -> None:
    x = torch.randn(7, 4)
    assert torch.equal(shim.run("call_vector", shim.guarded(x), shim.empty(7, 4), 7)[1], x.flip(1))


@pytest.mark.parametrize("bytes_", [0, 1, 127, 128, 129, 4096, 4097, 232448])
def test_all_of_shared_memory(shim: cuda_shim.Library, bytes_: int) -> None:
    out = shim.run("call_shared_bytes", shim.empty(bytes_, dtype=torch.uint8), bytes_)[0]
    assert torch.equal(out, torch.arange(bytes_).to(torch.uint8))


def test_empty_grid_launches_nothing(shim: cuda_shim.Library) -> None:
    shim.reset_counts()
    for grid in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        shim.run("call_shape", *grid, 32, 0, 1, False)
    assert shim.launches == 0


def test_launches_are_counted(shim: cuda_shim.Library) -> None:
    shim.reset_counts()
    shim.run("call_shape", 3, 2, 2, 33, 512, 3, False)
    shim.run("call_shape", 2, 1, 1, 33, 100, 2, True)
    assert shim.launches == 2 * len(cuda_shim.SEEDS)
    assert shim.shared_bytes == 512


def test_a_slower_switch_gives_the_same(shim: cuda_shim.Library) -> None:
    portable = cuda_shim.load([FOLDER / "self_test.cu"], ["-DCONSEQUENTIALISM_SHIM_UCONTEXT"])
    x = torch.randn(3, 200)
    for library in (shim, portable):
        out = library.run("call_block_sum", library.guarded(x), library.empty(3), 3, 200, 224)[1]
        torch.testing.assert_close(out, x.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 1, 1025, 0, 1, False), "too many threads"),
        ((1, 1, 1, 0, 0, 1, False), "an empty block"),
        ((1, 1, 1, 32, 232449, 1, False), "too much shared memory"),
        ((34, 1, 1, 32, 0, 17, False), "no such cluster"),
        ((5, 1, 1, 32, 0, 2, False), "no multiple of the cluster"),
        ((1, 65536, 1, 32, 0, 1, False), "too large a grid"),
        ((1, 1, 65536, 32, 0, 1, False), "too large a grid"),
        ((1 << 31, 1, 1, 32, 0, 1, False), "too large a grid"),
        ((133, 1, 1, 32, 0, 1, True), "more blocks than can be resident"),
    ],
)
def test_impossible_launches(shim: cuda_shim.Library, shape: tuple[int, ...], message: str) -> None:
    shim.reset_counts()
    with pytest.raises(cuda_shim.ShimError, match=rf"kernel barriers_kernel: .*{message}"):
        shim.run("call_shape", *shape)
    assert shim.launches == 0
    shim.run("call_shape", 1, 1, 1, 1024, 232448, 1, False)


def call(
    broken: cuda_shim.Library,
    name: str,
    *,
    offset: int = 0,
    right: bool = False,
    count: int = 256,
    seeds: tuple[int, ...] = cuda_shim.SEEDS,
    value: Tensor | None = None,
) -> list[Tensor]:
    x = broken.guarded(torch.arange(count).float() if value is None else value, "in")
    return broken.run("call_broken", name.encode(), x, broken.empty(256, name="out"), count, offset, right, seeds=seeds)


@pytest.mark.parametrize(
    "name",
    [
        "missing_barrier",
        "missing_second_barrier",
        "missing_syncwarp",
        "missing_grid_barrier",
        "missing_barrier_after_copy",
        "copy_over_what_is_read",
        "arrives_too_early",
    ],
)
def test_missing_barrier(broken: cuda_shim.Library, name: str) -> None:
    value = torch.arange(256).float()
    if name == "missing_grid_barrier":
        value[64] = 0  # the counter
    call(broken, name, right=True, value=value, seeds=SEEDS)
    with pytest.raises(AssertionError, match="differs between seeds 0 and"):
        call(broken, name, value=value)


@pytest.mark.parametrize("name", ["missing_copy_wait", "missing_copy_commit"])
def test_missing_copy_wait(broken: cuda_shim.Library, name: str) -> None:
    assert torch.equal(call(broken, name, right=True)[1][:64], 4 * torch.arange(64).float())
    assert call(broken, name)[1][:64].isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "divergent_barrier",
            r"deadlock: 64 of 64 threads wait; block \(0, 0, 0\) thread \(0, 0, 0\) in __syncthreads at broken.cu:\d+; "
            r"block \(0, 0, 0\) thread \(16, 0, 0\) in __syncwarp at broken.cu:\d+",
        ),
        ("two_barriers", r"divergent barrier: __syncthreads at broken.cu:\d+ meets the one at broken.cu:\d+"),
        ("grid_barrier_alone", r"deadlock: 32 of 32 threads wait; .*in grid_barrier at "),
        ("nobody_waits", r"named barrier 1: 32 of 64 threads came"),
        ("arrives_twice", r"named_barrier_arrive\(1, 64\) at .*: twice|named barrier 1: 32 of 64 threads came"),
        ("other_count", r"named_barrier_wait\(1, 32\) at .*: others are for 64 threads|deadlock: 32 of 64"),
        ("exited_lane", r"exits, but is named in the mask 0xffffffff of __shfl_xor_sync|threads that have exited"),
        ("other_collective", r"__(shfl_sync|syncwarp)\(0xffffffff\) at .* meets __(shfl_sync|syncwarp)\(0xffffffff\)"),
        ("caller_not_in_mask", r"thread \(31, 0, 0\)|exits, but is named"),
        ("other_mask", r"meets __shfl_sync\(0x|exits, but is named in|have exited"),
        ("partial_warp", r"names threads that have exited or never were"),
        ("divergent_mma", r"mma_m16n8k8_tf32\(0xffffffff\) at broken.cu:\d+ meets mma_m16n8k8_tf32"),
        ("no_pointer", r"read at (\(nil\)|0x0), in no buffer at broken.cu:\d+"),
        ("deep", r"write on the stack"),
        ("cluster_rank", r"cluster_map to 2 of 2"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_threads(broken: cuda_shim.Library, name: str, message: str, seed: int) -> None:
    kernel = "other_mask" if name == "partial_warp" else name
    with pytest.raises(cuda_shim.ShimError, match=rf"kernel {kernel}: .*({message})"):
        call(broken, name, seeds=(seed,), value=torch.zeros(256))


def test_right_threads(broken: cuda_shim.Library) -> None:
    call(broken, "divergent_barrier", right=True, seeds=SEEDS)
    call(broken, "nobody_waits", right=True, seeds=SEEDS)
    call(broken, "exits_later", offset=-1, seeds=SEEDS)


def test_value_of_a_lane_that_takes_no_part(broken: cuda_shim.Library) -> None:
    assert call(broken, "value_of_no_lane")[1][:16].isnan().all()


@pytest.mark.parametrize("offset", [0, 31])
def test_thread_that_leaves_before_or_after_the_others_wait(broken: cuda_shim.Library, offset: int) -> None:
    for seed in SEEDS:
        with pytest.raises(cuda_shim.ShimError, match="exit"):
            call(broken, "exits_later", offset=offset, seeds=(seed,))


# Past the end the even seeds fault and before the start the odd ones; what the others find is written to.
@pytest.mark.parametrize("offset", [256, 300, 40000, -1, -1024, -40000])
@pytest.mark.parametrize("access", ["read", "write"])
def test_stray_access_to_global_memory(broken: cuda_shim.Library, access: str, offset: int) -> None:
    place = rf"{access} at byte {4 * offset} of the 1024 of 'in' at broken.cu:\d+, block \(0, 0, 0\) thread \(0, 0, 0\)"
    with pytest.raises(cuda_shim.ShimError, match=f"kernel {access}_global: {place}"):
        call(broken, f"{access}_global", offset=offset, seeds=(0,) if offset > 0 else (1,))
    if access == "write":
        for seed in SEEDS:
            with pytest.raises(cuda_shim.ShimError, match=rf"write at byte {4 * offset} of the 1024 of 'in'"):
                call(broken, "write_global", offset=offset, seeds=(seed,))
    call(broken, f"{access}_global", offset=255)
    call(broken, f"{access}_global", offset=0)


@pytest.mark.parametrize("offset", [32, 1100, 60000, -1, -500, -60000])
@pytest.mark.parametrize("access", ["read", "write"])
def test_stray_access_to_shared_memory(broken: cuda_shim.Library, access: str, offset: int) -> None:
    with pytest.raises(cuda_shim.ShimError, match=f"{access} at byte {4 * offset} of the 128 of shared memory"):
        call(broken, f"{access}_shared", offset=offset, seeds=(0,) if offset > 0 else (1,))
    if access == "write":
        for seed in SEEDS:
            with pytest.raises(cuda_shim.ShimError, match=f"write at byte {4 * offset} of the 128 of shared memory"):
                call(broken, "write_shared", offset=offset, seeds=(seed,))
    call(broken, f"{access}_shared", offset=31)


def test_stray_access_next_to_odd_sizes(broken: cuda_shim.Library) -> None:
    with pytest.raises(cuda_shim.ShimError, match="write at byte 20 of the 20 of 'in'"):
        call(broken, "write_global", count=5, offset=5)
    with pytest.raises(cuda_shim.ShimError, match="write at byte 20 of the 20 of shared memory"):
        call(broken, "write_odd_shared", offset=5)
    assert call(broken, "read_global", count=5, offset=5)[1][0].isnan()
    exact = broken.guarded(torch.zeros(5), "in", alignment=4)
    with pytest.raises(cuda_shim.ShimError, match="read at byte 20 of the 20 of 'in'"):
        broken.run("call_broken", b"read_global", exact, broken.empty(256), 5, 5, False)


def test_fresh_memory_is_nan(broken: cuda_shim.Library) -> None:
    assert call(broken, "read_shared", offset=3)[1][0].isnan()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert broken.empty(3, dtype=dtype).tensor().isnan().all()


@pytest.mark.parametrize(
    ("name", "offset", "message"),
    [
        ("misaligned_copy", 0, r"copy_async_16: at byte 4 of the 1024 of 'in' is misaligned"),
        ("misaligned_copy", 1, r"copy_async_16: byte 4 of shared memory is misaligned"),
        ("stray_copy", 16, r"copy_async_16: 16 bytes at byte 64 of the 64 of shared memory"),
        ("stray_copy", -1, r"read at byte 1024 of the 1024 of 'in'"),
        ("misaligned_vector", 1, r"misaligned address.* at broken.cu:\d+"),
        ("ldmatrix_row", 8, r"ldmatrix_x4: byte 8 of shared memory is misaligned"),
        ("ldmatrix_row", 128, r"ldmatrix_x4: 16 bytes at byte 128 of the 128 of shared memory"),
        ("ldmatrix_row", -16, r"ldmatrix_x4: 16 bytes at byte -16 of the 128 of shared memory"),
        ("array_index", 4, r"an index beyond its array.* at broken.cu:\d+"),
        ("divide_by_zero", 0, r"undefined behaviour|division by zero"),
        ("trap", 9, r"__trap\(\), block \(0, 0, 0\) thread \(9, 0, 0\)"),
    ],
)
def test_wrong_addresses(broken: cuda_shim.Library, name: str, offset: int, message: str) -> None:
    with pytest.raises(cuda_shim.ShimError, match=f"kernel {name}: .*{message}"):
        call(broken, name, offset=offset)


@pytest.mark.parametrize("when", ["before", "after"])
def test_memory_of_blocks_that_are_not_there(broken: cuda_shim.Library, when: str) -> None:
    call(broken, f"cluster_{when}", right=True, seeds=SEEDS)
    message = "does not run yet" if when == "before" else "has exited"
    with pytest.raises(cuda_shim.ShimError, match=rf"of shared memory of block \([01], 0, 0\), which {message}"):
        call(broken, f"cluster_{when}")


def test_endless_kernel(broken: cuda_shim.Library) -> None:
    broken.call.shim_set_seconds(ctypes.c_double(0.2))
    try:
        with pytest.raises(cuda_shim.ShimError, match=r"no end after 0.2 s of processor time"):
            call(broken, "endless", value=torch.zeros(256))
    finally:
        broken.call.shim_set_seconds(ctypes.c_double(60))


def test_right_launch_after_an_error(broken: cuda_shim.Library) -> None:
    for name in ("divergent_barrier", "read_global", "no_pointer", "cluster_after"):
        with pytest.raises(cuda_shim.ShimError):
            call(broken, name, offset=256)
        call(broken, "missing_barrier", right=True)


FAULTS_OUTSIDE = """
import ctypes, sys, threading, time
sys.path.insert(0, {tests!r})
import cuda_shim, torch
from pathlib import Path
broken = cuda_shim.load([Path({source!r})])
def call(name):
    broken.run("call_broken", name, broken.guarded(torch.zeros(9)), broken.empty(9), 9, 999, False)
try:
    call(b"read_global")
except cuda_shim.ShimError:
    print("caught", flush=True)
if {during}:
    threading.Thread(target=call, args=(b"endless",), daemon=True).start()
    time.sleep(0.3)
ctypes.string_at(8)
print("survived", flush=True)
"""


@pytest.mark.parametrize("during", [False, True])
def test_faults_of_others_are_passed_on(broken: cuda_shim.Library, during: bool) -> None:
    code = FAULTS_OUTSIDE.format(tests=str(FOLDER.parent), source=str(FOLDER / "broken.cu"), during=during)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("caught\n", -signal.SIGSEGV), done.stderr
