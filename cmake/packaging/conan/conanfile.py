"""fastv for Conan 2, from the checkout it lies in: conan create cmake/packaging/conan"""
import os
import re

from conan import ConanFile
from conan.tools.cmake import CMake, CMakeToolchain
from conan.tools.files import copy, load


class FastvConan(ConanFile):
    name = "fastv"
    description = "FastV visual token pruning for C++ inference engines"
    license = "MIT"
    package_type = "header-library"
    settings = "os", "compiler", "build_type", "arch"
    no_copy_source = True

    def _checkout(self):
        return os.path.join(self.recipe_folder, "..", "..", "..")

    def set_version(self):
        # include/fastv/version.hpp is the one place that states the version.
        header = load(self, os.path.join(self._checkout(), "include", "fastv", "version.hpp"))
        parts = (re.search(rf"FASTV_VERSION_{part} (\d+)", header).group(1) for part in ("MAJOR", "MINOR", "PATCH"))
        self.version = ".".join(parts)

    def export_sources(self):
        for pattern in ("include/*", "cmake/*", "CMakeLists.txt", "LICENSE"):
            copy(self, pattern, src=self._checkout(), dst=self.export_sources_folder)

    def generate(self):
        toolchain = CMakeToolchain(self)
        for part in ("TESTS", "EXAMPLES", "BENCHMARKS"):
            toolchain.variables[f"FASTV_BUILD_{part}"] = False
        toolchain.variables["FASTV_INSTALL"] = True
        toolchain.generate()

    def build(self):
        CMake(self).configure()

    def package(self):
        CMake(self).install()
        copy(self, "LICENSE", src=self.source_folder, dst=os.path.join(self.package_folder, "licenses"))

    def package_id(self):
        self.info.clear()

    def package_info(self):
        # The package's own fastv-config.cmake, which knows the components.
        self.cpp_info.set_property("cmake_find_mode", "none")
        self.cpp_info.builddirs = [os.path.join("share", "cmake", "fastv")]
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
