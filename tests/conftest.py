"""What several tests share: the tiny FLAIR whose numbers the original code computed."""

import contextlib
import gc
import os
import tempfile

from processes import QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on one CPU, so that sharded code runs as it does on eight chips.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
# What several tests or their processes compile is compiled once. jax locks the folder only if its size has a bound.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import golden_files
import jax
import numpy as np
import pytest

from flair_jax import compilation, models, optimizer, sharding, state
from flair_jax.convert import names

GOLDEN = golden_files.COPIES


def model_section(reference: dict, **overrides) -> dict:
    """Our `model` section for a `model_cfg` of the reference."""
    vision, text = reference["vision_cfg"], reference["text_cfg"]
    section = dict(
        name="flair",
        embed_dim=reference["embed_dim"],
        vision=dict(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            depth=vision["layers"],
            heads=vision["width"] // vision["head_width"],
        ),
        text=dict(
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            width=text["width"],
            depth=text["layers"],
            heads=text["heads"],
        ),
        pooling=dict(heads=8),
        init_logit_scale=2.659,
        init_logit_bias=reference["init_logit_bias"],
    )
    return {**section, **overrides}


def pytest_addoption(parser):
    parser.addoption("--golden", metavar="ROOT", help="numbers of the references to compare with; see golden_files.py")


def pytest_configure(config):
    """Runs before any test module is imported, so that `TINY` and `load_golden` follow `--golden`."""
    golden_files.use(config.getoption("--golden"))
    if golden_files.exists("tiny.json"):
        TINY.update(model_section(golden_files.sections("tiny")))


def pytest_collection_modifyitems(items):
    """Files with tests of half a minute come first: what is left for the workers to share at the end is short."""
    names = ("processes", "train", "gpu_check", "benchmark_train", "lora", "ema", "resume", "readme", "fine_tuning")
    long = {f"test_{name}" for name in names}
    items.sort(key=lambda item: item.path.stem not in long)


def pytest_collection_finish():
    """What was imported stays; the garbage collector need not look at it again and again while jax traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50)


load_golden = golden_files.load


def losses(mps: bool = True, **options) -> dict:
    """Our `objectives` section for FLAIR's loss, with options of the text-conditioned one."""
    text_conditioned = dict(weight=0.5 if mps else 1.0, **options)
    return dict(
        text_conditioned=text_conditioned,
        sigmoid=dict(weight=0.5 if mps else 0.0, chunk_size=options.get("chunk_size")),
    )


TINY = model_section(golden_files.sections("tiny"))  # the tiny FLAIR; of `--golden ROOT` where it is given


def take_devices(monkeypatch, count: int) -> None:
    """Runs take so many of the eight devices: fewer compile and save faster, where a test is not about their number."""
    create = sharding.create_mesh
    monkeypatch.setattr(
        sharding,
        "create_mesh",
        lambda data=-1, fsdp=1, devices=None: create(data, fsdp, devices or jax.devices()[:count]),
    )


@pytest.fixture
def on_one_device(monkeypatch):
    take_devices(monkeypatch, 1)


_programs = {}  # of `share_programs`


@contextlib.contextmanager
def share_programs():
    """Runs share their optimizer, their fresh state and their compiled step where all that these are made of is equal.

    Tracing and lowering are most of the time of a short run. For runs of this process by the library's own code: a test
    that changes how a state or a step is made must do without.
    """

    def once(key, make):
        if key not in _programs:
            _programs[key] = make()
        return _programs[key]

    def described(tree):
        leaves = jax.tree.leaves_with_path(tree)
        return tuple((jax.tree_util.keystr(keys), x.shape, str(x.dtype), x.sharding) for keys, x in leaves)

    create_optimizer, create_state, compile_step = optimizer.create, state.create, compilation.compile_step
    options_of = {}  # by the optimizer's id; it stays in `_programs`

    def optimizer_once(**options):
        made = once(("optimizer", repr(sorted(options.items()))), lambda: create_optimizer(**options))
        options_of[id(made)] = {name: value for name, value in options.items() if name != "total_steps"}
        return made

    def state_once(model, optimize, mesh, seed, **kept):
        key = ("state", model, repr(sorted(options_of[id(optimize)].items())), mesh, seed, repr(sorted(kept.items())))
        made = once(key, lambda: create_state(model, optimize, mesh, seed, **kept))
        # Copies, since the step donates what it is given; `jnp.copy` would compile a program per shape.
        return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), made)

    def step_once(step, current, placed):
        parts = {name: value for name, value in step.keywords.items() if name not in ("model", "optimizer")}
        key = (step.func, step.keywords["model"], id(step.keywords["optimizer"]), repr(sorted(parts.items())))
        return once(("step", *key, described((current, placed))), lambda: compile_step(step, current, placed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "create", optimizer_once)
        patch.setattr(state, "create", state_once)
        patch.setattr(compilation, "compile_step", step_once)
        yield


@pytest.fixture(scope="module")
def shared_programs():
    with share_programs():
        yield


@pytest.fixture(scope="session")
def tiny_params():
    """Weights of the tiny FLAIR as a Flax tree."""
    return names.to_flax(load_golden("tiny.safetensors"), config=TINY)


def fresh_params(model, seed=0):
    """Fresh parameters of a model as numpy, in one program where `state.init_params` alone would compile hundreds."""
    return jax.device_get(jax.jit(lambda: state.init_params(model, seed))())


@pytest.fixture(scope="session")
def tiny_model():
    return models.create(TINY)


def nhwc(images: np.ndarray) -> np.ndarray:
    """The reference's (…, 3, H, W) as ours (…, H, W, 3)."""
    return np.moveaxis(images, -3, -1)
