"""Builds the extension module against the libvm that pkg-config knows."""

import glob
import os
import shlex
import subprocess

from setuptools import Extension, setup


def pkg_config(option: str) -> list[str]:
    command = [os.environ.get("PKG_CONFIG", "pkg-config"), option, "libvm"]
    try:
        return shlex.split(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"libvm is not installed, or PKG_CONFIG_PATH does not lead to libvm.pc: {error}") from error


libdirs = [flag[2:] for flag in pkg_config("--libs") if flag.startswith("-L")]
setup(
    ext_modules=[
        Extension(
            "libvm._libvm",
            sorted(glob.glob("src/*.c")),
            depends=["src/pv.h"],
            py_limited_api=True,
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=["-std=gnu11", "-fvisibility=hidden", "-fno-strict-aliasing", *pkg_config("--cflags")],
            # A library outside of the system's directories is found again.
            extra_link_args=[*pkg_config("--libs"), *(f"-Wl,-rpath,{directory}" for directory in libdirs)],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
