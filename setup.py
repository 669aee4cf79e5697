"""Puts into the wheel what `dense-rlhf new` lays out, and the lock of AlpacaEval's own environment."""

from pathlib import Path
from shutil import copyfile, copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithStudies(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # a checkout has them beside the package
            return
        shipped = Path(self.build_lib, "dense_rlhf", "shipped")
        for name in ("notebooks", "params"):
            copytree(name, shipped / name, ignore=ignore_patterns(".*"), dirs_exist_ok=True)
        (shipped / "locks").mkdir(exist_ok=True)
        copyfile("locks/alpaca_eval.txt", shipped / "locks" / "alpaca_eval.txt")


setup(cmdclass={"build_py": BuildWithStudies})
