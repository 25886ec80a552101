"""SoftIRE against its definition, written out in a few lines, and as the optimizer it has to be."""

import copy
import io

import pytest
import torch
import torch.nn as nn

from ire import IRE, SAM, SoftIRE

BASES = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Embedding(3, 2)).double()


def backward(net, step):
    g = torch.Generator().manual_seed(step)
    x, y = (torch.randn(8, n, generator=g, dtype=torch.float64) for n in (6, 4))
    loss = (net[:3](x) - y).square().mean() + net[3](torch.tensor([0])).square().sum()
    loss.backward()
    return loss


def train(net, opt, steps):
    for step in steps:
        opt.zero_grad()
        backward(net, step)
        opt.step()


def state(net, opt):
    return [*net.state_dict().values(), *opt.masks.values(), *opt.squares.values()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------- the definition
def written_out(net, base, steps, alpha, limit, beta, interval, warmup):
    params = list(net.parameters())
    v = [torch.zeros_like(p) for p in params]
    factors = None
    for step in range(steps):
        base.zero_grad()
        backward(net, step)
        v = [beta * x + (1 - beta) * p.grad**2 for x, p in zip(v, params, strict=True)]
        old = [p.detach().clone() for p in params]
        base.step()
        if step >= warmup and (step - warmup) % interval == 0:
            every = torch.cat([x.flatten() for x in v])
            median = every.sort().values[(len(every) - 1) // 2]
            raw = [((x / median) ** -alpha).clamp(1 / limit, limit) for x in v]
            mean = torch.cat([x.flatten() for x in raw]).mean()
            factors = [x / mean for x in raw]
        if factors:
            for p, before, f in zip(params, old, factors, strict=True):
                p.data = before + f * (p.data - before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.3, "limit": 4.0, "beta": 0.98, "interval": 10, "warmup": 0},
        {"alpha": 0.7, "limit": 2.0, "beta": 0.5, "interval": 3, "warmup": 4},
        {"alpha": 0.0, "limit": 1.0, "beta": 0.0, "interval": 1, "warmup": 0},
    ],
)
def test_soft_ire_is_its_definition(base, settings):
    expected, net = model(), model()
    written_out(expected, BASES[base](expected.parameters()), 25, **settings)
    train(net, SoftIRE(BASES[base](net.parameters()), **settings), range(25))
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_the_factors_have_mean_1_and_the_rarely_used_take_longer_steps():
    net = model()
    opt = SoftIRE(BASES["momentum"](net.parameters()), limit=3.0)
    train(net, opt, range(11))
    factors = torch.cat([1 + x.flatten() for x in opt.masks.values()])
    assert factors.mean().item() == pytest.approx(1, abs=1e-12)
    assert factors.min() < 1 < factors.max() and factors.max() / factors.min() <= 9 * (1 + 1e-12)
    rows = 1 + opt.masks[net[3].weight]
    assert (rows[1:] == factors.max()).all() and opt.flat_share() == {} and not opt.probe_due


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"kappa": 0.0}, {"warmup": 99}])
def test_nothing_to_do_is_the_base_to_the_bit(settings):
    plain, net = model(), model()
    train(plain, BASES["adamw"](plain.parameters()), range(12))
    train(net, SoftIRE(BASES["adamw"](net.parameters()), **settings), range(12))
    assert same([*plain.parameters()], [*net.parameters()])


def test_a_group_left_out_moves_as_the_base_and_does_not_count():
    net, plain = model(), model()
    groups = [{"params": net[:3].parameters()}, {"params": net[3].parameters(), "kappa": 0.0}]
    opt = SoftIRE(torch.optim.SGD(groups, 0.1))
    train(net, opt, range(12))
    train(plain, torch.optim.SGD(plain.parameters(), 0.1), range(12))
    assert torch.equal(net[3].weight, plain[3].weight) and net[3].weight not in opt.squares
    only = model()
    hidden = SoftIRE(torch.optim.SGD(only[:3].parameters(), 0.1))
    train(only, hidden, range(12))
    assert same([*only[:3].parameters()], [*net[:3].parameters()])


def test_it_sees_the_gradients_before_the_base_changes_them():
    class Changing(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.mul_(100)
            return loss

    expected, net, by_closure = model(), model(), model()
    train(expected, SoftIRE(torch.optim.SGD(expected.parameters(), 0.1)), range(12))
    train(net, SoftIRE(Changing(net.parameters(), 0.1)), range(12))
    opt = SoftIRE(Changing(by_closure.parameters(), 0.1))
    for step in range(12):

        def closure():
            opt.zero_grad()
            return backward(by_closure, step)

        with torch.no_grad():
            assert opt.step(torch.enable_grad()(closure)).item() > 0
    assert same([*expected.parameters()], [*net.parameters()])
    assert same([*expected.parameters()], [*by_closure.parameters()])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adams_second_moment_is_the_running_mean(amsgrad):
    nets = [model(), model()]
    for net, curvature in zip(nets, ("squares", "second_moment"), strict=True):
        base = torch.optim.AdamW(net.parameters(), 0.01, betas=(0.9, 0.9), amsgrad=amsgrad)
        opt = SoftIRE(base, beta=0.9, curvature=curvature)
        train(net, opt, range(25))
    assert not opt.squares and opt.masks
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------- state
def saved_and_loaded(opt, into):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    into.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("step", (1, 9, 10, 11))
def test_resume_ends_with_the_same_bits(base, step):
    whole, net = model(), model()
    uninterrupted = SoftIRE(BASES[base](whole.parameters()))
    train(whole, uninterrupted, range(25))
    opt = SoftIRE(BASES[base](net.parameters()))
    train(net, opt, range(step))
    later = model()
    later.load_state_dict(net.state_dict())
    resumed = SoftIRE(BASES[base](later.parameters()))
    saved_and_loaded(opt, resumed)
    train(later, resumed, range(step, 25))
    assert same(state(whole, uninterrupted), state(later, resumed))
    twin, other = copy.deepcopy((net, opt))
    train(twin, other, range(step, 25))
    assert same(state(whole, uninterrupted), state(twin, other))


def test_what_another_optimizer_saved_loads_without_its_masks():
    def wrap(kind, net):
        base = BASES["adamw"](net.parameters())
        if kind is IRE:
            return IRE(base, kappa=1, gamma=0.5, curvature="second_moment")
        return kind(base) if kind else base

    for first, second in ((None, SoftIRE), (IRE, SoftIRE), (SoftIRE, IRE)):
        net = model()
        before = wrap(first, net)
        train(net, before, range(3))
        after = wrap(second, net)
        saved_and_loaded(before, after)
        assert not after.masks and not getattr(after, "squares", None)
        entry = after.base.state_dict()["state"][0]
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
        train(net, after, range(3, 21))
        assert all(p.isfinite().all() for p in net.parameters()) and after.masks


# --------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alpha": -0.3}, "alpha: got -0.3, allowed is a number in [0, 1]"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"limit": 0.5}, "limit: got 0.5, allowed is a finite number >= 1"),
        ({"beta": 1.0}, "beta: got 1.0, allowed is a number in [0, 1)"),
        ({"kappa": 2}, "kappa: got 2, allowed is a number in [0, 1]"),
        ({"interval": 0}, "interval: got 0"),
        ({"curvature": "second_moment"}, "curvature: got 'second_moment', allowed is squares"),
        ({"curvature": "fisher"}, "curvature: got 'fisher', allowed is squares over SGD"),
        ({"warmup": 1.5}, "warmup: got 1.5"),
    ],
)
def test_bad_values_are_refused(settings, message):
    with pytest.raises(ValueError) as error:
        SoftIRE(torch.optim.SGD(model().parameters(), 0.1), **settings)
    assert str(error.value).startswith(message)


def test_what_it_cannot_do_is_refused():
    net = model()
    opt = SoftIRE(torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="there is no probe"):
        opt.probe(net)
    for wrap in (SoftIRE, lambda base: IRE(base, kappa=1, gamma=0.5)):
        with pytest.raises(ValueError, match="base: got SoftIRE"):
            wrap(opt)
    rows = nn.Embedding(3, 2, sparse=True)
    opt = SoftIRE(torch.optim.SGD(rows.parameters(), 0.1))
    rows(torch.tensor([0])).sum().backward()
    with pytest.raises(ValueError, match="dense, not sparse"):
        opt.step()


def test_a_group_may_change_and_a_parameter_may_grow():
    net = model()
    opt = SoftIRE(torch.optim.SGD(net[:3].parameters(), 0.1))
    train(net, opt, range(12))
    opt.add_param_group({"params": net[3].parameters()})
    opt.param_groups[0]["kappa"] = 0.0
    with torch.no_grad():
        net[3].weight.data = torch.randn(5, 2, dtype=torch.float64)
    net[3].weight.grad = None
    train(net, opt, range(12, 32))
    assert opt.masks[net[3].weight].shape == (5, 2)
    opt.param_groups[0]["kappa"] = 2.0
    with pytest.raises(ValueError, match="kappa: got 2.0"):
        opt.step()


def test_over_sam_and_in_low_precision():
    net = model().to(torch.bfloat16)
    opt = SoftIRE(SAM(torch.optim.SGD(net.parameters(), 0.1), rho=0.05))
    for _ in range(12):

        def closure():
            opt.zero_grad()
            loss = net[:3](torch.ones(2, 6, dtype=torch.bfloat16)).square().mean()
            loss.backward()
            return loss

        opt.step(closure)
    assert all(v.dtype == torch.float32 for v in opt.squares.values())
    assert net[0].weight.isfinite().all() and opt.masks[net[0].weight].std() > 0
