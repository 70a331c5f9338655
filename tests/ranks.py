"""What two processes do with a patched model: DDP and FSDP2 on gloo."""

from pathlib import Path
from typing import Any

import torch
from encoders import ENCODERS, padded, with_labels
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import neobert_kernels as nk

KINDS = ("mlm", "sequence")
WORLD = 2


def build(family: str, kind: str) -> nn.Module:
    torch.manual_seed(0)
    changes = {"num_labels": 3} if kind == "sequence" else {}
    return ENCODERS[family].head(kind, **changes).train()


def batch(family: str, kind: str, rank: int) -> dict[str, torch.Tensor]:
    """Each rank's documents; other lengths, so other packings."""
    torch.manual_seed(10 + rank)
    return with_labels(kind, *padded(family, ((9, 1, 17, 5), (3, 12, 8, 8))[rank]))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name.removeprefix("module.")] = grad
    return found


def sharded(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """Patched, and every layer sharded by FSDP2."""
    report = nk.patch(model)
    for entry in report.replaced:
        if entry.name.startswith(f"{model.base_model_prefix}."):
            fully_shard(model.get_submodule(entry.name), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def run(rank: int, folder: str) -> None:
    """Save the gradients that data parallelism gives, by family, head and wrapper."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {}
    for family, encoder in ENCODERS.items():
        for kind in KINDS:
            if not encoder.has(kind):
                continue
            model = build(family, kind)
            nk.patch(model)
            wrapped = nn.parallel.DistributedDataParallel(model)
            wrapped(**batch(family, kind, rank)).loss.backward()
            found[family, kind, "ddp"] = gradients(wrapped)

            model = sharded(build(family, kind), mesh)
            model(**batch(family, kind, rank)).loss.backward()
            found[family, kind, "fsdp"] = gradients(model)
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model = sharded(build(family, "mlm"), mesh, mp_policy=half)
        found[family, "mlm", "bf16 loss"] = model(**batch(family, "mlm", rank)).loss.detach()
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.destroy_process_group()
