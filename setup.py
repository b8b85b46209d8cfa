"""Installation: `pip install -e .` runs FLAIR; extras add conversion, data preparation, accelerators and tests."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
# The rooms stay folders of the repository; installed, all of them live under one name that no user's module shadows.
FOLDERS = {
    "flair_jax": "flair_jax",
    "flair_jax.configs": "configs",
    "flair_jax.convert": "convert",
    "flair_jax.data": "data",
}

# Each lower bound is the oldest release that the test suite was run with, on Python 3.11 with jax 0.10.2 (the last for
# it) or on Python 3.13 with jax 0.12.
REQUIRES = [
    "absl-py>=2.5",
    "array_record>=0.8.6",
    "braceexpand>=0.1.7",
    "clu>=0.0.12",
    'cykooz-resizer>=4.0.1; sys_platform != "linux" or platform_machine == "x86_64"',  # has no other wheels
    "etils[epath]>=1.15",
    "flax>=0.12.8",
    "fsspec>=2026.9",
    "ftfy>=6.3.1",
    "grain>=0.2.18",
    "huggingface_hub>=2.4",
    "jax>=0.10.2",
    "matplotlib>=3.11",
    "ml_dtypes>=0.6",
    "ml_collections>=1.1",
    "numpy>=2.4",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=12.3",
    "protobuf>=6.33",
    "safetensors>=0.8",
    "scipy>=1.17",
    "sentencex>=1.0.32",
    "simplejpeg>=1.9",
    "tensorboardX>=2.6.5",  # writes TensorBoard's files without TensorFlow; to look at them: pip install tensorboard
    "tokenizers>=0.23",
    "tqdm>=4.70",
]
EXTRAS = {
    "torch": ["torch>=2.13"],  # to read and write PyTorch's own files; .safetensors need no PyTorch
    # Data sets of TensorFlow Datasets, which uses importlib_resources without naming it, and writers of TFRecord.
    "tf": ["importlib_resources>=7.1", "tensorflow>=2.21", "tensorflow-datasets>=4.9.10"],
    # Shards and work directories in gs:// and s3:// (boto3: TensorBoard's files there), shards behind https://.
    "remote": ["aiohttp>=3.14", "boto3>=1.43", "gcsfs>=2026.9", "s3fs>=2026.9"],
    "parquet": ["pyarrow>=25.0"],  # python -m flair_jax.embed --format parquet
    "prepare": ["apache-beam>=2.77", "pyarrow>=25.0"],
    # Parses of captions for hard negatives; they need a model of spaCy and WordNet too, see data/README.md.
    "negatives": ["nltk>=3.8.1", "pyinflect>=0.5.1", "spacy>=3.8.18"],
    # Boxes for descriptions by OWLv2.
    "regions": ["torch>=2.13", "transformers>=5.23"],
    "cuda": ["jax[cuda12]>=0.10.2"],
    "demo": ["gradio>=6.31"],  # python -m flair_jax.demo
    "demo-test": ["gradio>=6.31", "playwright>=1.65"],  # its tests in a browser, with the system's chromium
    # python -m flair_jax.export --onnx, and onnxruntime to run what it writes.
    "onnx": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7.2", "torch>=2.13", "transformers>=5.23"],
    "search": ["faiss-cpu>=1.15.1"],  # python -m flair_jax.search
    "tpu": ["jax[tpu]>=0.10.2"],
    # The reference's kind of loader, to measure beside: the newest webdataset with its way of reading.
    "bench": ["psutil>=7.2", "regex>=2026.9", "torch>=2.13", "webdataset==0.2.86"],
    # Beside PyTorch: metrics that tests compare with, and what runs exported models.
    "torch-test": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7.2", "torchmetrics>=1.9"],
    "docs": ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],  # `make docs`
    "notebook": ["nbformat>=5.11", "nbclient>=0.11", "ipykernel>=7.4"],
}
# Without PyTorch, which the Makefile installs where there is a CPU build: tests that need it are skipped elsewhere.
EXTRAS["test"] = [
    "aiohttp>=3.14",
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "scikit-learn>=1.9",  # metrics to compare with; torchmetrics and clip-benchmark need PyTorch, and are optional
    "setuptools>=77",  # a test builds the wheel without network
    "tensorboard>=2.21",
    "transformers>=5.23",
    *(requirement for requirement in EXTRAS["bench"] if requirement not in EXTRAS["torch"]),
    *EXTRAS["demo-test"],
    *EXTRAS["docs"],
    *EXTRAS["notebook"],
    *EXTRAS["prepare"],
    *EXTRAS["search"],
    *EXTRAS["tf"],
]

setup(
    name="flair_jax",
    version="0.1.0",
    description="FLAIR: fine-grained image-text models in JAX and Flax, equal to the original",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*FOLDERS, *(f"{name}.{part}" for name, folder in FOLDERS.items() for part in find_packages(folder))],
    package_dir=FOLDERS,
    package_data={
        "flair_jax.data.benchmarks.prompts": ["*.json", "*.txt"],
        "flair_jax.data.prepare": ["*.json"],
        "flair_jax.data.transforms": ["*.txt.gz"],
        "flair_jax.convert": ["*.ipynb"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
