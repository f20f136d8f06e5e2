"""The ahead-of-time proof: what is shipped compiles and passes its gates, and the gates find faults."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.aot import gates, table
from bench.aot.cases import Case
from bench.aot.compile import TARGETS, Compilation
from bench.aot.resources import Resources, count_dots, parse_amdgcn, parse_sass, parse_usage
from bench.aot.shipped import Shipped, each_kernel_once, shipped
from bench.aot.table import Row

ROOT = Path(__file__).resolve().parents[2]
MOST_HERE, MOST = 150, 480  # compilations: in this file, and in all


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The interpreter of Triton has to be off before its kernels are defined, so in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_and_passes_its_gates() -> None:
    ran = python("-m", "bench.aot", "--once", "--jobs", "1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counts = re.search(r"^(\d+) of (\d+) compilations", ran.stdout, re.MULTILINE)
    assert counts is not None
    compiled, of_all = map(int, counts.groups())
    assert compiled % len(TARGETS) == 0
    assert 0 < compiled <= MOST_HERE
    assert compiled <= of_all <= MOST


def test_the_pinned_triton_has_a_table() -> None:
    pinned = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert table.read(table.path(pinned.group(1))), "`make aot ARGS=--write` writes it"


def test_the_interpreter_is_refused() -> None:
    command = [sys.executable, "-m", "bench.aot", "--once"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "TRITON_INTERPRET is set" in ran.stderr


def test_part_of_the_rows_is_not_written_as_the_table() -> None:
    ran = python("-m", "bench.aot", "--write", "--once")
    assert ran.returncode == 2
    assert "--write needs all rows" in ran.stderr


# ------------------------------------------------------------------------------------ faulty kernels


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, list[str]]]:
    """What the gates say of each kernel and target of faulty_kernels.py."""
    ran = python("tests/bench/faulty_kernels.py")
    assert ran.returncode == 0, ran.stderr
    found: dict[str, dict[str, list[str]]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_a_sound_kernel_passes(said: dict[str, dict[str, list[str]]]) -> None:
    assert said["sound"] == {target: [] for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("spilling", "spills to local memory"),
        ("spilling", "bytes of stack"),
        ("scalar_loads", "loads is a vector"),
        ("scalar_stores", "stores is a vector"),
        ("uncompilable", "CompilationError"),
    ],
)
def test_a_fault_is_found_on_every_target(
    said: dict[str, dict[str, list[str]]], kernel: str, fault: str, target: str
) -> None:
    assert any(fault in message for message in said[kernel][target]), said[kernel]


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
def test_more_shared_memory_than_there_is_is_found(
    said: dict[str, dict[str, list[str]]], target: str
) -> None:
    assert any("bytes of shared memory" in message for message in said["crowding"][target])


@pytest.mark.parametrize(("target", "instruction"), [("sm_90", "HGMMA"), ("sm_100", "UTC")])
def test_a_wide_dot_without_its_instruction_is_found(
    said: dict[str, dict[str, list[str]]], target: str, instruction: str
) -> None:
    assert any(f"no {instruction}" in message for message in said["two_warps"][target])


def test_the_jit_s_own_rules_tell_launches_apart(said: dict[str, dict[str, list[str]]]) -> None:
    aligned, shifted, ones = (said["launches"]["sm_90"][i] for i in range(3))
    assert aligned == "*fp32/16 *fp32/16 i32/16 SIZE=1024; num_warps=4 num_stages=2"
    assert shifted == "*fp32 *fp32/16 i32 SIZE=1024; num_warps=4 num_stages=2"
    assert ones == "*fp32/16 *fp32/16 1 SIZE=1024; num_warps=4 num_stages=2"


def test_grids_that_no_gpu_takes_are_refused(said: dict[str, dict[str, list[str]]]) -> None:
    assert said["grid"]["sm_90"] == [
        "scalar_loads is launched over (1, 65536), allowed is (2147483647, 65535, 65535)"
    ]


def test_a_case_without_a_launch_is_refused_by_its_name() -> None:
    class Idle(Case):
        @property
        def host(self) -> Callable[..., Any]:
            return lambda *_arguments: None

    empty = Idle("gather_tokens", "of nothing", ())
    with pytest.raises(ValueError, match="nothing was launched") as raised:
        shipped([empty])
    assert raised.value.__notes__ == ["This was gather_tokens of nothing for sm_80."]


# ------------------------------------------------------------------------------- gates and the table

SOUND = Resources(
    registers=100,
    scalar_registers=0,
    shared=4096,
    tensor_memory=0,
    stack=0,
    local=0,
    spills=0,
    scalar_spills=0,
    loads=9,
    vector_loads=8,
    stores=4,
    vector_stores=4,
    matrix={"HGMMA": 4},
    dots=2,
    wide_dots=1,
)


@pytest.mark.parametrize("registers", [90, 110])
def test_registers_may_differ_by_a_tenth(registers: int) -> None:
    assert gates.against(SOUND, replace(SOUND, registers=registers)) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"registers": 89}, "89 registers, 100 in the table"),
        ({"registers": 111}, "111 registers, 100 in the table"),
        ({"shared": 4097}, "4097 bytes of shared memory, 4096 in the table"),
        ({"vector_loads": 7}, "7 vector loads, 8 in the table"),
        ({"vector_stores": 3}, "3 vector stores, 4 in the table"),
        ({"matrix": {"HMMA": 4}}, "matrix instructions {'HMMA': 4}, {'HGMMA': 4} in the table"),
    ],
)
def test_what_differs_from_the_table_fails(changed: dict[str, object], message: str) -> None:
    assert gates.against(SOUND, replace(SOUND, **changed)) == [message]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stack": 8}, "8 bytes of stack, allowed is none"),
        ({"local": 8}, "8 bytes of local memory, allowed is none"),
        ({"spills": 1}, "1 spills to local memory, allowed is none"),
        ({"registers": 129}, "129 registers, allowed are 128"),
        ({"shared": 232449}, "232449 bytes of shared memory, sm_90 has 232448"),
        ({"vector_loads": 0}, "none of 9 loads is a vector"),
        ({"vector_stores": 0}, "none of 4 stores is a vector"),
        ({"matrix": {}, "wide_dots": 0}, "2 dots and no matrix instruction"),
        ({"matrix": {"HMMA": 4}}, "1 dots with M >= 64 and no HGMMA*, only {'HMMA': 4}"),
        ({"narrow": 1}, "1 of 1 dots with M >= 64 are left to M = 16"),
    ],
)
def test_what_is_wrong_by_itself_fails(changed: dict[str, object], message: str) -> None:
    now = replace(SOUND, **changed)  # type: ignore[arg-type]
    assert gates.absolute("sm_90", now, vector_loads=True, vector_stores=True, most_registers=128) == [
        message
    ]


def test_scalar_spills_are_recorded_not_gated() -> None:
    now = replace(SOUND, scalar_spills=7, matrix={"v_mfma": 4})
    assert gates.absolute("gfx942", now, vector_loads=True, vector_stores=True) == []
    assert gates.against(replace(now, scalar_spills=0), now) == []
    assert json.loads(Row("k", "gfx942", "", "case", now).line())["scalar_spills"] == 7


def a_row(launch: str, resources: Resources = SOUND) -> Row:
    return Row("gather._kernel", "sm_90", launch, "gather_tokens L/16", resources)


def a_shipped(launch: str) -> Shipped:
    return Shipped(Compilation(None, "sm_90", launch, {}, {}, {}, {}), Case("gather_tokens", "L/16", ()))


def test_each_kernel_once_takes_the_first_of_each_target() -> None:
    keys = [("a", "sm_80", "1"), ("b", "sm_80", "1"), ("a", "sm_80", "2"), ("a", "sm_90", "2")]
    every = {key: a_shipped(key[2]) for key in keys}
    assert list(each_kernel_once(every)) == [keys[0], keys[1], keys[3]]


def test_verdict_names_what_the_table_lacks_and_what_is_gone() -> None:
    here, new, gone = a_row("here"), a_row("new"), a_row("gone")
    every = {row.key: a_shipped(row.launch) for row in (here, new)}
    known = {row.key: row for row in (here, gone)}
    # Also of what was not compiled this time.
    assert gates.verdict(every, {here.key: SOUND}, known) == [
        "gather_tokens L/16: gather._kernel sm_90 new: not in the table",
        "gather_tokens L/16: gather._kernel sm_90 gone: in the table, but launched no more",
    ]
    assert gates.verdict(every, {here.key: SOUND}, None) == []


def test_verdict_names_the_case_whose_registers_changed() -> None:
    row = a_row("here")
    every, known = {row.key: a_shipped("here")}, {row.key: row}
    assert gates.verdict(every, {row.key: replace(SOUND, registers=120)}, known) == [
        "gather_tokens L/16: gather._kernel sm_90: 120 registers, 100 in the table"
    ]
    assert gates.verdict(every, {row.key: "PTXASError: of a kind"}, known) == [
        "gather_tokens L/16: gather._kernel sm_90: PTXASError: of a kind"
    ]


def test_without_a_table_only_the_absolute_gates_judge() -> None:
    row = a_row("here")
    every = {row.key: a_shipped("here")}
    assert gates.verdict(every, {row.key: replace(SOUND, registers=200)}, None) == []
    assert gates.verdict(every, {row.key: replace(SOUND, spills=2)}, None) == [
        "gather_tokens L/16: gather._kernel sm_90: 2 spills to local memory, allowed is none"
    ]


def test_the_table_is_one_sorted_line_a_row_and_comes_back(tmp_path: Path) -> None:
    rows = [a_row("b"), a_row("a", replace(SOUND, registers=12)), a_row("c")]
    file = tmp_path / "table.json"
    assert table.read(file) is None
    table.write(file, rows)
    text = file.read_text().splitlines()
    assert len(text) == len(rows) + 2
    assert [json.loads(line.rstrip(","))["launch"] for line in text[1:-1]] == ["a", "b", "c"]
    assert table.read(file) == {row.key: row for row in rows}


# --------------------------------------------------------------------------------------- what is read

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function copy:
  REG:23 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
        code for sm_90a
                Function : mm
        .headerflags    @"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_ACCELERATORS EF_CUDA_SM90"
        /*0000*/      LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */
                                        /* 0x000fe20000000800 */
        /*0110*/      LDG.E.128 R8, desc[UR16][R24.64] ;  /* 0x0000001018087981 */
        /*0130*/ @P1 LDG.E.U16 R4, desc[UR16][R24.64+0x800] ;  /* 0x0008001018047981 */
        /*0150*/ @!P0 LDGSTS.E.BYPASS.128 [R9+0x800], desc[UR4][R2.64] ;  /* 0x0010001018057981 */
        /*0160*/      STL [R1+0x4], R12 ;  /* 0x0000040c01007387 */
        /*04b0*/ @UP1 UIADD3 UR4, UPT, UPT, -UR5, 0x100000, URZ ;  /* 0x0010000005041890 */
        /*04c0*/      LDL.LU R12, [R1+0x4] ;  /* 0x00000400010c7983 */
        /*04d0*/      HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x00e00000081879f0 */
        /*04e0*/      STG.E.64 desc[UR16][R2.64], R24 ;  /* 0x0000001802007986 */
        /*10f0*/      UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10] ; /* 0x00ff0406040075ea */
        /*1100*/      UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR6 ;  /* 0x00000006000475e3 */
"""

AMDGCN = """
	buffer_load_dwordx4 v[2:5], v13, s[8:11], 0 offen
	global_load_ushort v6, v[2:3], off
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	v_mfma_f32_32x32x8_bf16 v[14:29], v[2:3], v[6:7], v[14:29]
	buffer_store_dwordx2 v[2:3], v20, s[4:7], 0 offen
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     0
    .name:           mm
    .private_segment_fixed_size: 12
    .sgpr_count:     19
    .sgpr_spill_count: 2
    .symbol:         mm.kd
    .vgpr_count:     46
    .vgpr_spill_count: 3
"""


def test_usage_of_a_function_is_read() -> None:
    assert parse_usage(USAGE, "copy") == {"registers": 23, "stack": 8, "local": 4}
    with pytest.raises(ValueError, match="nothing of other"):
        parse_usage(USAGE, "other")


def test_sass_is_counted() -> None:
    assert parse_sass(SASS) == {
        "spills": 2,
        "loads": 3,
        "vector_loads": 2,
        "stores": 1,
        "vector_stores": 1,
        "matrix": {"HGMMA": 1, "UTCHMMA": 1},
    }
    with pytest.raises(ValueError, match="no instruction"):
        parse_sass("code for sm_90a")


def test_amdgcn_is_counted() -> None:
    assert parse_amdgcn(AMDGCN) == {
        "registers": 46,
        "scalar_registers": 19,
        "stack": 12,
        "local": 0,
        "spills": 3,
        "scalar_spills": 2,
        "loads": 2,
        "vector_loads": 1,
        "stores": 1,
        "vector_stores": 1,
        "matrix": {"v_mfma": 1},
    }
    with pytest.raises(ValueError, match="0 entries"):
        parse_amdgcn("s_endpgm")


@pytest.mark.parametrize(
    ("operands", "counted"),
    [
        ("tensor<64x32xbf16> * tensor<32x16xbf16> -> tensor<64x16xf32>", (1, 1)),
        ("tensor<32x64xf16> * tensor<64x64xf16> -> tensor<32x64xf32>", (1, 0)),
        ("tensor<2x64x32xf16> * tensor<2x32x64xf16> -> tensor<2x64x64xf32>", (1, 1)),
        ("tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>", (0, 0)),
        ("inputPrecision = tf32 : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>", (1, 1)),
    ],
)
def test_dots_are_counted(operands: str, counted: tuple[int, int]) -> None:
    separator = " " if operands.startswith("input") else " : "
    assert count_dots(f"    %4 = tt.dot %a, %b, %c,{separator}{operands} loc(#loc1)\n") == counted


def test_cases_are_of_ops_that_triton_takes() -> None:
    wide = torch.empty(1, 2, 8, dtype=torch.float64, device="meta")
    index = torch.empty(1, 1, dtype=torch.int64, device="meta")
    case = Case("gather_tokens", "in fp64", (wide, index, None, None, torch.float64))
    with pytest.raises(ValueError, match="gather_tokens in fp64: not for Triton"):
        _ = case.host
