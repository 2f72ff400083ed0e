"""The tools around the kernels, as far as they need neither nvcc nor a GPU: the resource table, the GPU script."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import cuda_resources
import pytest
from cuda_resources import Resources

from consequentialism import reference

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
    kernels = {kernel for kernel, _ in table}
    assert set(table) == {(kernel, arch) for kernel in kernels for arch in cuda_resources.ARCHITECTURES}


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
  *slug*) echo a-gpu ;;
  *"import xdist"*) exit 1 ;;
  *build_ext*) echo "for $TORCH_CUDA_ARCH_LIST"; exit ${BUILD:-0} ;;
  *"consequentialism bench"*) echo "the table of $*" ;;
  *"-m pytest"*) exit ${TESTS:-0} ;;
esac
"""


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("settings", "code", "verdicts"),
    [
        ({}, 0, ["ok    build", "ok    tests", "ok    racecheck", "ok    bench", "all passed"]),
        ({"QUICK": "1"}, 0, ["ok    memcheck", "ok    bench", "all passed"]),
        ({"TESTS": "1"}, 1, ["FAIL  tests: exit 1", "ok    bench", "FAILED"]),
        ({"BUILD": "1"}, 1, ["FAIL  build: exit 1", "FAILED"]),
    ],
    ids=str,
)
def test_gpu_script_reports_every_part(
    tmp_path: Path, settings: dict[str, str], code: int, verdicts: list[str]
) -> None:
    for name, text in (("python", STAND_IN), ("compute-sanitizer", "#!/bin/bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path)}
    done = subprocess.run(
        [ROOT / "tools/gpu.sh", "--op", "linear"],
        env={**os.environ, "QUICK": "0", **paths, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    summary = [line for line in done.stdout.splitlines() if line.startswith("gpu: ")]
    for verdict in verdicts:
        assert any(verdict in line for line in summary), summary
    assert (tmp_path / "build.log").read_text() == "for 9.0\n"
    assert ("--quick" in done.stdout) == (settings.get("QUICK") == "1")
    assert ("--device cuda" in done.stdout and "--op linear" in done.stdout) == ("BUILD" not in settings)
    assert ("racecheck" in done.stdout) == (settings.get("QUICK") != "1" and "BUILD" not in settings)


def test_all_backends_retry_a_broken_factor_alike() -> None:
    for file, name in (("cpu/damped_inverse.cpp", "kRetries"), ("cuda/damped_inverse.cuh", "kInverseRetries")):
        found = re.findall(rf"constexpr int {name} = (\d+);", (ROOT / "csrc" / file).read_text())
        assert found == [str(reference.RETRIES)], file
