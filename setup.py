"""The packages of the wheel: pyproject.toml cannot give a package another name.

A clone has `experiments/` and `conf/`, and the wheel has both as `lora_init_experiments`.
"""

from setuptools import find_packages, setup

NAME = "lora_init_experiments"
# The GPU's checks need the tests of a clone.
applications = find_packages("experiments", exclude=["gpu"])

setup(
    packages=[
        *find_packages(include=["lora_init", "lora_init.*"]),
        NAME,
        *(f"{NAME}.{package}" for package in applications),
        f"{NAME}.conf",
        "hydra_plugins",
    ],
    package_dir={NAME: "experiments", f"{NAME}.conf": "conf"},
    package_data={
        "lora_init": ["py.typed"],
        NAME: ["**/*.j2", "**/*.js", "**/*.css"],
        f"{NAME}.conf": ["**/*.yaml"],
    },
)
