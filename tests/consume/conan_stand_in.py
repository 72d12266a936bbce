"""Runs a conanfile.py where there is no conan: stand-ins for the modules it imports, doing their main work.

conan_stand_in.py RECIPE PREFIX: exports the sources, builds, packages into PREFIX and prints the version.
"""
import fnmatch
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types

recipe_path, prefix = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])


class ConanFile:
    pass


class Anything:
    def __init__(self):
        self.variables = {}

    def __getattr__(self, name):
        return lambda *arguments, **named: None


class CMakeToolchain:
    def __init__(self, recipe):
        self.recipe, self.variables = recipe, {}

    def generate(self):
        self.recipe.variables = self.variables


class CMake:
    def __init__(self, recipe):
        self.recipe = recipe

    def configure(self):
        options = [f"-D{name}={'ON' if value else 'OFF'}" for name, value in self.recipe.variables.items()]
        run(["cmake", "-S", self.recipe.source_folder, "-B", self.recipe.build_folder, *options])

    def install(self):
        run(["cmake", "--install", self.recipe.build_folder, "--prefix", self.recipe.package_folder])


def run(command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def copy(recipe, pattern, src, dst):
    copied = 0
    for folder, _, files in os.walk(src):
        for name in files:
            relative = os.path.relpath(os.path.join(folder, name), src)
            if fnmatch.fnmatch(relative, pattern):
                target = os.path.join(dst, relative)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copy(os.path.join(src, relative), target)
                copied += 1
    if copied == 0:
        sys.exit(f"nothing in {src} matches {pattern}")


def load(recipe, path):
    with open(path, encoding="utf-8") as file:
        return file.read()


for name, members in (("conan", {"ConanFile": ConanFile}), ("conan.tools", {}),
                      ("conan.tools.cmake", {"CMake": CMake, "CMakeToolchain": CMakeToolchain}),
                      ("conan.tools.files", {"copy": copy, "load": load})):
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module

spec = importlib.util.spec_from_file_location("conanfile", recipe_path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with tempfile.TemporaryDirectory() as folder:
    recipe = module.FastvConan()
    recipe.recipe_folder = os.path.dirname(recipe_path)
    recipe.export_sources_folder = recipe.source_folder = os.path.join(folder, "sources")
    recipe.build_folder, recipe.package_folder = os.path.join(folder, "build"), prefix
    recipe.info, recipe.cpp_info = Anything(), Anything()
    recipe.set_version()
    recipe.export_sources()
    recipe.generate()
    recipe.build()
    recipe.package()
    recipe.package_id()
    recipe.package_info()
    print(recipe.version)
