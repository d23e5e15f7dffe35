#!/usr/bin/env python3
"""parity.py - which function of the C interface is what in Python and in Lua.

The functions are read from include/libvm/*.h. python.map and lua.map say what each is called in the binding, one a line:

    vm_map_ram            Machine.map_ram
    vm_errmsg             str(Error)                  # any text; the last identifier in it is the name that is looked for
    vm_closure_new        - why there is none         # a gap that is meant: '-' and the reason

A name counts if the binding's sources mention the C function, its interface file (Python: a .pyi or .py of the package, Lua:
libvm.lua of LuaLS annotations, else the C sources) has the name, and a test mentions it.

    parity.py            checks: prints ok/FAIL lines as every test of `make check` does
    parity.py --write    writes docs/api-parity.md
    parity.py --list     the functions, one a line
"""
import os
import re
import sys

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HERE = os.path.dirname(os.path.abspath(__file__))
TABLE = os.path.join(TOP, "docs", "api-parity.md")
LANGUAGES = {
    "python": {"sources": ["bindings/python/src"], "names": ["bindings/python/libvm"], "tests": ["bindings/python/tests"]},
    "lua": {"sources": ["bindings/lua"], "names": ["bindings/lua"], "tests": ["bindings/lua/spec"]},
}


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def functions():
    """[(header, name)] in the order of the headers."""
    found = []
    directory = os.path.join(TOP, "include", "libvm")
    for header in sorted(os.listdir(directory)):
        if header.endswith(".h"):
            text = re.sub(r"/\*.*?\*/", "", read(os.path.join(directory, header)), flags=re.S)
            for declaration in re.finditer(r"VM_API\s([^;{]*?)\b(vm_\w+)\s*\(", text):
                found.append((header, declaration.group(2)))
            for inline in re.finditer(r"static inline [^;{(]*?\b(vm_\w+)\s*\(", text):
                found.append((header, inline.group(1)))
    return found


def mapping(language):
    result = {}
    path = os.path.join(HERE, language + ".map")
    if not os.path.exists(path):
        return result
    for line in read(path).splitlines():
        line = line.split("#")[0].strip()
        if line:
            function, _, name = line.partition(" ")
            result[function] = name.strip()
    return result


def text_of(directories, endings, leave_out=()):
    parts = []
    for directory in directories:
        for root, _, files in os.walk(os.path.join(TOP, directory)):
            if any(part in root for part in leave_out):
                continue
            parts += [read(os.path.join(root, f)) for f in sorted(files) if f.endswith(endings)]
    return "\n".join(parts)


def check(language, known):
    """The gaps of a language, as text."""
    names = mapping(language)
    where = LANGUAGES[language]
    skip = ("tests", "spec")
    sources = text_of(where["sources"], (".c", ".h"), skip)
    interface = text_of(where["names"], (".py", ".pyi", ".lua") if language == "python" else (".c", ".lua"), skip)
    tests = text_of(where["tests"], (".py", ".lua"))
    gaps = []
    for _, function in known:
        name = names.get(function)
        if not name:
            gaps.append(f"{function} is not in bindings/parity/{language}.map")
            continue
        if name.startswith("-"):
            if not name[1:].strip():
                gaps.append(f"{function}: '-' without a reason")
            continue
        if not re.search(rf"\b{function}\b", sources):
            gaps.append(f"{function}: the binding's sources do not use it")
        word = re.findall(r"\w+", name)[-1]
        if not re.search(rf"\b{re.escape(word)}\b", interface):
            gaps.append(f"{function}: no {word} in the binding's interface")
        if not re.search(rf"\b{re.escape(word)}\b", tests):
            gaps.append(f"{function}: no test mentions {word}")
    gaps += [f"{function} of {language}.map is in no header" for function in names if function not in {f for _, f in known}]
    return gaps


def table(known):
    python, lua = mapping("python"), mapping("lua")
    lines = ["# The C interface in Python and Lua", "",
             "Written by `bindings/parity/parity.py --write` from the headers, `python.map` and `lua.map`; `make check` fails when a",
             "function has no counterpart, or a counterpart no test.", ""]
    last = None
    for header, function in known:
        if header != last:
            lines += ["", f"## {header}", "", "| C | Python | Lua |", "|---|---|---|"]
            last = header
        cells = [f"`{name}`" if name and not name.startswith("-") else (name or "**missing**").lstrip("- ") for name in
                 (python.get(function), lua.get(function))]
        lines.append(f"| `{function}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main():
    known = functions()
    if sys.argv[1:] == ["--list"]:
        print("\n".join(function for _, function in known))
        return 0
    if sys.argv[1:] == ["--write"]:
        with open(TABLE, "w", encoding="utf-8") as f:
            f.write(table(known))
        return 0
    failed = False
    for language in LANGUAGES:
        gaps = check(language, known)
        failed = failed or bool(gaps)
        print(f"FAIL parity_{language}: {'; '.join(gaps)}" if gaps else f"ok parity_{language}")
    fresh = os.path.exists(TABLE) and read(TABLE) == table(known)
    print("ok parity_table" if fresh else "FAIL parity_table: docs/api-parity.md is not what bindings/parity/parity.py --write writes")
    return 0 if fresh and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
