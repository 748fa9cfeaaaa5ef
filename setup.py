"""Packaging: names, version and requirements in one place; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# configs/ is a top-level folder of plain get_config() files in the checkout and travels inside the wheel as
# scoresde/configs. It is found by name and loaded by path (scoresde.config), never imported.
configs = ["scoresde.configs"] + [f"scoresde.configs.{p}" for p in find_packages("configs")]
own = [p for name in ("scoresde", "sde_lib", "solvers") for p in (name, f"{name}.*")]

data = ["scikit-learn>=1.3"]
train = ["accelerate>=1.0", "tensorboard>=2.14", *data]
plot = ["matplotlib>=3.8"]
hub = ["huggingface_hub>=0.25"]

setup(
    name="scoresde",
    version="0.1.0",
    description="Score-based generative models in continuous time: SDEs, solvers, score networks, likelihoods.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=own) + configs,
    package_dir={"scoresde.configs": "configs"},
    package_data={"scoresde": ["py.typed", "scoresde.mplstyle"], "sde_lib": ["py.typed"], "solvers": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "torchsde>=0.2.6",
        "torchdiffeq>=0.2.4",
        "scipy>=1.11",
        "numpy>=1.26",
        "ml-collections>=1.1",
        "absl-py",
        "tqdm",
        "pillow",
        "safetensors>=0.4",
    ],
    extras_require={
        "train": train,
        "plot": plot,
        "hub": hub,
        "all": [*train, *plot, *hub],
        "dev": [
            *train,
            *plot,
            *hub,
            "diffusers>=0.30",  # the oracle of its own format
            "import-linter",
            "ipykernel",
            "jupytext",
            "mpmath",
            "mypy",
            "nbclient",
            "pytest>=8",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": ["scoresde=scoresde.cli:main"]},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
