"""What a wheel holds: the packages hyperdflash and tiny_target, and conf/ and assets/ inside hyperdflash.

Packages are mapped one by one, so that an editable install never puts src/ on the path, where src/evaluate.py would hide
another library of that name.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = {"hyperdflash": "src/hyperdflash", "hyperdflash.conf": "conf", "hyperdflash.assets": "assets"}

setup(
    packages=[
        *find_namespace_packages("src", include=["hyperdflash*"]),
        *find_namespace_packages(include=["tiny_target*"]),
        "hyperdflash.conf",
        "hyperdflash.assets",
    ],
    package_dir=FOLDERS,
)
