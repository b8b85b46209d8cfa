"""The PyTorch twin as a rival: what PyTorch's own guides advise, so that a win is one.

Fused scaled-dot-product attention, fused AdamW, gradients set to None, autocast to bfloat16 where our computation is in
it, TF32 on, pinned copies that do not block, `torch.compile` as a side of its own. Captions are padded to the context,
as the reference trains.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import inputs, processes
from flair_jax.data.transforms.images import MEAN, STD


def _start(config: Mapping[str, Any]):
    """The twin on the machine's device, and the autocast to run it under."""
    import torch

    from flair_jax.convert.torch_flair import TorchFLAIR

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    twin = TorchFLAIR(config["model"]).to(device)
    if config["model"]["dtype"] == "bfloat16":
        autocast = torch.autocast(device.type, torch.bfloat16)
    else:
        autocast = contextlib.nullcontext()
    return twin, device, autocast


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory_mb(device) -> float:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return processes.peak_mib()


def _images(images: np.ndarray, device):
    """uint8 (B, H, W, 3) on the host -> normalised (B, 3, H, W) on the device, which does the arithmetic."""
    import torch

    pixels = torch.from_numpy(images)
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    mean, std = (torch.from_numpy(x).to(device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std


@contextlib.contextmanager
def training(config: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], compiled: bool) -> Iterator[Callable]:
    """Turns of training steps on host batches of our stream, their captions padded."""
    import torch

    twin, device, autocast = _start(config)
    settings, mps = config["optimizer"], config["objectives"]["sigmoid"]["weight"] > 0
    decayed = [p for p in twin.parameters() if p.ndim >= 2]
    others = [p for p in twin.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=settings["weight_decay"]), dict(params=others, weight_decay=0.0)],
        lr=settings["learning_rate"] / settings["warmup_steps"],
        betas=(settings["b1"], settings["b2"]),
        eps=settings["eps"],
        fused=True,
    )
    loss_of = torch.compile(twin.loss) if compiled else twin.loss
    context = config["model"]["text"]["context_length"]
    padded = [(batch["images"], inputs.unpacked(batch["texts"], context)) for batch in batches]
    rng, done = np.random.default_rng(0), 0

    def step() -> None:
        nonlocal done
        pixels, tokens = padded[done % len(padded)]
        done += 1
        size = len(pixels)
        tokens = torch.from_numpy(tokens.astype(np.int64)).view(size, -1, context).to(device, non_blocking=True)
        rows = torch.from_numpy(_rows(rng, size, tokens.shape[1])).to(device, non_blocking=True)
        with autocast:
            loss = loss_of(_images(pixels, device), tokens, rows, mps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            twin.logit_scale.clamp_(0.0, np.log(100))

    def turn(count: int) -> Mapping[str, float]:
        began = time.perf_counter()
        for _ in range(count):
            step()
        _wait(device)
        seconds = time.perf_counter() - began
        return {"seconds": seconds / count, "memory_mb": _memory_mb(device)}

    yield turn


def _rows(rng: np.random.Generator, images: int, captions: int) -> np.ndarray:
    """Each image's own captions and one of each other image, (B, K + B - 1)."""
    rows = []
    for own in range(images):
        draws = np.arange(images) * captions + rng.integers(captions, size=images)
        rows.append(np.concatenate([draws[:own], own * captions + np.arange(captions), draws[own + 1 :]]))
    return np.stack(rows)


@contextlib.contextmanager
def encoding(
    config: Mapping[str, Any],
    kind: str,
    images: np.ndarray,
    tokens: np.ndarray,
    image_batch: int,
    text_batch: int,
    compiled: bool,
) -> Iterator[Callable]:
    """Turns of encoding images (B, H, W, 3) or texts (N, T) in batches, or of scoring their features, see `encode`."""
    import torch

    from flair_jax.convert.torch_flair import unit

    twin, device, autocast = _start(config)
    twin.eval()

    def wrap(function: Callable) -> Callable:
        return torch.compile(function) if compiled else function

    encode_image, encode_text = wrap(twin.encode_image), wrap(twin.encode_text_pooled)

    def batches(x: np.ndarray, size: int) -> list[np.ndarray]:
        return np.split(x, range(size, len(x), size))

    def encode_images():
        return [encode_image(_images(batch, device)) for batch in batches(images, image_batch)]

    def encode_texts():
        ids = batches(tokens.astype(np.int64), text_batch)
        return torch.cat([encode_text(torch.from_numpy(batch).to(device)) for batch in ids])

    @wrap
    def score(local, text):
        return twin.logit_scale.exp() * (unit(twin.pool(text, local)) * unit(text)).sum(-1)

    @wrap
    def pool(local, text):
        return unit(twin.pool(text, local))

    def score_as_original(local, text):
        on_host = unit(text).float().cpu()
        rows = [(pool(image[None], text)[0].float().cpu() * on_host).sum(-1) for image in local]
        return twin.logit_scale.exp().cpu() * torch.stack(rows)

    def turn(count: int) -> Mapping[str, float]:
        began = time.perf_counter()
        for _ in range(count):
            run()
        return {"seconds": (time.perf_counter() - began) / count, "memory_mb": _memory_mb(device)}

    with torch.inference_mode(), autocast:
        if kind in ("pairs", "original"):
            local, text = torch.cat([local for _, local in encode_images()]), encode_texts()
            way = score if kind == "pairs" else score_as_original
            run = lambda: way(local, text).float().cpu()  # noqa: E731
        elif kind == "images":
            run = lambda: [[part.float().cpu() for part in features] for features in encode_images()]  # noqa: E731
        else:
            run = lambda: encode_texts().float().cpu()  # noqa: E731
        yield turn
