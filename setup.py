"""A thin driver of CMake: everything about the build is in CMakeLists.txt, everything about the package in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One folder per interpreter, not a temporary one: a second build compiles what changed.
        build = Path(__file__).resolve().parent / "build" / str(sys.implementation.cache_tag)
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target),
            "Python_EXECUTABLE": sys.executable,
            "PYFOLD_CUDA": os.environ.get("PYFOLD_CUDA", "AUTO"),
        }
        options = [f"-D{name}={value}" for name, value in definitions.items()]
        subprocess.run(["cmake", "-S", str(Path(__file__).resolve().parent), "-B", str(build), *options], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)


setup(ext_modules=[Extension("pyfold._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
