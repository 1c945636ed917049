"""The page on what the kernels are made of: how SASS is read, what counts as worse, and how memory is used."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import kernels  # noqa: E402
import sass  # noqa: E402
from common import needs_emulation  # noqa: E402
from emulation import build, lint  # noqa: E402

POOL = (
    "_ZN5isqrt4cuda48_GLOBAL__N__c7d4f378_10_pooling_cu_c14f196f_850511pool_kernelINS_8BFloat16EEEvNS_8PoolTaskIT_EEl"
)

RESOURCES = f"""
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {POOL}:
  REG:80 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:744 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ELF = f"""
arch = sm_90
.nv.info
\tAttribute:\tEIATTR_REGCOUNT
\tValue:\tfunction: {POOL}(0x1)\tregister count: 80(0x50)
.nv.info.{POOL}
\t<0x1>
\tAttribute:\tEIATTR_CUDA_API_VERSION
\tValue:\t0x82
\t<0x6>
\tAttribute:\tEIATTR_NUM_BARRIERS
\tFormat:\tEIFMT_BVAL
\tValue:\t0x2
\tTool Name: ptxas
\tTool Version: Cuda compilation tools, release 13.0, V13.0.88
"""

SASS = f"""
arch = sm_90
\tcode for sm_90
\t\tFunction : {POOL}
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                         /* 0x00000a00ff017b82 */
                                                                                  /* 0x000fe20000000800 */
        /*0008*/                   ACQBULK ;                                      /* 0x000000000000782e */
        /*0010*/              @!P0 LDG.E.U16 R5, desc[UR16][R6.64] ;              /* 0x0000001006058981 */
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR16][R6.64] ;     /* 0x0000001006087981 */
        /*0030*/                   LDS.128 R12, [R3] ;                            /* 0x00000000030c7984 */
        /*0040*/                   LDS.64 R16, [R3+0x10] ;                        /* 0x0000100003107984 */
        /*0050*/                   STS [R2], R5 ;                                 /* 0x0000000502007388 */
        /*0060*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;           /* 0x0000000c0804723c */
        /*0070*/              @UP0 FFMA2 R4, R8.F32x2, R12.F32x2, R4.F32x2 ;      /* 0x0000000c08047249 */
        /*0080*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR16][R6.64] ;  /* 0x0000000006027fae */
        /*0090*/                   STL.64 [R1+0x8], R4 ;                          /* 0x0000080401007387 */
        /*00a0*/                   LD.E R4, desc[UR16][R6.64] ;                   /* 0x0000001006047980 */
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                  /* 0x0000000000007b1d */
        /*00c0*/                   NOP ;                                          /* 0x0000000000007918 */
\t\tFunction : not_a_kernel
        /*0000*/                   FFMA R4, R4, R4, R4 ;                          /* 0x0000000000007b1d */
"""


@pytest.fixture
def pool():
    found = {}
    sass.parse_resources(RESOURCES.splitlines(), found)
    assert sass.parse_elf(ELF.splitlines(), found) == "nvcc release 13.0, V13.0.88"
    sass.parse_sass(SASS.splitlines(), found)
    ((key, kernel),) = found.items()
    assert key == ("sm_90", POOL)
    return kernel


def test_what_cuobjdump_prints_is_read(pool):
    assert (pool.registers, pool.stack, pool.shared, pool.local, pool.barriers) == (80, 16, 1024, 8, 2)
    assert pool.instructions == 13
    counted = {name: number for name, number in pool.counts.items() if number}
    assert counted == {
        ("LDG", 16): 1, ("LDG", 128): 1, ("LDS", 128): 1, ("LDS", 64): 1, ("STS", 32): 1,
        "tensor": 1, "FFMA": 1, "LDGSTS": 1, "STL": 1, "generic": 1, "BAR": 1, "wait": 1,
    }  # fmt: skip


@pytest.mark.parametrize("opcode", ("HMMA", "DMMA", "IMMA", "HGMMA", "UTCHMMA", "QMMA", "OMMA"))
def test_instructions_of_tensor_cores(opcode):
    kernel = sass.Kernel("pool", "sm_90")
    sass.count(kernel, opcode, ["16816", "F32"])
    assert kernel.counts["tensor"] == 1


def test_what_comes_before_the_wait_is_counted():
    kernel = sass.Kernel("pool", "sm_90")
    for opcode in ("LDC", "LDS", "LDG", "STG", "LDGSTS", "ACQBULK", "LDG", "STG"):
        sass.count(kernel, opcode, ["E"])
    assert (kernel.counts["before wait"], kernel.counts["wait"]) == (3, 1)


def test_names_are_what_a_reader_knows():
    inside = "void isqrt::cuda::(anonymous namespace)::"
    for name, short in (
        (f"{inside}pool_kernel<isqrt::BFloat16>(isqrt::PoolTask<isqrt::BFloat16>, long)", "pool<bfloat16>"),
        (f"{inside}root_kernel<double>(isqrt::RootTask<double>)", "root<float64>"),
        (f"{inside}product_kernel<float, (int)64, (bool)1>(float const*)", "product<float32, 64, 1>"),
        (
            f"{inside}root_kernel<double, 3, ({inside[5:]}Variant)1>(isqrt::RootTask<double>)",
            "root<float64, 3, InFull>",
        ),
        ("isqrt::cuda::plain_kernel(long)", "plain"),
    ):
        assert sass.shorten(name) == short
    assert sass.demangle([POOL])[0].endswith("pool_kernel<isqrt::BFloat16>(isqrt::PoolTask<isqrt::BFloat16>, long)")


def test_rules(pool, monkeypatch):
    """What each change to a good kernel is told by."""
    pool.name, pool.architecture = "pool<float32, true>", "sm_90"
    pool.stack = pool.local = pool.counts["STL"] = pool.counts["generic"] = 0
    good = kernels.instruction_rows([pool])
    assert kernels.instruction_faults(good, good) == []

    def faults(**changes):
        worse = copy.deepcopy(good)
        worse["sm_90", "pool<float32, true>"] |= changes
        return kernels.instruction_faults(good, worse)

    for heading in kernels.FORBIDDEN:
        assert faults(**{heading: "8"}) == [f"pool<float32, true> on sm_90: {heading} is 8 and must be 0"]
    excused = {("pool<float32, true>", "generic"): "reads another block's shared memory"}
    monkeypatch.setattr(kernels, "EXCUSED", excused)
    assert faults(generic="8") == [] and faults(stack="8") != []
    assert kernels.idle_rules({}) == [
        *(f"no kernel is {e.kernel}, of which {e.instruction} is expected" for e in kernels.EXPECTATIONS),
        "no kernel is pool<float32, true>, whose generic is excused",
    ]
    assert faults(registers="88") == []
    assert "89 registers, 80 on the page (margin 8)" in faults(registers="89")[0]
    assert faults(tensor="8", WARPGROUP="6") == []
    assert "ptxas has serialized wgmma" in faults(tensor="8", WARPGROUP="9")[0]
    assert "wide accesses lost" in faults(**{"LDG 128-bit": "1 of 3"})[0]
    assert "no wait (kernels may still run" in faults(wait="0")[0]
    for name, why in (("tensor", "products run"), ("LDGSTS", "operands are on their way")):
        expected, lost = faults(**{name: "0"})
        assert f"no {name} ({why}" in expected and f"no {name} instruction left" in lost
    assert "not on the page" in kernels.instruction_faults({}, good)[0]
    assert "not in the library" in kernels.instruction_faults(good, {})[0]


def test_two_kernels_of_one_name_are_refused(pool):
    with pytest.raises(ValueError, match="two kernels are called"):
        kernels.instruction_rows([pool, pool])


def test_table_is_read_as_it_was_written(pool):
    pool.name, pool.architecture = "pool<float32>", "sm_90"
    rows = kernels.instruction_rows([pool])
    page = f"## {kernels.INSTRUCTIONS}\n\n{kernels.table(('architecture', 'kernel'), rows)}\n\n## Another\n\n| a |\n"
    assert "| `pool<float32>` |" in page and "DFMA" not in page
    ((key, row),) = kernels.read_table(page, kernels.INSTRUCTIONS, 2).items()
    assert key == ("sm_90", "pool<float32>")
    assert all(kernels.first_number(row, h) == kernels.first_number(rows[key], h) for h in rows[key])
    with pytest.raises(ValueError, match="no section"):
        kernels.read_table(page, "Nothing", 2)


def test_spills_are_seen(tmp_path):
    """A kernel whose array needs local memory, through nvcc and cuobjdump."""
    nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc")
    source, compiled = tmp_path / "spill.cu", tmp_path / "spill.o"
    source.write_text(
        "__global__ void indexed_kernel(float* y, int n) {\n"
        "  float a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[i * n % 64] = y[i];\n"
        "  y[threadIdx.x] = a[threadIdx.x * n % 64];\n"
        "}\n"
    )
    subprocess.run([nvcc, "-arch=sm_90", "-c", source, "-o", compiled], check=True)
    try:
        rows = kernels.instruction_rows(sass.read(compiled)[0])
    except sass.ToolMissing as error:
        pytest.skip(str(error))
    faults = kernels.instruction_faults({}, rows)
    assert "indexed on sm_90: stack is 256 and must be 0" in faults
    assert [fault for fault in faults if fault.startswith("indexed on sm_90: LDL + STL is ")]


def test_library_without_kernels_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--check", "--library", str(tmp_path / "none.so")])
    assert "argument --library: no file" in capsys.readouterr().err


# ---- Memory accesses


@needs_emulation
def test_seeded_accesses_are_rated_as_known():
    accesses = lint.run("lint_seeds")
    lines = (build.EMULATION / "lint_seeds.cu").read_text().splitlines()

    def rated(case, seed, memory, access):
        (line,) = (number for number, text in enumerate(lines, 1) if text.endswith(f"seed: {seed}"))
        (found,) = (
            a for a in accesses
            if (a.case, a.memory, a.access, a.line.split()[0]) == (case, memory, access, f"lint_seeds.cu:{line}")
        )  # fmt: skip
        return found.bytes, found.cycles / found.ideal

    assert rated("transpose", "transpose", "shared", "load") == (4, 32)
    assert rated("transpose padded", "transpose", "shared", "load") == (4, 1)
    assert rated("transpose padded", "transpose", "global", "store") == (4, 1)
    assert rated("strided 1", "strided", "global", "load") == (4, 1)
    assert rated("strided 8", "strided", "global", "load") == (4, 8)
    assert rated("halves 1", "halves", "global", "load") == (2, 1)
    assert rated("halves 4", "halves", "global", "load") == (2, 4)
    assert rated("packets 1", "packets", "shared", "load") == (16, 1)
    assert rated("packets 2", "packets", "shared", "load") == (16, 2)
    assert rated("copies", "copies", "global", "load") == (16, 2)
    assert rated("copies", "copies", "shared", "store") == (16, 1)
    assert rated("distributed", "distributed", "shared", "load") == (4, 2)


@needs_emulation
def test_memory_is_used_as_the_page_says():
    page = kernels.read_table(kernels.PAGE.read_text(), kernels.TOTALS, len(lint.TOTAL_KEYS))
    present = lint.report(sass.shorten).totals
    assert kernels.access_faults(page, present) == [], "benchmarks/kernels.py --write --accesses, if that is as meant"
    worse = {key: row | {"x ideal": str(2 * float(row["x ideal"]))} for key, row in present.items()}
    assert len(kernels.access_faults(page, worse)) == len(present)
    assert len(kernels.access_faults({}, present)) == len(kernels.access_faults(page, {})) == len(present)
