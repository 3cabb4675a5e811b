"""The packages of the wheel: pyproject.toml cannot give a package another name.

A clone has `experiments/` and `conf/`, and the wheel has both as `lora_init_experiments`.
"""

from setuptools import find_namespace_packages, find_packages, setup

NAME = "lora_init_experiments"
# The GPU's checks need the tests of a clone.
APPLICATIONS = find_packages("experiments", exclude=["gpu"])
CONFIGURATIONS = ["conf", *(f"conf.{folder}" for folder in find_namespace_packages("conf"))]

setup(
    packages=[
        *find_packages(include=["lora_init", "lora_init.*"]),
        "hydra_plugins",
        NAME,
        *(f"{NAME}.{package}" for package in APPLICATIONS + CONFIGURATIONS),
    ],
    package_dir={NAME: "experiments", f"{NAME}.conf": "conf"},
    package_data={"": ["*.yaml", "*.j2", "*.js", "*.css", "py.typed"]},
)
