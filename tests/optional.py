"""Libraries that are not installed everywhere: PyTorch, for one, has no CPU build for every Python.

A test that touches one which is absent is skipped, and the summary counts it with the reason.
"""

import pytest


class Optional:
    """A module that is imported at its first use.

    Args:
      name: of the module.
      package: what is to be installed to have it.
    """

    def __init__(self, name: str, package: str):
        self._name, self._package = name, package

    def __getattr__(self, attribute: str):
        module = pytest.importorskip(self._name, reason=f"{self._package} is not installed")
        return getattr(module, attribute)


torch = Optional("torch", "PyTorch")
torch_flair = Optional("flair_jax.convert.torch_flair", "PyTorch")
safetensors_torch = Optional("safetensors.torch", "PyTorch")
torchmetrics_retrieval = Optional("torchmetrics.functional.retrieval", "torchmetrics")
clip_benchmark_retrieval = Optional("clip_benchmark.metrics.zeroshot_retrieval", "clip-benchmark")
gradio = Optional("gradio", "gradio")
demo_page = Optional("flair_jax.demo.page", "gradio")
playwright = Optional("playwright.sync_api", "playwright")
torchmetrics = Optional("torchmetrics", "torchmetrics")
faiss = Optional("faiss", "faiss-cpu")
onnx = Optional("onnx", "onnx")
onnxruntime = Optional("onnxruntime", "onnxruntime")
