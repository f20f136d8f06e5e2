"""What a compiled kernel may take, by itself and against the committed table."""

from collections.abc import Mapping

from bench.aot.resources import Resources
from bench.aot.shipped import Shipped
from bench.aot.table import Key, Row

# Bytes that one program may have: of shared memory, or LDS.
MAX_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# The name that matrix instructions begin with where a dot has M of at least 64: wgmma and tcgen05.
WIDE = {"sm_90": "HGMMA", "sm_100": "UTC"}
REGISTERS = 0.1  # the share by which they may differ from the table


def absolute(
    target: str,
    now: Resources,
    *,
    vector_loads: bool = False,
    vector_stores: bool = False,
    most_registers: int | None = None,
) -> list[str]:
    """What is wrong whatever the table says.

    Args:
        target: such as sm_90.
        now: what was compiled.
        vector_loads, vector_stores: must be among its instructions.
        most_registers: it may have; None for any number.
    """
    wrong = [
        f"{value} {what}, allowed is none"
        for value, what in (
            (now.stack, "bytes of stack"),
            (now.local, "bytes of local memory"),
            (now.spills, "spills to local memory"),
        )
        if value
    ]
    if most_registers is not None and now.registers > most_registers:
        wrong.append(f"{now.registers} registers, allowed are {most_registers}")
    if now.shared > MAX_SHARED[target]:
        wrong.append(f"{now.shared} bytes of shared memory, {target} has {MAX_SHARED[target]}")
    if vector_loads and not now.vector_loads:
        wrong.append(f"none of {now.loads} loads is a vector")
    if vector_stores and not now.vector_stores:
        wrong.append(f"none of {now.stores} stores is a vector")
    if now.dots and not now.matrix:
        wrong.append(f"{now.dots} dots and no matrix instruction")
    wide = WIDE.get(target)
    if wide and now.wide_dots and not any(name.startswith(wide) for name in now.matrix):
        wrong.append(f"{now.wide_dots} dots with M >= 64 and no {wide}*, only {now.matrix}")
    elif now.narrow:
        wrong.append(f"{now.narrow} of {now.wide_dots} dots with M >= 64 are left to M = 16")
    return wrong


def against(before: Resources, now: Resources) -> list[str]:
    """What has become different from the table by more than it may."""
    wrong = []
    if abs(now.registers - before.registers) > REGISTERS * before.registers:
        wrong.append(f"{now.registers} registers, {before.registers} in the table")
    if now.shared != before.shared:
        wrong.append(f"{now.shared} bytes of shared memory, {before.shared} in the table")
    if now.vector_loads < before.vector_loads:
        wrong.append(f"{now.vector_loads} vector loads, {before.vector_loads} in the table")
    if now.vector_stores < before.vector_stores:
        wrong.append(f"{now.vector_stores} vector stores, {before.vector_stores} in the table")
    if now.matrix.keys() != before.matrix.keys():
        wrong.append(f"matrix instructions {now.matrix}, {before.matrix} in the table")
    return wrong


def verdict(
    every: Mapping[Key, Shipped], measured: Mapping[Key, Resources | str], table: Mapping[Key, Row] | None
) -> list[str]:
    """What failed, a line each.

    Args:
        every: all that is shipped.
        measured: of some of it, the resources, or why it does not compile.
        table: the committed one; None lets only the absolute gates judge.
    """
    wrong = []
    for key, now in measured.items():
        one = every[key]
        if isinstance(now, str):
            found = [now]
        else:
            found = absolute(
                key[1],
                now,
                vector_loads=one.vector_loads,
                vector_stores=one.vector_stores,
                most_registers=one.most_registers,
            )
            if table is not None and key in table:
                found += against(table[key].resources, now)
        wrong += [f"{one.case}: {key[0]} {key[1]}: {each}" for each in found]
    if table is not None:
        wrong += [
            f"{every[key].case}: {' '.join(key)}: not in the table" for key in every if key not in table
        ]
        wrong += [
            f"{row.case}: {' '.join(key)}: in the table, but launched no more"
            for key, row in table.items()
            if key not in every
        ]
    return wrong
