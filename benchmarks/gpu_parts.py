"""The parts of `gpu_check`, each run in a process of its own: `python benchmarks/gpu_parts.py PART --results FILE`.

Nothing is imported here that a lent machine lacks: no grain, TensorFlow, clu, orbax, etils or ml_collections. So the
sizes of the models stand here as plain dicts, which a test compares with configs/variants.py.
"""

import argparse
import contextlib
import json
import math
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

if __name__ == "__main__":
    import checkout  # beside this file, which Python finds first when it runs a script by its path

    checkout.use()

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from benchmarks import inputs, kernels
from flair_jax import compilation, flops, models, optimizer, sharding, state, step
from flair_jax.convert import names
from flair_jax.data.transforms import packing
from flair_jax.evaluators import Retrieval, RetrievalSet
from flair_jax.evaluators.features import Encoder
from flair_jax.models import layers
from flair_jax.models.text import Text
from flair_jax.objectives import text_conditioned

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
GIB = 2**30
MARK = "RESULT "  # as in gpu_check
CAPTIONS, ROW_LENGTH = 8, 80  # K, and tokens in a row of packed captions
OPTIMIZER = dict(learning_rate=5e-4, warmup_steps=2000, weight_decay=0.5, b1=0.9, b2=0.98, eps=1e-8)
COMPUTE = dict(dtype="bfloat16", scan_blocks=False, remat="none", attention="xla", gelu="exact", micro_batches=1)
LESS_MEMORY = dict(remat="dots", chunk_size=64)  # of model and objectives, where a batch does not fit
HEADS = dict(
    pooling=dict(heads=8),
    decoder=None,
    init_logit_scale=math.log(1 / 0.07),
    init_logit_bias=-10.0,
    preprocess=dict(resize="crop", mean_std="openai"),
)

FLAIR = dict(
    name="flair",
    embed_dim=512,
    vision=dict(image_size=224, patch_size=16, width=768, depth=12, heads=12, patch_dropout=0.0),
    text=dict(context_length=77, vocab_size=49408, width=512, depth=12, heads=8),
    **HEADS,
)
TINY = dict(  # whose numbers the original computed: tests/golden/tiny*
    name="flair",
    embed_dim=64,
    vision=dict(image_size=64, patch_size=16, width=96, depth=3, heads=3),
    text=dict(context_length=77, vocab_size=512, width=64, depth=3, heads=4),
    **HEADS,
)
FULL_SIZES = dict(
    model=FLAIR,
    first_batch=256,
    batches=(512, 1024, 128),
    twin_batches=(128, 256, 512),
    steps=5,
    turns=3,
    attention_batch=64,
    encoding=dict(images=5000, texts=25014, image_batch=250, text_batch=1024),
    matching_images=2048,
)
TOY_SIZES = dict(
    model={
        **TINY,
        "vision": dict(image_size=32, patch_size=16, width=32, depth=1, heads=2),
        "text": dict(context_length=77, vocab_size=512, width=32, depth=1, heads=2),
    },
    first_batch=4,
    batches=(8,),
    twin_batches=(2, 4),
    steps=1,
    turns=1,
    attention_batch=2,
    encoding=dict(images=6, texts=20, image_batch=4, text_batch=8),
    matching_images=2,
)
Emit = Callable[[str, Mapping[str, Any]], None]


class Run:
    """What a part is given.

    Attributes:
      sizes: `FULL_SIZES` or `TOY_SIZES`.
      results: what the parts before found.
    """

    def __init__(self, sizes: Mapping[str, Any], results: Mapping[str, Any], seconds: float):
        self.sizes, self.results, self._end = sizes, results, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self._end - time.monotonic()

    def emit(self, case: str, figures: Mapping[str, Any]) -> None:
        """Hands figures over at once."""
        print(MARK + json.dumps([case, figures]), flush=True)

    @contextlib.contextmanager
    def guard(self, case: str):
        """Records a failure of one case; the next one runs."""
        try:
            yield
        except Exception as error:
            self.emit(case, {"error": describe(error)})


def describe(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ---------------------------------------------------------------------------------------------------------------------
# (a) The numbers of the original code


def golden(run: Run) -> None:
    """Forward pass, loss and gradients of the tiny model in float32, all bits of every product."""
    read = safetensors.numpy.load_file
    params = names.to_flax(read(GOLDEN / "tiny.safetensors"), config=TINY)
    with jax.default_matmul_precision("highest"):
        with run.guard("forward"):
            _golden_forward(run, models.create(TINY), params)
        cases = json.loads((GOLDEN / "tiny_loss.json").read_text())["cases"]
        for case in ("init_mps", "mid_mps", "mid_nomps"):
            with run.guard(f"loss {case}"):
                expected = read(GOLDEN / f"tiny_loss_grads_{case}.safetensors")
                _golden_loss(run, case, cases[case], params, expected)


def _golden_forward(run: Run, model, params) -> None:
    given, expected = np.load(GOLDEN / "tiny_inputs.npz"), np.load(GOLDEN / "tiny_outputs.npz")

    @jax.jit
    def forward(params, images, tokens):
        image = model.apply({"params": params}, images, method="encode_image")
        text = model.apply({"params": params}, Text.padded(tokens), method="encode_text")
        scores = model.apply({"params": params}, image, text, method="score") + params["logit_bias"]
        return dict(image_global=image.pooled, image_local=image.local, text_global=text.pooled, logits_flair=scores)

    found = jax.device_get(forward(params, np.moveaxis(given["images"], 1, -1), given["tokens"]))
    errors = {name: float(np.abs(value - expected[name]).max()) for name, value in found.items()}
    # Round-off of the original itself is 4e-6; scores are 16 times a cosine. A wrong epsilon moves scores by 1e-4.
    tolerance = {name: 1e-4 if name == "logits_flair" else 2e-5 for name in errors}
    passed = all(errors[name] <= tolerance[name] for name in errors)
    run.emit("forward", {"passed": passed, **errors, "tolerance": max(tolerance.values())})


def _golden_loss(run: Run, case: str, golden: Mapping[str, Any], params, expected) -> None:
    """Loss and gradients by the training step itself, whose optimizer keeps the gradients and changes nothing."""
    given = np.load(GOLDEN / "tiny_loss_inputs.npz")
    text = Text.padded(given["tokens"].reshape(-1, given["tokens"].shape[-1]))
    batch = {
        "images": np.moveaxis(given["images"], 1, -1),
        "texts": {"tokens": text.tokens, "ends": text.ends},
        "draws": text_conditioned.draws_of_rows(given["indices"], given["tokens"].shape[1]),
    }
    params = {**params, **{name: np.float32(value) for name, value in (golden["override"] or {}).items()}}

    def update(grads, opt_state, params):
        return jax.tree.map(jnp.zeros_like, grads), grads

    keep = optimizer.Optimizer(optax.GradientTransformation(lambda params: params, update))
    before = state.TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=keep.init(params))
    after, numbers = jax.jit(step_of(TINY, objectives(mps=golden["added_mps_loss"]), keep))(before, batch)
    grads = names.to_torch(jax.device_get(after.opt_state))
    loss_error = abs(float(numbers["loss"]) / golden["loss_fp64"] - 1)
    largest = max(float(np.abs(leaf).max()) for leaf in expected.values())
    # As tests/test_objectives.py: ten times the original's own round-off, or a millionth of the largest gradient.
    bounds = {
        name: max(10 * golden["grad_tolerance"][name]["fp32_vs_fp64_maxabs"], 5e-7 * largest, 1e-6) for name in expected
    }
    ratios = {name: float(np.abs(grads[name] - leaf).max()) / bounds[name] for name, leaf in expected.items()}
    worst = max(ratios, key=ratios.get)
    figures = {"loss_error": loss_error, "gradient_error_over_tolerance": ratios[worst], "of": worst}
    run.emit(f"loss {case}", {"passed": loss_error < 4e-6 and ratios[worst] <= 1, **figures})


# ---------------------------------------------------------------------------------------------------------------------
# (b) NVIDIA's attention beside the plain one


def attention(run: Run) -> None:
    """Attention by cuDNN in bfloat16 against the plain one in float32: value and gradient, at the model's shapes."""
    model, batch = run.sizes["model"], run.sizes["attention_batch"]
    vision, text = model["vision"], model["text"]
    patches, context = flops.patches(vision), text["context_length"]
    sizes = {  # heads, and channels per head
        "vision": (vision["heads"], vision["width"] // vision["heads"]),
        "text": (text["heads"], text["width"] // text["heads"]),
        "pooling": (model["pooling"]["heads"], model["embed_dim"] // model["pooling"]["heads"]),
    }
    cases = {  # queries, keys, sizes, causal, packed
        "image tokens, odd": (1 + patches, 1 + patches, *sizes["vision"], False, False),
        "padded captions, odd": (context, context, *sizes["text"], True, False),
        "packed captions": (ROW_LENGTH, ROW_LENGTH, *sizes["text"], True, True),
        "packed captions, odd": (context, context, *sizes["text"], True, True),
        "pooling, odd": (263, 1 + patches, *sizes["pooling"], False, False),
    }
    for case, arguments in cases.items():
        with run.guard(case):
            run.emit(case, _attention_case(batch, *arguments))


def _attention_case(batch, queries, keys, heads, width, causal, packed) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = (batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, width)
    exact = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16).astype(jnp.float32) for shape in shapes]
    weight = jnp.asarray(rng.standard_normal(shapes[0]), jnp.float32)
    mask = None
    if packed:
        segments = np.sort(rng.integers(1, 5, (batch, queries)), axis=1)
        mask = jnp.asarray(segments[:, None, :, None] == segments[:, None, None, :])

    def value_and_grad(kind, arrays):
        def value(arrays):
            out = layers.attend(*arrays, causal=causal, mask=mask, attention=kind)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        compute = jax.jit(lambda arrays: jax.value_and_grad(value, has_aux=True)(arrays))
        (_, out), grads = jax.block_until_ready(compute(arrays))
        times = []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(compute(arrays))
            times.append(time.perf_counter() - began)
        return [np.asarray(x, np.float32) for x in (out, *grads)], 1000 * statistics.median(times)

    with jax.default_matmul_precision("highest"):
        expected, _ = value_and_grad("xla", exact)
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    figures = {}
    for kind in ("xla", "cudnn"):
        try:
            found, figures[f"{kind}_ms"] = value_and_grad(kind, rounded)
        except Exception as error:  # what cuDNN does not take, or no such kernel on this machine
            figures["error"] = f"{kind}: {describe(error)}"
            continue
        errors = [float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(found, expected, strict=True)]
        figures[f"{kind}_value_error"], figures[f"{kind}_gradient_error"] = errors[0], max(errors[1:])
    if "cudnn_ms" in figures:  # bfloat16 has 8 bits; twice what the plain attention loses, and never more than 3 %
        pairs = [(figures[f"cudnn_{name}_error"], figures[f"xla_{name}_error"]) for name in ("value", "gradient")]
        figures["passed"] = all(ours <= min(0.03, 2 * theirs + 0.004) for ours, theirs in pairs)
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# (c) The training step


def objectives(mps: bool = True, chunk_size: int | None = None) -> dict[str, dict[str, Any]]:
    """FLAIR's `objectives` section; the whole batch is a block, as in the PyTorch twin."""
    weights = (0.5, 0.5) if mps else (1.0, 0.0)
    options = [{"weight": weight, "chunk_size": chunk_size} for weight in weights]
    return dict(zip(("text_conditioned", "sigmoid"), options, strict=True))


def step_of(model: Mapping[str, Any], losses: Mapping[str, Any], optimize: optimizer.Optimizer) -> Callable:
    """The training step as a function of state and batch."""
    slots = {"captions": {"count": CAPTIONS}, "negatives": {"kinds": None}, "regions": {"count": None}}
    config = {"objectives": losses, "seed": 0, "ema_decay": None, "data": slots}
    return step.step_of(config, models.create(model), optimize)


class Scoped(optimizer.Optimizer):
    """An optimizer whose instructions the profile can tell by their scope."""

    def update(self, *arguments):
        with jax.named_scope("optimizer"):
            return super().update(*arguments)


def batches_of(model: Mapping[str, Any], size: int, count: int = 2) -> list[dict[str, Any]]:
    image_size = models.create(model).image_size
    text = {name: model["text"][name] for name in ("context_length", "vocab_size")}
    return inputs.made_up(size, image_size, {"captions": CAPTIONS}, text, ROW_LENGTH, batches=count)


class Compiled:
    """The compiled step of a setting, on one device.

    Args:
      model: the `model` section.
      size: images in a batch.
      change: keys of `model`, and `chunk_size` of the objectives, that differ from `COMPUTE`.
    """

    def __init__(self, model: Mapping[str, Any], size: int, change: Mapping[str, Any]):
        change = dict(change)
        self.losses = objectives(chunk_size=change.pop("chunk_size", None))
        self.model, self.size = {**model, **COMPUTE, **change}, size
        self.mesh = sharding.create_mesh(devices=jax.devices()[:1])
        self.batches = batches_of(self.model, size)
        made = optimizer.create(total_steps=100_000, **OPTIMIZER)
        optimize = Scoped(made.tx, made.rules)
        with jax.set_mesh(self.mesh):
            self.state = state.create(models.create(self.model), optimize, self.mesh, 0)
            began = time.perf_counter()
            function = step_of(self.model, self.losses, optimize)
            self.step = compilation.compile_step(function, self.state, self.place(0))
            self.compile_seconds = time.perf_counter() - began

    def place(self, number: int) -> Any:
        """A batch on its way to the device, as the training loop sends it."""
        return sharding.global_batch(self.mesh, self.batches[number % len(self.batches)])

    def run(self, placed: Sequence[Any] | None = None, steps: int = 1) -> float:
        """Takes steps, waits for the last one and returns its loss."""
        with jax.set_mesh(self.mesh):
            for number in range(steps):
                batch = placed[number % len(placed)] if placed else self.place(number)
                self.state, numbers = self.step(self.state, batch)
            jax.block_until_ready((self.state, numbers))
        return float(numbers["loss"])

    def flop(self) -> float:
        """Operations of a step, as `flops.train_step` counts them."""
        lengths = (packing.text_lengths(batch["texts"]) for batch in self.batches)
        return statistics.mean(flops.train_step(self.model, self.losses, self.size, each) for each in lengths)


def train_case(run: Run, size: int, change: Mapping[str, Any]) -> dict[str, Any]:
    """Images per second of a setting.

    Raises:
      MemoryError: by the compiler's account it does not fit.
    """
    compiled = Compiled(run.sizes["model"], size, change)
    needed, limit = compilation.memory(compiled.step)["total"], compilation.memory_limit()
    if limit is not None and needed > limit:
        raise MemoryError(f"needs {needed / GIB:.1f} GiB of {limit / GIB:.1f}")
    figures = {"images": size, "change": dict(change), "compile_seconds": compiled.compile_seconds}
    figures |= {"loss": compiled.run(), "needed_gib": needed / GIB}
    compiled.run(steps=2)
    turns = []
    for _ in range(run.sizes["turns"]):
        began = time.perf_counter()
        compiled.run(steps=run.sizes["steps"])
        turns.append((time.perf_counter() - began) / run.sizes["steps"])
    seconds, work = statistics.median(turns), compiled.flop()
    figures |= {"step_seconds": seconds, "images_per_second": size / seconds, "tflop_per_step": work / 1e12}
    if peak := flops.peak(jax.devices()[0].device_kind):
        figures["mfu"] = work / seconds / peak
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of_device:  # of the process so far
        figures["memory_gib"] = statistics_of_device["peak_bytes_in_use"] / GIB
    return figures


def training(run: Run) -> None:
    """FLAIR B/16 in bfloat16, K = 8, packed captions: plain and cuDNN's attention, then batches of other sizes."""
    limit = compilation.memory_limit()
    run.emit("device", {"kind": jax.devices()[0].device_kind, "jax": jax.__version__, "limit": limit})
    done: list[dict[str, Any]] = []
    longest = 0.0

    def measure(size: int, **change) -> None:
        """One setting; with less memory where it does not fit, or will not by what smaller batches needed."""
        nonlocal longest
        plain = [case for case in done if "chunk_size" not in case["change"]]
        needs = max((case["needed_gib"] * size / case["images"] for case in plain), default=0.0)
        fits = limit is None or needs < limit / GIB
        for less in ({}, LESS_MEMORY) if fits else (LESS_MEMORY,):
            case = " ".join([str(size), *(f"{name}={value}" for name, value in {**change, **less}.items())])
            if run.left() < longest:
                run.emit(case, {"error": f"not started: {run.left():.0f} seconds are left"})
                return
            began = time.monotonic()
            try:
                figures = train_case(run, size, {**change, **less})
                done.append(figures)
            except Exception as error:
                figures = {"error": describe(error)}
            run.emit(case, figures)
            longest = max(longest, time.monotonic() - began)
            if "error" not in figures or not re.search("MemoryError|RESOURCE_EXHAUSTED", figures["error"]):
                return

    first, others = run.sizes["first_batch"], run.sizes["batches"]
    scan = {}
    for kind in ("cudnn", "xla"):
        measure(first, attention=kind, **scan)
        if done and not scan and run.left() < (1 + len(others)) * longest:  # unrolled blocks take too long to compile
            scan = dict(scan_blocks=True)
            measure(first, attention=kind, **scan)
    kind = fastest(done)["change"]["attention"] if done else "xla"
    for size in others:
        measure(size, attention=kind, **scan)


def fastest(cases: Iterable[Any]) -> Mapping[str, Any] | None:
    """The setting of the training step with the most images per second; None where none was measured."""
    measured = [case for case in cases if isinstance(case, Mapping) and "images_per_second" in case]
    return max(measured, key=lambda case: case["images_per_second"], default=None)


def twin(run: Run) -> None:
    """The PyTorch twin: eager at several sizes, then compiled at the best of them."""
    import torch

    from benchmarks import torch_twin

    model = {**run.sizes["model"], **COMPUTE}
    config = {"model": model, "optimizer": OPTIMIZER, "objectives": objectives()}
    run.emit("device", {"torch": torch.__version__})
    speeds = {}

    def measure(size: int, compiled: bool) -> None:
        case = f"{size} {'compiled' if compiled else 'eager'}"
        with run.guard(case):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            with torch_twin.training(config, batches_of(model, size), compiled) as turn:
                turn(2)
                warm_up_seconds = time.perf_counter() - began
                turns = [turn(run.sizes["steps"]) for _ in range(run.sizes["turns"])]
            seconds = statistics.median(each["seconds"] for each in turns)
            speeds[size] = size / seconds
            figures = {"step_seconds": seconds, "images_per_second": size / seconds, "compile_seconds": warm_up_seconds}
            run.emit(case, {"images": size, **figures, "memory_gib": turns[-1]["memory_mb"] * 2**20 / GIB})

    for size in run.sizes["twin_batches"]:
        measure(size, compiled=False)
    if speeds:
        measure(max(speeds, key=speeds.get), compiled=True)


# ---------------------------------------------------------------------------------------------------------------------
# (d) Encoding and scoring


class Repeated(Sequence):
    """Few different images that come again and again, (H, W, 3) by index."""

    def __init__(self, held: np.ndarray, count: int):
        self._held, self._count = held, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> np.ndarray:
        return self._held[number % len(self._held)]


def encode(run: Run) -> None:
    """Images and texts through the towers, and the text-conditioned score of every pair, as evaluation does it.

    With the plain attention, and with the one that trained faster if that is another.
    """
    best = fastest(run.results.get("train", {}).values())
    kinds = dict.fromkeys(["xla", *([best["change"]["attention"]] if best else [])])
    with jax.set_mesh(sharding.create_mesh(devices=jax.devices()[:1])):
        for kind in kinds:
            _encode(run, kind)


def _encode(run: Run, attention: str) -> None:
    sizes, section = run.sizes["encoding"], {**run.sizes["model"], **COMPUTE, "attention": attention}
    model = models.create(section)
    rng = np.random.default_rng(0)
    held = rng.integers(0, 256, (min(sizes["images"], 500), *model.image_size, 3), dtype=np.uint8)
    images = Repeated(held, sizes["images"])
    text = section["text"]
    tokens = inputs.captions(rng, sizes["texts"], text["context_length"], text["vocab_size"])
    owner = np.arange(sizes["texts"]) * sizes["images"] // sizes["texts"]
    options = {
        "preprocess": model.preprocessing,
        "image_batch": sizes["image_batch"],
        "text_batch": sizes["text_batch"],
    }
    encoder = Encoder(model, **options)
    retrieval = Retrieval(model, RetrievalSet("made_up", images, tokens, owner), modes=("flair",), **options)
    params = encoder.place(jax.jit(lambda: state.init_params(model, 0))())

    def encode_images():
        for _, features in encoder.images(params, images):
            last = features
        return last

    for case, count, compute in (
        ("images", sizes["images"], encode_images),
        ("texts", sizes["texts"], lambda: encoder.texts(params, tokens)),
        ("pairs, with encoding", sizes["images"] * sizes["texts"], lambda: retrieval.scores(params)),
    ):
        label = f"{case}, attention={attention}"
        with run.guard(label):
            for turn in ("first", "second"):  # the first compiles
                began = time.perf_counter()
                jax.block_until_ready(compute())
                seconds = time.perf_counter() - began
                run.emit(label, {"run": turn, "count": count, "seconds": seconds, "per_second": count / seconds})


# ---------------------------------------------------------------------------------------------------------------------
# (e) Boxes and queries


def matching(run: Run) -> None:
    """Both ways of matching boxes and queries, with GRAIN's five of each and with more."""
    from benchmarks import matching as benchmark

    for queries in (5, 6):
        with run.guard(case := f"{queries} queries"):
            run.emit(case, benchmark.measure(run.sizes["matching_images"], queries, targets=5))


# ---------------------------------------------------------------------------------------------------------------------
# (f) A profile of the best setting


def profile(run: Run) -> None:
    """Shares of the step's time by kind of kernel, at the setting that trained most images per second."""
    best = fastest(run.results.get("train", {}).values())
    if best is None:
        raise ValueError("no setting of the training step was measured")
    steps, compiled = 3, Compiled(run.sizes["model"], best["images"], best["change"])
    placed = [compiled.place(number) for number in range(steps)]
    compiled.run(placed, steps)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            compiled.run(placed, steps)
        figures = kernels.summary(pathlib.Path(folder), compiled.step.as_text(), steps)
    run.emit(" ".join([str(best["images"]), *(f"{name}={value}" for name, value in best["change"].items())]), figures)


PARTS = {
    "golden": golden,
    "attention": attention,
    "train": training,
    "twin": twin,
    "encode": encode,
    "matching": matching,
    "profile": profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--results", type=pathlib.Path, required=True, help="of the parts before")
    parser.add_argument("--seconds", type=float, required=True, help="until the part is stopped")
    parser.add_argument("--toy", action="store_true")
    parsed = parser.parse_args()
    sizes = TOY_SIZES if parsed.toy else FULL_SIZES
    PARTS[parsed.part](Run(sizes, json.loads(parsed.results.read_text()), parsed.seconds))


if __name__ == "__main__":
    main()
