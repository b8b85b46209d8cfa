"""Text-conditioned scores per second, every image with every text, beside the PyTorch twin: see `encode`."""

from benchmarks import encode

if __name__ == "__main__":
    encode.main(name="score")
