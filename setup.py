"""Installation: `pip install -e .` runs FLAIR; extras add conversion, TensorFlow datasets, accelerators and tests."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

# Each lower bound is the oldest release that the test suite was run with.
REQUIRES = [
    "absl-py>=2.1",
    "clu>=0.0.12",
    "etils[epath]>=1.9",
    "flax>=0.12",
    "ftfy>=6.3",
    "grain>=0.2.12",
    "jax>=0.10",
    "matplotlib>=3.8",
    "ml_collections>=1.0",
    "numpy>=1.26",
    "optax>=0.2.4",
    "orbax-checkpoint>=0.11",
    "pillow>=10.3",
    "safetensors>=0.4.3",
    "tensorboard>=2.17",  # clu.metric_writers needs it and does not name it
    "tensorflow>=2.17",  # clu.metric_writers writes TensorBoard files through it
    "tokenizers>=0.20",
    "tqdm>=4.66",
]
EXTRAS = {
    "torch": ["torch>=2.4"],
    "tf": ["tensorflow-datasets>=4.9"],
    "cuda": ["jax[cuda12]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "notebook": ["nbformat>=5.9", "nbclient>=0.10", "ipykernel>=6.29"],
}
EXTRAS["test"] = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "transformers>=4.50",
    *EXTRAS["torch"],
    *EXTRAS["notebook"],
]

setup(
    name="flair_jax",
    version="0.1.0",
    description="FLAIR: fine-grained image-text models in JAX and Flax, equal to the original and faster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["flair_jax*", "configs*", "data*", "convert*"]),
    package_data={"data": ["*.txt.gz"], "convert": ["*.ipynb"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
