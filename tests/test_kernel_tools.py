"""The tools around the kernels, as far as they need neither nvcc nor a GPU: the resource table, the GPU script."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_resources
import gpu_first
import gpu_kinds
import pytest
import torch
from cuda_resources import Resources

from consequentialism import reference
from consequentialism.backend import compiled

ROOT = Path(__file__).resolve().parent.parent
REPORT = """\
ptxas info    : 4 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN2ns12_GLOBAL__N_11kIfLi3EEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN2ns12_GLOBAL__N_11kIfLi3EEEvPT_
    64 bytes stack frame, 88 bytes spill stores, 296 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes cumulative stack size, 512 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN2ns12_GLOBAL__N_11kIfLi3EEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN2ns12_GLOBAL__N_11kIfLi3EEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers
"""


def test_report_of_ptxas_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "void ns::(anonymous namespace)::k<float, 3>(float*)"
    monkeypatch.setattr(cuda_resources, "demangle", lambda names: [name] * len(names))
    table = cuda_resources.parse(REPORT)
    assert table["k<float,3>", "sm_80"] == Resources(255, 64, 88, 296, 512)
    assert table["k<float,3>", "sm_90"] == Resources(30, 0, 0, 0, 0)
    assert cuda_resources.read_table(cuda_resources.write_table(table)) == table


@pytest.mark.parametrize(
    ("change", "miss"),
    [
        ({"spill_stores": 4}, "spill_stores 4, the table allows 0"),
        ({"spill_loads": 4}, "spill_loads 4, the table allows 0"),
        ({"registers": 31}, "registers 31, the table allows 30"),
        ({"shared": 8}, "shared 8, the table allows 0"),
        ({"registers": 29}, None),
    ],
)
def test_what_is_worse_than_the_table_is_named(change: dict[str, int], miss: str | None) -> None:
    allowed = {("k<float>", "sm_80"): Resources(30, 0, 0, 0)}
    own = {("k<float>", "sm_80"): Resources(30, 0, 0, 0)._replace(**change)}
    assert cuda_resources.compare(own, allowed) == ([] if miss is None else [f"k<float> sm_80: {miss}"])


def test_a_kernel_missing_from_the_table_or_new_to_it_is_named() -> None:
    table = {("k<float>", "sm_80"): Resources(30, 0, 0, 0)}
    assert cuda_resources.compare(table, {}) == ["k<float> sm_80: not in the table"]
    assert cuda_resources.compare({}, table) == ["k<float> sm_80: in the table, but not compiled"]


def test_the_committed_table_has_both_architectures_of_every_kernel() -> None:
    table = cuda_resources.read_table(cuda_resources.TABLE.read_text())
    own = {(kernel, arch) for kernel, arch in table if arch == cuda_resources.WARPGROUP_ARCHITECTURE}
    kernels = {kernel for kernel, _ in set(table) - own}
    assert set(table) - own == {(kernel, arch) for kernel in kernels for arch in cuda_resources.ARCHITECTURES}
    assert len(own) == 6
    assert all(kernel.startswith("warpgroup_gram_kernel<") for kernel, _ in own)
    assert all(table[key].spill_stores == 0 for key in own)


def test_products_that_wait_for_one_another_are_refused() -> None:
    remark = f"ptxas info    : (C7510) Potential Performance Loss: {cuda_resources.SERIALIZED} due to ..."
    with pytest.raises(SystemExit, match="serialized"):
        cuda_resources.parse(f"{REPORT}{remark}\n")


def test_only_the_warpgroups_source_is_for_sm_90a_alone() -> None:
    for source in sorted(cuda_resources.CUDA.glob("*.cu")):
        codes = [target.partition(",code=")[2] for target in cuda_resources.targets_of(source) if ",code=" in target]
        assert codes == (["sm_90a"] if source.stem == "warpgroup_gram" else ["sm_80", "sm_90", "compute_90"])


NVCC = """#!/bin/bash
echo "$@" > {folder}/arguments
cat {folder}/report >&2
exit ${{CODE:-0}}
"""


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize("code", [0, 1])
def test_nvcc_of_a_build_leaves_its_report_beside_the_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC.format(folder=tmp_path))
    nvcc.chmod(0o755)
    (tmp_path / "report").write_text(REPORT + "k.cu(3): warning #1: wrong\n")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "k.cu").touch()
    monkeypatch.setattr(cuda_resources, "CUDA", tmp_path)
    monkeypatch.setenv("CODE", str(code))
    with pytest.raises(SystemExit, match=r"0 reports of k\.cu"):
        cuda_resources.built(tmp_path / "cuda")
    arguments = ["-c", "k.cu", "-o", str(tmp_path / "cuda" / "k.o"), "-gencode=arch=compute_80,code=sm_80"]
    assert cuda_resources.compile_and_keep(str(nvcc), arguments) == code
    assert (tmp_path / "arguments").read_text().split() == [*arguments, "-Xptxas", "-v"]
    assert capfd.readouterr().err == "k.cu(3): warning #1: wrong\n"
    (table,) = cuda_resources.built(tmp_path / "cuda")
    assert [(arch, value) for (_, arch), value in table.items()] == [
        ("sm_80", Resources(255, 64, 88, 296, 512)),
        ("sm_90", Resources(30, 0, 0, 0, 0)),
    ]


STAND_IN = """#!/bin/bash
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *device_types*) exit ${PREBUILT:-1} ;;
  *build_ext*) echo "for $TORCH_CUDA_ARCH_LIST"; exit ${BUILD:-0} ;;
  *--here*)
    echo "sanitized with $PYTHONPATH, uncached ${PYTORCH_NO_CUDA_MEMORY_CACHING:-0}: $*"; [ "${!#}" != "$SPOILT" ] ;;
  *gpu_first.py*) echo "right gram_dual float32"; exit ${FIRST:-0} ;;
  *"consequentialism bench"*)
    echo "met  a target"; echo "within $(grep -o -- '--seconds [0-9-]*' <<< "$*")"
    while [ "$1" != --out ]; do shift; done; echo "op,provider" > "$2" ;;
  *"-m pytest"*) echo "FAILED tests/a.py::test_b"; exit ${TESTS:-0} ;;
esac
"""
SANITIZER = """#!/bin/bash
while [ "$1" != kns=consequentialism ]; do shift; done
shift; exec "$@"
"""


def test_a_source_is_compiled_again_where_what_it_includes_changes(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    texts = {
        "cuda/a.cu": '#include "b.cuh"\n#include <algorithm>\n',
        "cuda/b.cuh": '#include "../c.h"\n#include "b.cuh"\n',
        "c.h": "",
        "cuda/other.cuh": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    found = cuda_resources.included(tmp_path / "cuda" / "a.cu")
    assert [path.name for path in found] == ["a.cu", "b.cuh", "c.h"]


def run_gpu_script(folder: Path, call: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """``tools/gpu.sh`` with stand-ins for Python, the sanitizer and the profiler; results in ``folder/out``."""
    (folder / "bin").mkdir()
    for name, text in (("python", STAND_IN), ("compute-sanitizer", SANITIZER), ("ncu", "#!/bin/bash\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    paths = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(folder / "bin" / "python"),
        "OUT": str(folder / "out"),
    }
    command = [ROOT / "tools/gpu.sh", *([call] if call else [])]
    return subprocess.run(command, env={**os.environ, **paths, **settings}, capture_output=True, text=True)


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("call", "settings", "code", "lines"),
    [
        (
            "first",
            {},
            0,
            [
                "ok    build",
                "right gram_dual",
                "ok    memcheck: 0 bad of 19",
                "ok    synccheck: 0 bad of 3",
                "ok    tests",
                "ok    bench inverse",
            ],
        ),
        ("first", {"PREBUILT": "0", "TESTS": "1"}, 1, ["FAIL  tests: exit 1", "FAILED tests/a.py", "ok    check"]),
        ("first", {"REPEATS": "7"}, 0, ["ok    synccheck: 0 bad of 3", "all passed"]),
        ("first", {"FIRST": "1"}, 1, ["right gram_dual", "ok    racecheck: 0 bad of 12", "FAILED in"]),
        ("first", {"SPOILT": "apply_dual"}, 1, ["memcheck of apply_dual: FAIL", "FAIL  memcheck: 1 bad of 19"]),
        (
            "first",
            {"SPOILT": "graph"},
            1,
            ["FAIL  memcheck: 1 bad of 19", "FAIL  racecheck: 1 bad of 12", "FAIL  synccheck: 1 bad of 3"],
        ),
        ("first", {"BUILD": "1"}, 1, ["FAIL  build: exit 1", "FAILED in"]),
        ("first", {"SECONDS_ALLOWED": "4"}, 1, ["FAIL  build: no time was left for it"]),
        ("bench", {}, 0, ["ok    bench whole", "ok    ncu", "ok    bench others", "met  a target", "all passed"]),
        ("", {}, 2, []),
    ],
    ids=str,
)
def test_gpu_script(tmp_path: Path, call: str, settings: dict[str, str], code: int, lines: list[str]) -> None:
    done = run_gpu_script(tmp_path, call, **settings)
    assert done.returncode == code, done.stdout + done.stderr
    for line in lines:
        assert line in done.stdout, done.stdout
    results = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(results) <= 8, results
    log = (tmp_path / "out" / "log.txt").read_text() if call else ""
    assert ("for 9.0" in log) == (bool(call) and "PREBUILT" not in settings and "SECONDS_ALLOWED" not in settings)
    if "memcheck.txt" in results:  # the package is found though nothing is installed
        text = (tmp_path / "out" / "memcheck.txt").read_text()
        repeats = settings.get("REPEATS", "3")
        for kind, uncached in (("gram_primal", 1), ("repeat", 1), ("graph", 0), ("streams", 0), ("side_stream", 0)):
            end = f"--repeats {repeats} {kind}"
            assert re.search(rf"sanitized with {re.escape(str(ROOT))}, uncached {uncached}: .*{end}$", text, re.M), text
    if call == "bench":
        assert {"whole.csv", "parts.csv", "conv.csv", "half.csv", "others.csv", "log.txt"} <= set(results)


@pytest.mark.parametrize("call", ["first", "bench"])
def test_each_call_of_the_gpu_script_has_time_for_all_its_parts(call: str) -> None:
    script = (ROOT / "tools/gpu.sh").read_text()
    (allowed,) = map(int, re.findall(r"SECONDS_ALLOWED:-(\d+)", script))
    (parts,) = re.findall(rf"^  {call}\)\n(.*?)^    ;;", script, re.M | re.S)
    limits = re.findall(r"^ +(?:(?:part|sanitize|bench) \w+|first_contact) (\d+)\b", parts, re.M)
    assert len(limits) == len(re.findall(r"^ +(?:part|sanitize|bench|first_contact|timeout) ", parts, re.M))
    probes = 15  # before them, two processes that import torch
    assert sum(map(int, limits)) + (probes if call == "first" else 0) <= allowed < 600


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_what_has_no_time_left_in_the_gpu_script_does_not_run(tmp_path: Path) -> None:
    done = run_gpu_script(tmp_path, "first", PREBUILT="0", SECONDS_ALLOWED="0")
    late = re.findall(r"^gpu: FAIL  (.*): no time was left for it$", done.stdout, re.M)
    parts = ["info", "first contact", "memcheck", "racecheck", "synccheck", "tests", "check", "bench inverse"]
    assert (done.returncode, late) == (1, parts), done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.txt"]


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_benchmark_of_the_gpu_script_ends_within_the_time_that_is_left(tmp_path: Path) -> None:
    done = run_gpu_script(tmp_path, "bench", PREBUILT="0", SECONDS_ALLOWED="40")
    assert done.returncode == 0, done.stdout
    seconds = re.findall(r"^within --seconds (\d+)$", (tmp_path / "out" / "log.txt").read_text(), re.M)
    assert seconds
    assert all(0 < int(each) <= 20 for each in seconds)


def test_first_contact_has_time_for_all_its_processes() -> None:
    script = (ROOT / "tools/gpu.sh").read_text()
    (limit,) = re.findall(r"^ +first_contact (\d+)$", script, re.M)
    at_once, seconds = 12, 10  # of a process, most of which torch and CUDA take to start
    processes = len(gpu_kinds.KINDS) * len(gpu_kinds.TYPES)
    assert -(-processes // at_once) * seconds <= int(limit)


def test_grams_of_half_types_are_held_to_float32() -> None:
    bounds = gpu_kinds.BOUNDS
    for kind in gpu_kinds.KINDS:
        wide = "gram" in kind
        assert gpu_kinds.bound_of(kind, torch.bfloat16) == bounds[torch.float32 if wide else torch.bfloat16], kind
        assert gpu_kinds.bound_of(kind, torch.float64) == bounds[torch.float64]


@pytest.mark.parametrize("kind", gpu_kinds.KINDS)
def test_kinds_of_first_contact_are_right_on_the_cpu(kind: str) -> None:
    # Their own arithmetic and bounds; what they ask of a GPU is only seen there.
    if compiled.module is None:
        pytest.skip("no compiled kernels")
    slow = {"inverse_1025", "inverse_stock", "inverse_retry_1100", "inverse_cluster_large", "gram_large", "apply_large"}
    slow_starts = ("gram_warpgroups", "conv_gram_large", "conv_gram_displaced")
    for name in ("float32",) if kind in slow or kind.startswith(slow_starts) else gpu_kinds.TYPES:
        assert gpu_first.here(kind, name, "cpu").startswith(f"right {kind} {name}"), gpu_first.here(kind, name, "cpu")


def test_repeats_of_first_contact(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_kinds, "REPEATS", 50)
    calls = []
    monkeypatch.setattr(gpu_kinds, "_calls", lambda dtype, device: lambda: calls.append(dtype) or [])
    assert gpu_first.main(["--here", "--device", "cpu", "--type", "float32", "--repeats", "3", "repeat"]) == 0
    assert len(calls) == 4  # the first and three more
    with pytest.raises(SystemExit):
        gpu_first.main(["--repeats", "0", "repeat"])
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err


def test_first_contact_says_who_died_and_who_hung(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    monkeypatch.setattr(gpu_first, "__file__", str(script))
    script.write_text("import os; os.kill(os.getpid(), 11)")
    assert gpu_first.apart("gram_dual", "float32", "cpu", 20).startswith("DIED  gram_dual float32: exit code -11")
    script.write_text("import time; time.sleep(60)")
    assert gpu_first.apart("graph", "float64", "cpu", 0.5) == "HUNG  graph float64: no end after 0.5 s"
    script.write_text("print('WRONG graph float64: error 1, 1e-10 allowed')")
    assert gpu_first.apart("graph", "float64", "cpu", 20).startswith("WRONG graph float64: error 1, 1e-10 allowed, ")
    script.write_text("print('passed over: no room'); print('right graph float64: error 0, 1e-10 allowed')")
    assert gpu_first.apart("graph", "float64", "cpu", 20).endswith(" s; passed over: no room")


def test_a_team_without_room_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise ValueError(message)

    monkeypatch.setattr(torch.ops.consequentialism.damped_inverse, "by", refuse, raising=False)
    assert gpu_kinds.NO_ROOM in (ROOT / "csrc/cuda/damped_inverse_binding.cpp").read_text()
    message = f"variant 'cluster' {gpu_kinds.NO_ROOM} for a gram of 190 rows in Float"
    assert gpu_kinds._inverse_by("cluster", torch.eye(2), ()) is None
    assert capsys.readouterr().out == f"passed over: {message}\n"
    message = "gram must be square"
    with pytest.raises(ValueError, match=message):
        gpu_kinds._inverse_by("cluster", torch.eye(2), ())


def test_a_wrong_kernel_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = compiled.input_gram
    monkeypatch.setattr(compiled, "input_gram", lambda *arguments: right(*arguments) * 1.001)
    assert gpu_first.here("gram_dual", "float32", "cpu").startswith("WRONG gram_dual float32: error 0.001, 5e-05")


def test_all_backends_retry_a_broken_factor_alike() -> None:
    for file, name in (("cpu/damped_inverse.cpp", "kRetries"), ("cuda/damped_inverse.cuh", "kInverseRetries")):
        found = re.findall(rf"constexpr int {name} = (\d+);", (ROOT / "csrc" / file).read_text())
        assert found == [str(reference.RETRIES)], file


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("compute_80 compute_90 compute_100 compute_120", "8.0;9.0+PTX;10.0;12.0"),
        ("compute_80 compute_90", "8.0;9.0+PTX"),
    ],
)
def test_default_architectures_are_those_of_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, expected: str
) -> None:
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\nprintf '%s\\n' {listed}\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    assert runpy.run_path(str(ROOT / "setup.py"))["default_cuda_architectures"]() == expected


def setup_functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.skipif(os.name == "nt", reason="built there without")
@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("8.0;9.0+PTX;10.0", (8, 0), True),
        ("8.0 9.0a", (8, 0), True),
        ("Ampere;Hopper", (8, 0), True),
        ("8.0+PTX;10.0;12.0", (9, 0), False),
        ("native", (9, 0), True),
        ("", (9, 0), True),
        ("native", (8, 0), False),
        ("", (10, 0), False),
    ],
)
def test_products_of_warpgroups_are_built_for_hopper(
    monkeypatch: pytest.MonkeyPatch, architectures: str, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    assert setup_functions(monkeypatch)["builds_warpgroups"](architectures) == expected


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_the_warpgroups_object_is_made_anew_by_another_command_or_after_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, calls = tmp_path / "nvcc", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n: > {tmp_path}/csrc/cuda/warpgroup_gram.o\nexit $BREAK\n')
    compiler.chmod(0o755)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTORCH_NVCC", str(compiler))
    compile_warpgroups = setup_functions(monkeypatch)["compile_warpgroups"]

    def count(*flags: str, broken: int = 0) -> int:
        monkeypatch.setenv("BREAK", str(broken))
        if broken:
            with pytest.raises(subprocess.CalledProcessError):
                compile_warpgroups(tmp_path, list(flags))
        else:
            assert compile_warpgroups(tmp_path, list(flags)) == f"{tmp_path}/csrc/cuda/warpgroup_gram.o"
        return len(calls.read_text().splitlines())

    assert [count("-O3"), count("-O3"), count("-O2"), count("-O2")] == [1, 1, 2, 2]
    assert [count("-O1", broken=1), count("-O1"), count("-O1")] == [3, 4, 4]
    monkeypatch.setattr("torch.version.cuda", "1.0")
    assert count("-O1") == 5


def test_addresses_on_a_device_are_asked_for_once_and_never_in_a_capture() -> None:
    # The first question for an address may load a module, which a capture forbids. A GPU's first op asks for all of
    # them, in a mode that lets it.
    asks = re.compile(r"\b(\w+_address)\(&")
    sources = {
        path.name: path.read_text() for path in sorted((ROOT / "csrc" / "cuda").iterdir()) if path.suffix != ".txt"
    }
    addresses = set(re.findall(r"cudaError_t (\w+_address)\(unsigned\*\* address\);", "".join(sources.values())))
    assert len(addresses) == 2
    assert {name: set(asks.findall(text)) for name, text in sources.items() if asks.search(text)} == {
        "device.h": addresses
    }
    limits = sources["device.h"].split("inline Limits limits_of_current_device()")[1].split("\n}")[0]
    guard = limits.index("CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed)")
    assert all(guard < limits.index(f"{address}(&") for address in addresses)
    # Whoever needs a counter has asked for the limits before.
    counted = [
        name
        for name, text in sources.items()
        if name.endswith("_binding.cpp") and re.search(r"\bbreakdown_counter\(\)|\bCounters \w+\(", text)
    ]
    assert counted == ["damped_inverse_binding.cpp", "fused_weight_grad_binding.cpp", "weight_grad_binding.cpp"]
    assert all("limits_of_current_device()" in sources[name] for name in counted)
