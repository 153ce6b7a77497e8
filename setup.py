"""The packages of the wheel: those of opensora_sp, and configs/ as opensora_sp.configs.

pyproject.toml holds everything else. It cannot say this: where it looks for packages it cannot name
one that lies elsewhere, and a list of all packages would forget the next one.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["opensora_sp", "opensora_sp.*"]), "opensora_sp.configs"],
    package_dir={"opensora_sp.configs": "configs"},
)
