"""IRE over every optimizer that torch has, and in mixed precision and compiled steps."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import StepLR
from torch.testing._internal.common_optimizers import optim_db

from ire import IRE, SAM, AdmIRE, sampled_cross_entropy

# That import forbids all after it to set the backends' flags, also the scripts in their tests.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

REFUSED = {"LBFGS": "line search", "SparseAdam": "sparse gradients"}
CASES = [
    pytest.param(info.optim_cls, case.kwargs, id=f"{info.optim_cls.__name__}-{case.desc}-{i}")
    for info in optim_db
    if info.optim_cls.__name__ not in REFUSED
    for i, case in enumerate(info.optim_inputs_func(device="cpu"))
    if not case.kwargs.get("differentiable")
]  # needs a graph through the step, which no training step has


def weights(cls):
    torch.manual_seed(0)
    shapes = [(4, 5), (5, 3)] if cls.__name__ == "Muon" else [(4, 5), (5,), (5, 3), ()]
    return [nn.Parameter(torch.randn(s, dtype=torch.float32)) for s in shapes]


def backward(params, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    for p in params:
        p.grad = None
    out = x @ params[0] + (params[1] if params[1].dim() == 1 else 0)
    out = (
        torch.tanh(out)
        @ (params[1] if len(params) == 2 else params[2])
        * (params[3] if len(params) == 4 else 1)
    )
    (out - 1).square().mean().backward()


def run(params, opt, steps, start=0):
    for step in range(start, start + steps):
        if getattr(opt, "probe_due", False):
            with opt.probe():
                backward(params, 100 + step)
        backward(params, step)
        opt.step()
    return [p.detach().clone() for p in params]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("cls, kwargs", CASES)
def test_torchs_own_optimizers(cls, kwargs):
    """kappa 0 follows to the bit through scheduling, editing, saving; kappa 1 doubles the step of
    the flat coordinates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of capturable on a CPU and the like: the base's own
        one, two = weights(cls), weights(cls)
        base = cls(one, **copy.deepcopy(kwargs))
        opt = IRE(cls(two, **copy.deepcopy(kwargs)), kappa=0, gamma=0.5, interval=2, warmup=1)
        schedules = [StepLR(o, 2, 0.5) for o in (base, opt)]
        for step in range(6):
            assert equal(run(one, base, 1, step), run(two, opt, 1, step))
            for s in schedules:
                s.step()
            if step == 3:
                for o in (base, opt):
                    o.param_groups[0]["weight_decay"] = 0.25
                state = opt.state_dict()
                opt = IRE(
                    cls(two, **copy.deepcopy(kwargs)), kappa=0, gamma=0.5, interval=2, warmup=1
                )
                opt.load_state_dict(state)
                schedules[1].optimizer = opt
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(opt.state[q][k]))
            for p, q in zip(one, two)
            for k, v in base.state[p].items()
            if v is not None
        )
        late = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
        for o, p in zip((base, opt), late):
            o.add_param_group({"params": [p], "lr": 0.1})
            if cls is torch.optim.Adagrad and torch.__version__ < "2.7":
                continue  # its own step does not know a group added later
            p.grad = torch.ones_like(p)
            o.step()
        assert equal(late[:1], late[1:])

        start, flat = [p.detach().clone() for p in two], [opt.masks[p] for p in two]
        assert sum(f.sum() for f in flat) >= sum(p.numel() for p in two) // 2
        opt.param_groups[0]["kappa"] = 1
        opt.__class__ = type("Probed", (IRE,), {"probe_due": property(lambda self: False)})
        there, plain = run(two, opt, 1, 6), run(one, base, 1, 6)
        for s, t, b, f in zip(start, there, plain, flat):
            assert torch.equal(t[~f], b[~f])
            torch.testing.assert_close(t[f] - s[f], 2 * (b[f] - s[f]), rtol=1e-3, atol=1e-5)


def test_what_is_refused_says_so():
    with pytest.raises(ValueError, match="LBFGS .a line search"):
        IRE(torch.optim.LBFGS(weights(torch.optim.LBFGS)), kappa=1, gamma=0.5)
    embed = nn.Embedding(5, 3, sparse=True)
    opt = IRE(torch.optim.SparseAdam(embed.parameters()), kappa=1, gamma=0.5)
    with pytest.raises(ValueError, match="gradient: got .*sparse.*, allowed is dense"), opt.probe():
        embed(torch.tensor([1])).sum().backward()


def test_names_in_torchs_list():
    """The list above would shrink silently if torch renamed it."""
    names = {case.id.split("-")[0] for case in CASES}
    assert names >= {
        "SGD",
        "AdamW",
        "Adam",
        "RMSprop",
        "Adagrad",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adadelta",
        "ASGD",
        "Rprop",
    }
    assert ("Muon" in names) == hasattr(torch.optim, "Muon")


@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax"])
def test_sam_over_others(name):
    cls = getattr(torch.optim, name)
    one, two = weights(cls), weights(cls)
    base, opt = SAM(cls(one)), IRE(SAM(cls(two)), kappa=0, gamma=0.5, interval=2)
    for step in range(5):
        for params, o in ((one, base), (two, opt)):
            if getattr(o, "probe_due", False):
                with o.probe():
                    backward(params, 100 + step)
            o.step(lambda: backward(params, step))
    assert equal(one, two)


# ------------------------------------------------------------ mixed precision
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_as_for_the_base_and_keeps_the_probe_due(fused):
    net = model()
    opt = AdmIRE(net.parameters(), 0.01, kappa=2, gamma=0.5, interval=2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert not hasattr(opt, "_step_supports_amp_scaling")
    for step in range(6):
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        if opt.probe_due:
            with opt.probe():
                scaler.scale(sampled_cross_entropy(net(x))).backward()
        before = copy.deepcopy((net.state_dict(), opt.state_dict()))
        opt.zero_grad()
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        if step == 2:
            net[0].weight.grad[0, 0] = torch.inf
        scaler.step(opt)
        scaler.update()
        if step == 2:
            assert equal(before[0].values(), net.state_dict().values())
            assert str(before[1]) == str(opt.state_dict()) and opt.param_groups[0]["ire_step"] == 2
    assert opt.param_groups[0]["ire_step"] == 5 and all(
        p.isfinite().all() for p in net.parameters()
    )


def test_an_overflowing_probe_marks_sharp():
    net = model().half()
    opt = AdmIRE(net.parameters(), 0.01, eps=1e-4, kappa=2, gamma=0.9)
    with opt.probe():
        (net(torch.randn(8, 4).half()).float().square().sum() * 1e6).backward()
        bad = [~p.grad.isfinite() for p in net.parameters()]
    assert any(b.any() for b in bad) and not any(
        (b & opt.masks[p]).any() for b, p in zip(bad, net.parameters())
    )


def test_autocast_bfloat16():
    net = model()
    opt = AdmIRE(net.parameters(), 0.01, kappa=2, gamma=0.5, interval=2)
    for _ in range(5):
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        with torch.autocast("cpu", torch.bfloat16):
            if opt.probe_due:
                with opt.probe():
                    sampled_cross_entropy(net(x)).backward()
            loss = F.cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert sum(opt.masks[p].sum() for p in net.parameters()) >= 67 // 2


# ------------------------------------------------------------ compiled
def test_compiled_model_and_compiled_step():
    """The model's graph serves training and probe; a step inside the compiled function breaks the
    graph, no more."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net = model()
        opt = AdmIRE(net.parameters(), 0.01, kappa=2, gamma=0.5, interval=2, warmup=1)
        forward = torch.compile(net, backend="aot_eager") if compiled else net

        def step(x, y):
            opt.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            opt.step()

        run_step = torch.compile(step, backend="aot_eager") if compiled else step
        for t in range(5):
            g = torch.Generator().manual_seed(t)
            x, y = torch.randn(8, 4, generator=g), torch.randint(3, (8,), generator=g)
            if opt.probe_due:
                with opt.probe():
                    F.cross_entropy(forward(x), y.flip(0)).backward()
            run_step(x, y)
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
