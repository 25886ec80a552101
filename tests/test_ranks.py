"""Ranks and shards against one process. The file is its own worker: torchrun starts
`python test_ranks.py CASE DIR`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[1]))
from ire import IRE, SAM, SoftIRE, kth_smallest

STEPS = 8
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "sam": lambda p: SAM(torch.optim.AdamW(p, 0.01), rho=0.1),
    "adaptive sam": lambda p: SAM(torch.optim.SGD(p, 0.1, momentum=0.9), rho=0.1, adaptive=True),
}
KINDS = (*BASES, "soft")


class Model(nn.Module):
    """Shapes that two or three ranks split unevenly, a last layer of which some hold nothing, a
    branch without use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down, self.unused = (
            nn.Linear(3, 5),
            nn.LayerNorm(5),
            nn.Linear(5, 1),
            nn.Linear(2, 2),
        )
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


def batch(step, rank=0, world=1):
    g = torch.Generator().manual_seed(step)
    x, y, sampled = (
        torch.randn(12, n, generator=g, dtype=torch.float64).chunk(world)[rank] for n in (3, 1, 1)
    )
    return x, y, sampled


def train(model, opt, steps, rank=0, world=1):
    for step in steps:
        x, y, sampled = batch(step, rank, world)

        def closure():
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        closure()
        if opt.probe_due:  # with training gradients in place, which must survive it
            before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            with opt.probe():
                F.mse_loss(model(x), sampled).backward()
            assert all(
                p.grad is None and g is None or torch.equal(whole(p.grad), whole(g))
                for p, g in zip(model.parameters(), before)
            )
        opt.step(closure) if isinstance(opt.base, SAM) else opt.step()


def optimizer(model, base, curvature="fisher"):
    if base == "soft":
        return SoftIRE(torch.optim.AdamW(model.parameters(), 0.01), interval=3, warmup=2)
    return IRE(
        BASES[base](model.parameters()),
        kappa=2,
        gamma=0.6,
        interval=3,
        warmup=2,
        curvature=curvature,
    )


def whole(t):
    """A full plain tensor, on every rank (gloo gathers no bools)."""
    return (
        (t.int().full_tensor().bool() if t.dtype == torch.bool else t.full_tensor())
        if hasattr(t, "full_tensor")
        else t
    )


def result(model, opt):
    return (
        [whole(p.detach()) for p in model.parameters()],
        [whole(opt.masks[p]) for p in model.parameters() if p in opt.masks],
    )


def check(got, expected):
    for a, b in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(got[1], expected[1], strict=True):  # masks are equal, soft factors near
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def alone(base, curvature="fisher"):
    model = Model()
    opt = optimizer(model, base, curvature)
    train(model, opt, range(STEPS))
    return result(model, opt)


# ---------------------------------------------------------------------------- on each rank
def ranks():
    return dist.get_rank(), dist.get_world_size()


def ddp(folder):
    rank, world = ranks()
    for base in KINDS:
        for views in (False, True):
            model = nn.parallel.DistributedDataParallel(
                Model(), gradient_as_bucket_view=views, find_unused_parameters=True
            )
            opt = optimizer(model, base)
            train(model, opt, range(STEPS), rank, world)
            check(result(model, opt), alone(base))


def accumulation(folder):
    """A probe amid accumulation leaves what was accumulated, also where it is refused."""
    rank, world = ranks()
    model = nn.parallel.DistributedDataParallel(
        Model(), gradient_as_bucket_view=True, find_unused_parameters=True
    )
    opt = optimizer(model, "adamw")

    def probe(net):
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with opt.probe(model):
            F.mse_loss(net(x), sampled).backward()
        after = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    for step in range(4):
        x, y, sampled = batch(step, rank, world)
        opt.zero_grad()
        with model.no_sync():
            F.mse_loss(model(x[:2]), y[:2]).backward()
            refused(
                lambda: probe(model), "ranks differ in their curvature: reduce it as in training"
            )
        refused(lambda: probe(model.module), "ranks differ in their curvature")
        probe(model)
        F.mse_loss(model(x[2:]), y[2:]).backward()
        opt.step()


def refused(run, message):
    try:
        run()
    except (RuntimeError, ValueError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def one_forward(folder):
    """DDP averages once a forward pass; the training gradient after the probe's is this rank's."""
    rank, world = ranks()
    x, y, sampled = batch(0, rank, world)
    model = nn.parallel.DistributedDataParallel(Model(), find_unused_parameters=True)
    opt = IRE(torch.optim.AdamW(model.parameters(), 0.01), kappa=0, gamma=0.6)
    out = model(x)
    with opt.probe(model):
        F.mse_loss(out, sampled).backward(retain_graph=True)
    F.mse_loss(out, y).backward()
    refused(opt.step, "ranks differ in their weights after step 0: are the gradients averaged?")


def partitions(folder):
    """Optimizers that hold a part of the parameters on each rank are refused."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank, world = ranks()
    for make in (
        lambda p, **kw: IRE(torch.optim.SGD(p, 0.1), kappa=1, gamma=0.5),
        lambda p, **kw: SAM(torch.optim.SGD(p, 0.1)),
    ):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        for p in model.parameters():
            dist.broadcast(p.data, 0)
        zero = ZeroRedundancyOptimizer(model.parameters(), make)
        model(torch.ones(2, 3)).sum().backward()
        refused(
            lambda: zero.step(lambda: torch.zeros(())),
            "ranks differ in their weights before the first step",
        )
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    opt = IRE(zero, kappa=1, gamma=0.5)
    with opt.probe(model):
        model(torch.ones(2, 3)).square().sum().backward()
    model(torch.ones(2, 3)).sum().backward()
    opt.step()
    refused(opt.state_dict, "consolidate_state_dict")
    zero.consolidate_state_dict(to=0)
    if rank == 0:
        assert {"exp_avg", "flat"} <= opt.state_dict()["state"][0].keys()
    for own in (False, True):
        sharded = FullyShardedDataParallel(
            nn.Linear(3, 4), device_id=torch.device("cpu"), use_orig_params=own
        )
        for wrap in (SAM, lambda base: IRE(base, kappa=1, gamma=0.5)):
            refused(
                lambda: wrap(torch.optim.SGD(sharded.parameters(), 0.1)),
                "base: got parameters of FSDP1",
            )


def sharded(mesh=None):
    from torch.distributed.fsdp import fully_shard

    model = Model()
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(folder):
    rank, world = ranks()
    for base in KINDS:
        model = sharded()
        opt = optimizer(model, base)
        train(model, opt, range(STEPS), rank, world)
        check(result(model, opt), alone(base))
        assert all(
            f.dtype == (torch.float64 if base == "soft" else torch.bool)
            and f.placements == p.placements
            for p in model.parameters()
            if (f := opt.masks.get(p)) is not None
        )
    model = sharded()
    opt = optimizer(model, "adamw", "second_moment")
    train(model, opt, range(STEPS), rank, world)
    check(result(model, opt), alone("adamw", "second_moment"))


def hybrid(folder):
    """Replicas of shards: two ranks share what two others have, and each element counts once."""
    rank, world = ranks()
    model = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    opt = optimizer(model, "sam")
    train(model, opt, range(STEPS), rank, world)
    check(result(model, opt), alone("sam"))


def tensor_parallel(folder):
    """Shard and Replicate placements and plain parameters; the norm's gradients are partial sums
    of the ranks."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    rank, world = ranks()

    class Even(nn.Module):
        def __init__(self, share):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.up, self.down, self.share = (
                nn.LayerNorm(3),
                nn.Linear(3, 6),
                nn.Linear(6, 1),
                share,
            )
            self.scale = nn.Parameter(torch.ones(1))  # stays plain
            self.double()

        def forward(self, x):
            return self.down(torch.tanh(self.up(self.norm(self.share(x))))) * self.scale

    mesh = init_device_mesh("cpu", (world,))
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(),
    }
    for base in KINDS:
        one, many = (
            Even(lambda x: x),
            parallelize_module(Even(lambda x: x.chunk(world)[rank]), mesh, plan),
        )
        opts = [optimizer(model, base) for model in (one, many)]
        for model, opt in zip((one, many), opts):
            train(model, opt, range(STEPS))
        assert {str(getattr(p, "placements", None)) for p in many.parameters()} == {
            "None",
            "(Replicate(),)",
            "(Shard(dim=0),)",
            "(Shard(dim=1),)",
        }
        check(result(many, opts[1]), result(one, opts[0]))


def kth(folder):
    rank, world = ranks()
    values = torch.rand(100, generator=torch.Generator().manual_seed(1)) ** 9
    values[20:50] = 0
    mine = list(values[:90].chunk(world)[rank].split(7)) + (
        [values[90:]] if rank == world - 1 else []
    )
    for k in (1, 30, 31, 57, 100):
        assert kth_smallest(mine, k, dist.group.WORLD) == values.sort().values[k - 1]
    assert (
        kth_smallest([values] if rank == 0 else [], 57, dist.group.WORLD)
        == values.sort().values[56]
    )


def average(folder):
    """Replicas climb alike and shards apart, though the ranks' random streams differ."""
    rank, world = ranks()
    for make in (
        lambda: nn.parallel.DistributedDataParallel(Model(), find_unused_parameters=True),
        sharded,
    ):
        model = make()
        opt = SAM(torch.optim.SGD(model.parameters(), 0.0), rho=0.5, average=True)
        torch.manual_seed(rank)
        start, climbs = [whole(p.detach()).clone() for p in model.parameters()], []

        def closure():
            opt.zero_grad()
            climbs.append(
                torch.cat(
                    [(whole(p.detach()) - s).flatten() for p, s in zip(model.parameters(), start)]
                )
            )
            F.mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
            return torch.zeros(())

        opt.step(closure)
        opt.step(closure)
        for climb in climbs:
            everywhere = [torch.empty_like(climb) for _ in range(world)]
            dist.all_gather(everywhere, climb)
            assert all(torch.equal(climb, other) for other in everywhere) and len(
                climb.unique()
            ) == len(climb)
            assert 0.2 < climb.norm() < 0.8
        assert not torch.equal(*climbs)
        assert all(torch.equal(whole(p.detach()), s) for p, s in zip(model.parameters(), start))


def make(shard, base):
    model = sharded() if shard else Model()
    for p in (
        model.unused.parameters()
    ):  # torch's own AdamW state is not found again for a parameter never stepped
        p.requires_grad_(False)
    return model, optimizer(model, base)


def save(folder):
    """Trains, saves with torch.distributed.checkpoint, trains on, and writes the end down."""
    rank, world = ranks()
    for base in KINDS:
        model, opt = make(world > 1, base)
        train(model, opt, range(4), rank, world)
        states = get_state_dict(model, opt)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/{base}")
        train(model, opt, range(4, STEPS), rank, world)
        if (end := result(model, opt)) and rank == 0:
            torch.save(end, f"{folder}/{base}.pt")


def load(folder):
    """Loads into a fresh model and optimizer, on however many ranks, and must come to the same
    end."""
    rank, world = ranks()
    for base in KINDS:
        model, opt = make(world > 1, base)
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        states = get_state_dict(model, opt)
        states = {"model": states[0], "optimizer": states[1]}
        dcp.load(states, checkpoint_id=f"{folder}/{base}")
        set_state_dict(
            model, opt, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        assert opt.param_groups[0]["ire_step"] == 4 and opt.base.param_groups is opt.param_groups
        kind = torch.float64 if base == "soft" else torch.bool
        assert opt.masks and all(mask.dtype == kind for mask in opt.masks.values())
        train(model, opt, range(4, STEPS), rank, world)
        check(result(model, opt), torch.load(f"{folder}/{base}.pt", weights_only=True))


# ---------------------------------------------------------------------------- the tests
def start(case, n, folder):
    if torch.__version__ < "2.7" and case not in ("ddp", "accumulation", "one_forward", "kth"):
        pytest.skip(
            "torch 2.6: FSDP2 does not run on a CPU, and DTensor's caches mix up the masks' dtype"
        )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(n),
            __file__,
            case,
            str(folder),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "case, n",
    [
        ("ddp", 2),
        ("one_forward", 2),
        pytest.param("ddp", 3, marks=pytest.mark.slow),
        pytest.param("accumulation", 2, marks=pytest.mark.slow),
        pytest.param("partitions", 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 3, marks=pytest.mark.slow),
        pytest.param("hybrid", 4, marks=pytest.mark.slow),
        pytest.param("tensor_parallel", 2, marks=pytest.mark.slow),
        pytest.param("kth", 3, marks=pytest.mark.slow),
        pytest.param("average", 2, marks=pytest.mark.slow),
    ],
)
def test_as_on_one_process(case, n, tmp_path):
    start(case, n, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (1, 2)])
def test_distributed_checkpoint(before, after, tmp_path):
    start("save", before, tmp_path)
    start("load", after, tmp_path)


def test_the_step_that_makes_state_does_not_count_or_warn(recwarn):
    """What torch.distributed.checkpoint does to a fresh optimizer, without a process group."""
    for base in BASES.values():
        model = Model()
        opt = IRE(base(model.parameters()), kappa=2, gamma=0.6)
        before = [p.detach().clone() for p in model.parameters()]
        get_state_dict(model, opt)
        assert (
            opt.probe_due and opt.param_groups[0]["ire_step"] == 0 and opt.param_groups[0]["lr"] > 0
        )
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert all(not opt.masks[p].any() for p in model.parameters()) and not recwarn.list


def test_a_first_step_at_lr_0_counts():
    model = Model()
    opt = IRE(torch.optim.SGD(model.parameters(), 0.0), kappa=2, gamma=0.6, warmup=5)
    F.mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
    opt.step()
    assert opt.param_groups[0]["ire_step"] == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        globals()[sys.argv[1]](sys.argv[2])
        dist.barrier()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
    os._exit(0)  # gloo sometimes aborts while the interpreter exits
