"""``neobert finetune contrastive`` with every gradient kept: in this process, or under torchrun."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neobert import cli


@contextmanager
def kept_gradients() -> Iterator[list[torch.Tensor]]:
    """The gradient of all parameters at every optimizer step."""
    step, found = torch.optim.AdamW.step, []

    def kept(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = kept  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    from neobert.finetuning.contrastive import loss

    loss.CPU_QUERIES = 2  # several backward passes through the gathered documents
    with kept_gradients() as gradients:
        code = cli.main(["finetune", "contrastive", *sys.argv[2:]])
    torch.save(gradients, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    sys.exit(code)
