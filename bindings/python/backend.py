"""Builds the package from its sources for pip and other front ends (PEP 517), with nothing but Python and a C compiler.

There is no setuptools, so that `pip install ./bindings/python` downloads nothing. pyproject.toml has the name, the version and the entry
points; pkg-config says where libvm is. Environment: CC, CFLAGS, LDFLAGS, PKG_CONFIG.
"""

from __future__ import annotations

import base64
import glob
import hashlib
import io
import os
import shlex
import subprocess
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from typing import Any

TAG = "cp311-abi3-linux_x86_64"
Config = dict[str, Any] | None


def _project() -> dict[str, Any]:
    with open("pyproject.toml", "rb") as f:
        project: dict[str, Any] = tomllib.load(f)["project"]
    return project


def _stem() -> str:
    return "{name}-{version}".format_map(_project())


def _metadata() -> str:
    project = _project()
    fields = [("Metadata-Version", "2.1"), ("Name", project["name"]), ("Version", project["version"]), ("Summary", project["description"]),
              ("License", project["license"]["text"]), ("Requires-Python", project["requires-python"]),
              *(("Classifier", line) for line in project["classifiers"]), ("Description-Content-Type", "text/markdown")]
    with open(project["readme"], encoding="utf-8") as f:
        return "".join(f"{name}: {value}\n" for name, value in fields) + "\n" + f.read()


def _entry_points() -> str:
    groups = _project()["entry-points"]
    return "".join(f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in names.items()) for group, names in groups.items())


def _info() -> dict[str, str]:
    """What the directory *.dist-info has, besides the record."""
    return {"METADATA": _metadata(), "WHEEL": f"Wheel-Version: 1.0\nGenerator: libvm\nRoot-Is-Purelib: false\nTag: {TAG}\n",
            "entry_points.txt": _entry_points()}


def _tool(variable: str, default: str) -> list[str]:
    return shlex.split(os.environ.get(variable, default))


def _pkg_config(option: str) -> list[str]:
    command = [*_tool("PKG_CONFIG", "pkg-config"), option, "libvm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise SystemExit(f"libvm is not installed, or PKG_CONFIG_PATH does not lead to libvm.pc:\n{done.stderr}")
    return shlex.split(done.stdout)


def _compile(output: str) -> None:
    """The extension module, for every Python from 3.11 on."""
    include = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(include, "Python.h")):
        raise SystemExit(f"Python's headers are not in {include}: install python3-dev")
    libs = _pkg_config("--libs")
    # A library outside of the system's directories is found again.
    rpaths = [f"-Wl,-rpath,{flag[2:]}" for flag in libs if flag.startswith("-L")]
    command = [*_tool("CC", "cc"), "-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-fno-strict-aliasing",
               *_tool("CFLAGS", ""), "-DPy_LIMITED_API=0x030b0000", f"-I{include}", *_pkg_config("--cflags"), "-o", output,
               *sorted(glob.glob("src/*.c")), *_tool("LDFLAGS", ""), *libs, *rpaths]
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        raise SystemExit("the extension module was not built")


class _Wheel:
    """A wheel being written, with the list of what it holds."""

    def __init__(self, directory: str) -> None:
        self.name = f"{_stem()}-{TAG}.whl"
        self.info = f"{_stem()}.dist-info"
        self.record: list[str] = []
        self.zip = zipfile.ZipFile(os.path.join(directory, self.name), "w", zipfile.ZIP_DEFLATED)

    def add(self, name: str, data: bytes | str) -> None:
        data = data.encode() if isinstance(data, str) else data
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        self.record.append(f"{name},sha256={digest},{len(data)}\n")
        entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
        entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
        self.zip.writestr(entry, data, zipfile.ZIP_DEFLATED)

    def finish(self) -> str:
        for name, text in _info().items():
            self.add(f"{self.info}/{name}", text)
        record = f"{self.info}/RECORD"
        self.zip.writestr(record, "".join(self.record) + f"{record},,\n")
        self.zip.close()
        return self.name


def _read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


# ---- what front ends call ----


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Config = None) -> str:
    directory = f"{_stem()}.dist-info"
    os.mkdir(os.path.join(metadata_directory, directory))
    for name, text in _info().items():
        with open(os.path.join(metadata_directory, directory, name), "w", encoding="utf-8") as f:
            f.write(text)
    return directory


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel

def build_wheel(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    wheel = _Wheel(wheel_directory)
    with tempfile.TemporaryDirectory() as scratch:
        output = os.path.join(scratch, "module.so")
        _compile(output)
        wheel.add("libvm/_libvm.abi3.so", _read(output))
    for path in sorted(glob.glob("libvm/*.py") + glob.glob("libvm/*.pyi") + ["libvm/py.typed"]):
        wheel.add(path, _read(path))
    return wheel.finish()


def build_editable(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    """`pip install -e`: the module is built beside the package, which is used where it is."""
    _compile("libvm/_libvm.abi3.so")
    wheel = _Wheel(wheel_directory)
    wheel.add("libvm-editable.pth", os.getcwd() + "\n")
    return wheel.finish()


def build_sdist(sdist_directory: str, config_settings: Config = None) -> str:
    name = f"{_stem()}.tar.gz"
    files = ["pyproject.toml", "README.md", "backend.py", *glob.glob("src/*.[ch]"), *glob.glob("libvm/*.py"), *glob.glob("libvm/*.pyi"), "libvm/py.typed"]
    with tarfile.open(os.path.join(sdist_directory, name), "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(files):
            tar.add(path, f"{_stem()}/{path}")
        about = tarfile.TarInfo(f"{_stem()}/PKG-INFO")
        text = _metadata().encode()
        about.size = len(text)
        tar.addfile(about, io.BytesIO(text))
    return name
