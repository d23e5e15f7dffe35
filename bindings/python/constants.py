#!/usr/bin/env python3
"""constants.py - writes libvm/constants.py: the enums of include/libvm/*.h as IntEnum and IntFlag classes.

    constants.py INCLUDE_DIR OUTPUT       writes it
    constants.py --check INCLUDE_DIR OUTPUT   says whether it is what would be written

Enums without a type (lists of #define) are named below. Numbers come from the headers; a name is the enumerator without its prefix.
"""
import os
import re
import sys

# C name: (Python name, prefix to drop, base)
ENUMS = {
    "vm_status": ("Status", "VM_", "IntEnum"),
    "vm_prot": ("Prot", "VM_PROT_", "IntFlag"),
    "vm_backend": ("Backend", "VM_BACKEND_", "IntEnum"),
    "vm_platform": ("Platform", "VM_PLATFORM_", "IntEnum"),
    "vm_mode": ("Mode", "VM_MODE_", "IntEnum"),
    "vm_exit_reason": ("ExitReason", "VM_EXIT_", "IntEnum"),
    "vm_reg_id": ("Reg", "VM_REG_", "IntEnum"),
    "vm_trace_category": ("TraceCategory", "VM_TRACE_", "IntFlag"),
    "vm_hook_kind": ("HookKind", "VM_HOOK_", "IntEnum"),
    "vm_hook_result": ("HookResult", "VM_HOOK_", "IntEnum"),
    "vm_advice": ("Advice", "VM_ADVICE_", "IntFlag"),
    "vm_ept_action": ("EptAction", "VM_EPT_", "IntEnum"),
    "vm_compare_kind": ("CompareKind", "VM_COMPARE_", "IntEnum"),
    "vm_snapshot_flags": ("SnapshotFlags", "VM_SNAPSHOT_", "IntFlag"),
    "vm_gdb_action": ("GdbAction", "VM_GDB_", "IntEnum"),
    "vm_sandbox_flags": ("SandboxFlags", "VM_SANDBOX_", "IntFlag"),
    "vm_replay_mode": ("ReplayMode", "VM_REPLAY_", "IntEnum"),
}
DEFINES = {
    "HookFlags": ("IntFlag", ["VM_HOOK_GPA", "VM_HOOK_EXACT", "VM_HOOK_SWITCH"], "VM_HOOK_"),
    "EventFlags": ("IntFlag", ["VM_EVENT_WRITE", "VM_EVENT_SOFT", "VM_EVENT_ERROR", "VM_EVENT_SYSENTER"], "VM_EVENT_"),
}
# Enums without a name: (Python name, prefix), by their first enumerator.
ANONYMOUS = {"VM_MMU_SUPERVISOR": ("MmuContext", "VM_MMU_")}
LEAVE_OUT = re.compile(r"FORCE_INT$|^VM_HOOK_KINDS$|^VM_REG_COUNT$")


def read(path):
    with open(path, encoding="utf-8") as f:
        return re.sub(r"/\*.*?\*/", "", f.read(), flags=re.S)


def expand(include, body):
    """X-macro lists inside an enum become its enumerators."""
    macro = re.search(r"#define (\w+)\(([^)]*)\) ([^\n]*)\n\s*#include <libvm/(\w+\.def)>\n\s*#undef \w+", body)
    if not macro:
        return body
    name, parameters, pattern, file = macro.groups()
    parameters = [p.strip() for p in parameters.split(",")]
    rows = []
    for call in re.finditer(rf"{name}\((.*)\)", read(os.path.join(include, file))):
        values = dict(zip(parameters, [v.strip() for v in re.split(r",(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", call.group(1))]))
        row = re.sub(r"##\s*(\w+)", lambda m: values[m.group(1)], pattern)
        rows.append(re.sub(r"\b\w+\b", lambda m: values.get(m.group(0), m.group(0)), row))
    return body[: macro.start()] + "\n".join(rows) + body[macro.end():]


def enumerators(text):
    value, found = 0, []
    for item in text.split(","):
        item = item.strip()
        if item:
            name, _, number = item.partition("=")
            value = int(number.strip(), 0) if number else value
            if not LEAVE_OUT.search(name.strip()):
                found.append((name.strip(), value))
            value += 1
    return found


def produce(include):
    classes, defines = {}, {}
    for file in sorted(os.listdir(include)):
        if not file.endswith(".h"):
            continue
        text = read(os.path.join(include, file))
        for match in re.finditer(r"typedef enum (\w+) \{(.*?)\} \1;", text, flags=re.S):
            if match.group(1) in ENUMS:
                classes[match.group(1)] = enumerators(expand(include, match.group(2)))
            else:
                sys.exit(f"constants.py: enum {match.group(1)} of {file} has no name in Python")
        for match in re.finditer(r"^enum \{(.*?)\};", text, flags=re.S | re.M):
            rows = enumerators(match.group(1))
            if rows[0][0] not in ANONYMOUS:
                sys.exit(f"constants.py: the enum of {rows[0][0]} in {file} has no name in Python")
            classes[rows[0][0]] = rows
        for match in re.finditer(r"#define (VM_\w+)\s+(?:UINT64_C\()?(0x[0-9a-f]+|\d+)[uU]?\)?\s", text):
            defines[match.group(1)] = int(match.group(2), 0)
    lines = ['"""The enums of the C headers. Written by constants.py: change the headers instead."""', "",
             "from enum import IntEnum, IntFlag", ""]
    names = []
    for c_name, (name, prefix, base) in ENUMS.items():
        if c_name not in classes:
            continue
        names.append(name)
        lines += ["", f"class {name}({base}):", f'    """{c_name}"""', ""]
        lines += [f"    {n.removeprefix(prefix)} = {v}" for n, v in classes[c_name]] + [""]
    for first, (name, prefix) in ANONYMOUS.items():
        if first in classes:
            names.append(name)
            lines += ["", f"class {name}(IntEnum):", f'    """{prefix}*"""', ""]
            lines += [f"    {n.removeprefix(prefix)} = {v}" for n, v in classes[first]] + [""]
    for name, (base, members, prefix) in DEFINES.items():
        names.append(name)
        lines += ["", f"class {name}({base}):", f'    """{prefix}*"""', ""]
        lines += [f"    {n.removeprefix(prefix)} = {defines[n]}" for n in members] + [""]
    lines += ["", "__all__ = [" + ", ".join(f'"{n}"' for n in names) + "]"]
    return "\n".join(lines) + "\n"


def main():
    check = sys.argv[1] == "--check"
    include, output = sys.argv[-2:]
    text = produce(include)
    if check:
        with open(output, encoding="utf-8") as f:
            same = f.read() == text
        print("ok python_constants" if same else "FAIL python_constants: libvm/constants.py is not what constants.py writes")
        return 0 if same else 1
    with open(output, "w", encoding="utf-8") as f:
        f.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
