"""A small encoding job, and how it is killed."""

from pathlib import Path

from fake_encoder import FakeEncoder

from neobert.outputs import sidecar

TEXTS = [f"text {i} " + "word " * (i % 7) for i in range(18)]


class Killed(BaseException):
    """Stands for a process that ends between two system calls."""


def stop_after(texts: int) -> FakeEncoder:
    def stop(done: int) -> None:
        if done >= texts:
            raise Killed

    return FakeEncoder(after_window=stop)


def files_of(output: Path) -> dict[str, bytes]:
    """Contents of an output and its description."""
    return {path.name: path.read_bytes() for path in (output, sidecar(output)) if path.exists()}
