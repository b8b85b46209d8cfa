"""The parts of `gpu_check`, each run in a process of its own: `python benchmarks/gpu_parts.py PART --results FILE`.

Nothing is imported here that a lent machine lacks: no grain, TensorFlow, clu, orbax, etils or ml_collections. So the
sizes of the models stand here as plain dicts, which a test compares with configs/variants.py.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
from flair_jax import compilation, flops, models, optimizer, sharding, state, train
from flair_jax.convert import names
from flair_jax.data.transforms.images import normalize
from flair_jax.evaluators import Retrieval, RetrievalSet
from flair_jax.evaluators.features import Encoder
from flair_jax.models import layers
from flair_jax.models.text import Text
from flair_jax.objectives import sigmoid

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
GIB = 2**30
MARK = "RESULT "  # as in gpu_check
CAPTIONS, ROW_LENGTH = 8, 80  # K, and tokens in a row of packed captions
OPTIMIZER = dict(learning_rate=5e-4, warmup_steps=2000, weight_decay=0.5, b1=0.9, b2=0.98, eps=1e-8)
LOSS = dict(block_size=None, mps=True, chunk_size=None)  # the whole batch is a block, as in the PyTorch twin
COMPUTE = dict(dtype="bfloat16", scan_blocks=False, remat="none", attention="xla", gelu="exact", micro_batches=1)
LESS_MEMORY = dict(remat="dots"), dict(chunk_size=64)  # of model and loss, where a batch does not fit

FLAIR = dict(
    name="flair",
    embed_dim=512,
    vision=dict(image_size=224, patch_size=16, width=768, depth=12, heads=12, patch_dropout=0.0),
    text=dict(context_length=77, vocab_size=49408, width=512, depth=12, heads=8),
    pooling=dict(heads=8),
)
TINY = dict(  # whose numbers the original computed: tests/golden/tiny*
    name="flair",
    embed_dim=64,
    vision=dict(image_size=64, patch_size=16, width=96, depth=3, heads=3),
    text=dict(context_length=77, vocab_size=512, width=64, depth=3, heads=4),
    pooling=dict(heads=8),
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
)
TOY_SIZES = dict(
    model=TINY,
    first_batch=4,
    batches=(8,),
    twin_batches=(2, 4),
    steps=1,
    turns=1,
    attention_batch=2,
    encoding=dict(images=6, texts=20, image_batch=4, text_batch=8),
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
            self.emit(case, {"error": f"{type(error).__name__}: {error}"[:300]})


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
    """Loss and gradients by the training step itself, with an optimizer that keeps the gradients and changes nothing."""
    given = np.load(GOLDEN / "tiny_loss_inputs.npz")
    text = Text.padded(given["tokens"].reshape(-1, given["tokens"].shape[-1]))
    batch = {
        "images": np.moveaxis(given["images"], 1, -1),
        "texts": {"tokens": text.tokens, "ends": text.ends},
        "draws": sigmoid.draws_of_rows(given["indices"], given["tokens"].shape[1]),
    }
    params = {**params, **{name: np.float32(value) for name, value in (golden["override"] or {}).items()}}
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, *_: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    step = step_of(TINY, {**LOSS, "mps": golden["added_mps_loss"]}, keep)
    before = state.TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=keep.init(params))
    after, numbers = jax.jit(step)(before, batch)
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
    """`layers.attend` by cuDNN in bfloat16 against the plain one in float32: value and gradient, at the model's shapes."""
    model, batch = run.sizes["model"], run.sizes["attention_batch"]
    vision, text = model["vision"], model["text"]
    patches, context = flops.patches(vision), text["context_length"]
    width = model["embed_dim"] // model["pooling"]["heads"]
    cases = {  # queries, keys, heads, width of a head, causal, packed
        "image tokens, odd": (
            1 + patches,
            1 + patches,
            vision["heads"],
            vision["width"] // vision["heads"],
            False,
            False,
        ),
        "padded captions, odd": (context, context, text["heads"], text["width"] // text["heads"], True, False),
        "packed captions": (ROW_LENGTH, ROW_LENGTH, text["heads"], text["width"] // text["heads"], True, True),
        "packed captions, odd": (context, context, text["heads"], text["width"] // text["heads"], True, True),
        "pooling, odd": (263, 1 + patches, model["pooling"]["heads"], width, False, False),
    }
    for case, sizes in cases.items():
        with run.guard(case):
            run.emit(case, _attention_case(batch, *sizes))


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
            figures["error"] = f"{kind}: {error}"[:300]
            continue
        errors = [float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(found, expected, strict=True)]
        figures[f"{kind}_value_error"], figures[f"{kind}_gradient_error"] = errors[0], max(errors[1:])
    if "cudnn_ms" in figures:  # bfloat16 has 8 bits; twice what the plain attention loses, and never more than 3 %
        pairs = [(figures[f"cudnn_{name}_error"], figures[f"xla_{name}_error"]) for name in ("value", "gradient")]
        figures["passed"] = all(ours <= min(0.03, 2 * theirs + 0.004) for ours, theirs in pairs)
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# (c) The training step


def step_of(model: Mapping[str, Any], loss: Mapping[str, Any], tx: optax.GradientTransformation) -> Callable:
    """`train_step` of plain sections of a config, as a function of state and batch."""
    return functools.partial(train.train_step, model=models.create(model, loss), tx=tx, seed=0)


def scoped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, whose instructions the profile can tell by their scope."""

    def update(*arguments):
        with jax.named_scope("optimizer"):
            return tx.update(*arguments)

    return optax.GradientTransformation(tx.init, update)


def batches_of(model: Mapping[str, Any], size: int, count: int = 2) -> list[dict[str, Any]]:
    image_size = models.create(model).image_size
    text = {name: model["text"][name] for name in ("context_length", "vocab_size")}
    return inputs.made_up(size, image_size, CAPTIONS, text, ROW_LENGTH, batches=count)


def compiled_step(model: Mapping[str, Any], loss: Mapping[str, Any], size: int):
    """The compiled step, a fresh state and host batches, on one device."""
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    tx = scoped(optimizer.create(total_steps=100_000, **OPTIMIZER))
    held = batches_of(model, size)
    with jax.set_mesh(mesh):
        current = state.create(models.create(model), tx, mesh, 0)
        place = functools.partial(sharding.global_batch, mesh)
        compiled = compilation.compile_step(step_of(model, loss, tx), current, place(held[0]))
    return compiled, current, held, place


def train_case(run: Run, size: int, change: Mapping[str, Any], loss: Mapping[str, Any]) -> dict[str, Any]:
    """Images per second of a setting, each batch sent to the device as the training loop sends it."""
    model = {**run.sizes["model"], **COMPUTE, **change}
    began = time.perf_counter()
    step, current, held, place = compiled_step(model, {**LOSS, **loss}, size)
    compile_seconds = time.perf_counter() - began
    needed, limit = compilation.memory(step)["total"], compilation.memory_limit()
    figures = {"images": size, "change": {**change}, "loss_change": {**loss}, "needed_gib": needed / GIB}
    if limit is not None and needed > limit:
        raise MemoryError(f"needs {needed / GIB:.1f} GiB of {limit / GIB:.1f}")
    with jax.set_mesh(place.args[0]):
        current, numbers = step(current, place(held[0]))
        first_loss = float(numbers["loss"])
        current, numbers = jax.block_until_ready(step(current, place(held[1])))
        seconds = []
        for _ in range(run.sizes["turns"]):
            began = time.perf_counter()
            for number in range(run.sizes["steps"]):
                current, numbers = step(current, place(held[number % 2]))
            jax.block_until_ready((current, numbers))
            seconds.append((time.perf_counter() - began) / run.sizes["steps"])
    lengths = [inputs.packing.text_lengths(batch["texts"]) for batch in held]
    work = statistics.mean(flops.train_step(model, {**LOSS, **loss}, size, each) for each in lengths)
    figures |= {"step_seconds": statistics.median(seconds), "compile_seconds": compile_seconds, "loss": first_loss}
    figures |= {"images_per_second": size / figures["step_seconds"], "tflop_per_step": work / 1e12}
    if peak := flops.peak(jax.devices()[0].device_kind):
        figures["mfu"] = work / figures["step_seconds"] / peak
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of_device:  # of the process so far
        figures["memory_gib"] = statistics_of_device["peak_bytes_in_use"] / GIB
    return figures


def training(run: Run) -> None:
    """FLAIR B/16 in bfloat16, K = 8, packed captions: plain and cuDNN's attention, then batches of other sizes."""
    device = jax.devices()[0]
    run.emit("device", {"kind": device.device_kind, "jax": jax.__version__, "limit": compilation.memory_limit()})
    done: dict[str, dict[str, Any]] = {}
    longest = 0.0

    def measure(size: int, **change) -> None:
        """One setting; the same with less memory where it failed, or is going to by what smaller batches needed."""
        nonlocal longest
        plain = [case for case in done.values() if not case["loss_change"]]
        needs = max((case["needed_gib"] * size / case["images"] for case in plain), default=0.0)
        limit = compilation.memory_limit()
        tries = [({}, {}), LESS_MEMORY]
        for less, loss in tries[1:] if limit is not None and needs > limit / GIB else tries:
            words = " ".join(f"{name}={value}" for name, value in {**change, **less, **loss}.items())
            case = f"{size} {words}"
            if run.left() < longest:
                run.emit(case, {"error": f"not started: {run.left():.0f} seconds are left"})
                return
            began = time.monotonic()
            with run.guard(case):
                done[case] = train_case(run, size, {**change, **less}, loss)
                run.emit(case, done[case])
            longest = max(longest, time.monotonic() - began)
            jax.clear_caches()
            if case in done:
                return

    first = run.sizes["first_batch"]
    measure(first, attention="cudnn")
    scan = {}
    if run.left() < (1 + len(run.sizes["batches"])) * longest:  # unrolled blocks take too long to compile
        scan = dict(scan_blocks=True)
        measure(first, attention="cudnn", **scan)
    measure(first, attention="xla", **scan)
    best = max(done.values(), key=lambda case: case["images_per_second"], default=None)
    kind = best["change"]["attention"] if best else "xla"
    for size in run.sizes["batches"]:
        measure(size, attention=kind, **scan)


def twin(run: Run) -> None:
    """The PyTorch twin: eager at several sizes, then compiled at the best of them."""
    import torch

    from benchmarks import torch_twin

    model = {**run.sizes["model"], **COMPUTE}
    config = {"model": model, "optimizer": OPTIMIZER, "loss": LOSS}
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
    """Images and texts through the towers, and the text-conditioned score of every pair, as evaluation does it."""
    sizes, section = run.sizes["encoding"], {**run.sizes["model"], **COMPUTE}
    model = models.create(section)
    rng = np.random.default_rng(0)
    held = rng.integers(0, 256, (min(sizes["images"], 500), *model.image_size, 3), dtype=np.uint8)
    images = Repeated(held, sizes["images"])
    text = section["text"]
    tokens = inputs.captions(rng, sizes["texts"], text["context_length"], text["vocab_size"])
    options = {name: sizes[name] for name in ("image_batch", "text_batch")}
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: state.init_params(model, 0))()
        encoder = Encoder(model, normalize, **options)
        placed = encoder.place(params)
        owner = np.arange(sizes["texts"]) * sizes["images"] // sizes["texts"]
        data = RetrievalSet("made_up", images, tokens, owner)
        retrieval = Retrieval(model, data, preprocess=normalize, modes=("flair",), **options)
        cases = {
            "images": (sizes["images"], lambda: [x for _, x in encoder.images(placed, images)][-1]),
            "texts": (sizes["texts"], lambda: encoder.texts(placed, tokens)),
            "text-conditioned pairs, with encoding": (
                sizes["images"] * sizes["texts"],
                lambda: retrieval.scores(params),
            ),
        }
        for case, (count, compute) in cases.items():
            with run.guard(case):
                for label in ("first", "second"):  # the first compiles
                    began = time.perf_counter()
                    jax.block_until_ready(compute())
                    seconds = time.perf_counter() - began
                    run.emit(case, {"run": label, "count": count, "seconds": seconds, "per_second": count / seconds})


# ---------------------------------------------------------------------------------------------------------------------
# (e) A profile of the best setting


def profile(run: Run) -> None:
    """Shares of the step's time by kind of kernel, at the setting that trained most images per second."""
    done = [case for case in run.results.get("train", {}).values() if isinstance(case, dict)]
    done = [case for case in done if "images_per_second" in case]
    if not done:
        raise ValueError("no setting of the training step was measured")
    best = max(done, key=lambda case: case["images_per_second"])
    model = {**run.sizes["model"], **COMPUTE, **best["change"]}
    steps = 3
    step, current, held, place = compiled_step(model, {**LOSS, **best["loss_change"]}, best["images"])
    with jax.set_mesh(place.args[0]), tempfile.TemporaryDirectory() as folder:
        placed = [place(batch) for batch in held]
        for batch in placed:
            current, numbers = jax.block_until_ready(step(current, batch))
        with jax.profiler.trace(folder):
            for number in range(steps):
                current, numbers = step(current, placed[number % 2])
            jax.block_until_ready((current, numbers))
        figures = kernels.summary(pathlib.Path(folder), step.as_text(), steps)
    words = " ".join(f"{name}={value}" for name, value in {**best["change"], **best["loss_change"]}.items())
    run.emit(f"{best['images']} {words}", figures)


PARTS = {
    "golden": golden,
    "attention": attention,
    "train": training,
    "twin": twin,
    "encode": encode,
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
