"""From a name to first logits with full-size weights: time and peak memory of each part, over a local server.

    python -m benchmarks.hub

A random ViT-B-16-FLAIR in the reference's layout (a training checkpoint, `module.` before each name) is served by a
local server that speaks the hub's protocol. Each part runs in a process of its own: the first one downloads, converts,
loads and computes logits; the second one finds the converted file. Needs PyTorch, to write the checkpoint. Weights of
603 MB are written to a temporary folder, twice more by the conversion.
"""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

from benchmarks import processes

COMMIT = "0" * 40
NAME = "hf://someone/flair/flair.pt"


class Server(http.server.SimpleHTTPRequestHandler):
    """One file, with the headers that `huggingface_hub` asks for. `path_served`: it."""

    path_served: pathlib.Path

    def _head(self) -> bool:
        if "/resolve/" not in self.path:  # huggingface_hub asks for other things, too
            self.send_error(404)
            return False
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"weights"')
        self.send_header("Content-Length", str(self.path_served.stat().st_size))
        self.end_headers()
        return True

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        if not self._head():
            return
        with self.path_served.open("rb") as file:
            self.copyfile(file, self.wfile)

    def log_message(self, *_) -> None:
        pass


def write(path: pathlib.Path) -> None:
    """A training checkpoint of a random ViT-B-16-FLAIR with the reference's names."""
    import torch

    from flair_jax.configs import variants
    from flair_jax.convert.torch_flair import TorchFLAIR

    torch.manual_seed(0)
    weights = TorchFLAIR(variants.flair("B/16").to_dict()).state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)


def measure() -> dict[str, float]:
    """Seconds of each part, and the peak memory of this process after it in MiB."""
    found, began = {}, time.perf_counter()

    def note(name):
        nonlocal began
        found[name] = round(time.perf_counter() - began, 2)
        found[f"{name}, peak MiB"] = round(processes.peak_mib())
        began = time.perf_counter()

    import flair_jax
    from flair_jax.convert import hub

    flair_jax.load  # noqa: B018 - imports jax
    note("import")
    hub.fetch(NAME)
    note("download")
    hub.kept(NAME)
    note("convert")
    model = flair_jax.load(NAME)
    note("load")
    images = model.preprocess(model_image())
    logits = model.get_logits(images, model.tokenize(["a red fox", "a dog, asleep"]))
    assert logits.shape == (1, 2)
    note("first logits")
    return found


def model_image():
    """A picture of some size."""
    from PIL import Image

    return Image.linear_gradient("L").resize((640, 480)).convert("RGB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Server.path_served = pathlib.Path(folder, "flair.pt")
        # In a process of its own: PyTorch's memory is none of the parts'.
        subprocess.run([sys.executable, "-m", "benchmarks.hub", "write", str(Server.path_served)], check=True)
        print(f"{Server.path_served.stat().st_size / 1e6:.0f} MB")
        with http.server.ThreadingHTTPServer(("localhost", 0), Server) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            endpoint = f"http://localhost:{server.server_port}"
            environment = {**os.environ, "HF_HOME": f"{folder}/hf", "HF_ENDPOINT": endpoint}
            environment.pop("HF_HUB_OFFLINE", None)
            for title in ("the first time", "the second time"):
                command = [sys.executable, "-m", "benchmarks.hub", "measure"]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                print(title, done.stdout.strip().splitlines()[-1], flush=True)
            server.shutdown()


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(pathlib.Path(sys.argv[2]))
    elif sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure()))
    else:
        main()
