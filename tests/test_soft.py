"""SoftIRE against its definition, written out in a few lines, and as the optimizer it has to be."""

import contextlib
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
            live = torch.cat([x[x > 0] for x in v])
            median = live.sort().values[(len(live) - 1) // 2]
            raw = [((x / median) ** -alpha).clamp(1 / limit, limit) for x in v]
            mean = torch.cat([r[x > 0] for r, x in zip(raw, v, strict=True)]).mean()
            factors = [(r / mean).where(x > 0, 1) for r, x in zip(raw, v, strict=True)]
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


def test_the_factors_have_mean_1_and_what_is_not_used_moves_as_the_base():
    net = model()
    opt = SoftIRE(BASES["momentum"](net.parameters()), limit=3.0)
    train(net, opt, range(11))
    factors = torch.cat([1 + x.flatten() for x in opt.masks.values()])
    assert factors.mean().item() == pytest.approx(1, abs=1e-12)
    assert factors.min() < 1 < factors.max() and factors.max() / factors.min() <= 9 * (1 + 1e-12)
    rows = 1 + opt.masks[net[3].weight]
    assert (rows[1:] == 1).all() and opt.flat_share() == {} and not opt.probe_due


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


@pytest.mark.parametrize("first", (None, IRE, SoftIRE))
@pytest.mark.parametrize("second", (IRE, SoftIRE))
def test_a_group_keeps_its_own_kappa_where_the_saved_one_means_another(first, second):
    own = {IRE: 1.5, SoftIRE: 0.5}

    def wrapped(kind, **group):
        p, q = (nn.Parameter(torch.ones(3)) for _ in "pq")
        base = torch.optim.AdamW([{"params": [p]}, {"params": [q], **group}], 0.01)
        if kind is None:
            return base
        return kind(base, kappa=own[kind], **({"gamma": 0.5} if kind is IRE else {}))

    opt = wrapped(second, kappa=0.0)
    opt.load_state_dict(wrapped(first).state_dict())
    kept = own[second] if first is second else 0.0
    assert [group["kappa"] for group in opt.param_groups] == [own[second], kept]
    again = wrapped(second)
    again.load_state_dict(opt.state_dict())
    assert [group["kappa"] for group in again.param_groups] == [own[second], kept]


def test_a_state_that_does_not_fit_changes_nothing():
    net = model()
    opt = SoftIRE(BASES["adamw"](net.parameters()))
    train(net, opt, range(3))
    before = copy.deepcopy(opt.state_dict())
    kept = [x.clone() for x in state(net, opt)]
    for name, value in (("soft_square", None), ("soft_factor", torch.ones(7)), ("soft_count", 3)):
        saved = copy.deepcopy(before)
        saved["param_groups"][0]["lr"] = 7.0
        saved["state"][0][name] = value
        with pytest.raises(ValueError, match=f"{name}: got"):
            opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.01
        assert same(state(net, opt), kept)


# --------------------------------------------------------------------------- hostile gradients
def factors_after(opt, grads):
    """1 + masks after steps whose gradients are given, {p: gradient} each."""
    for step in grads:
        for p, grad in step.items():
            p.grad = grad
        opt.step()
    return {p: 1 + mask for p, mask in opt.masks.items()}


def parameters(*sizes):
    return [nn.Parameter(torch.zeros(n)) for n in sizes]


def uniform(seed, n=1000):
    return 1 + torch.rand(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dead", (0.4, 0.6, 0.9))
@pytest.mark.parametrize("curvature", ("squares", "second_moment"))
def test_coordinates_without_gradient_do_not_move_the_others_scale(dead, curvature):
    (p,) = parameters(1000)
    live = torch.arange(1000) >= 1000 * dead
    opt = SoftIRE(torch.optim.Adam([p], 1.0), curvature=curvature)
    factor = factors_after(opt, [{p: uniform(0) * live}])[p]
    assert (factor[~live] == 1).all() and factor[live].std() > 0.05
    assert factor[live].mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", (1e-17, 1e-12, 1e12))
def test_the_factors_do_not_depend_on_the_scale_of_the_loss(scale):
    (p,) = parameters(1000)
    (q,) = parameters(1000)
    plain, scaled = (SoftIRE(torch.optim.SGD([x], 0.0)) for x in (p, q))
    expected = factors_after(plain, [{p: uniform(0)}])[p]
    factor = factors_after(scaled, [{q: uniform(0) * scale}])[q]
    torch.testing.assert_close(factor, expected, rtol=1e-4, atol=0)


def test_curvature_that_is_0_everywhere_is_said():
    (p,) = parameters(5)
    opt = SoftIRE(torch.optim.SGD([p], 1.0), interval=1)
    expected = factors_after(opt, [{p: uniform(0, 5)}])[p]
    opt.squares[p].zero_()
    with pytest.warns(UserWarning, match="SoftIRE: the curvature is 0 everywhere") as caught:
        factor = factors_after(opt, [{p: torch.zeros(5)}])[p]
    assert caught[0].filename == __file__
    assert torch.equal(factor, expected)


@pytest.mark.parametrize("wrong", (float("inf"), float("nan"), 1e30))
def test_a_step_that_the_base_skips_leaves_no_trace_of_its_gradient(wrong):
    (p,) = parameters(4)
    opt = SoftIRE(SAM(torch.optim.SGD([p], 0.01)), interval=2)
    for step in range(8):

        def closure():
            p.grad = torch.arange(1.0, 5.0)
            if step == 3:
                p.grad[0] = wrong
            return p.sum()

        if step == 3:
            with pytest.warns(UserWarning, match="SAM: skipped"):
                opt.step(closure)
        else:
            opt.step(closure)
    factor = 1 + opt.masks[p]
    assert p.isfinite().all() and (factor[:-1] > factor[1:]).all()


@pytest.mark.parametrize("wrong, words", ((1, None), (3, "not finite for half")))
def test_a_second_moment_that_is_not_a_number_stays_where_it_is(wrong, words):
    p, q = parameters(4, 1)
    opt = SoftIRE(torch.optim.Adam([p, q], 0.01), interval=1, curvature="second_moment")
    factors_after(opt, [{p: torch.arange(1.0, 5.0), q: torch.ones(1)}])
    before = opt.masks[p].clone()
    opt.state[p]["exp_avg_sq"][:wrong] = float("nan")
    with pytest.warns(UserWarning, match=words) if words else contextlib.nullcontext():
        opt.step()
    if words:
        assert torch.equal(opt.masks[p], before)
    else:
        assert opt.masks[p].isfinite().all() and q.isfinite().all()
        assert opt.masks[p][0] == opt.masks[p].min()


@pytest.mark.parametrize("curvature", ("squares", "second_moment"))
def test_a_parameter_that_joins_later_is_not_flat_for_that(curvature):
    old, new = parameters(1000, 1000)
    opt = SoftIRE(torch.optim.Adam([old], 0.01), interval=5, curvature=curvature)
    factors_after(opt, [{old: uniform(i)} for i in range(50)])
    opt.add_param_group({"params": [new]})
    both = [{old: uniform(i), new: uniform(100 + i)} for i in range(50, 58)]
    factor = factors_after(opt, both[:1])
    assert factor[old].mean().item() == pytest.approx(1, abs=0.05)
    assert factor[new].mean().item() == pytest.approx(1, abs=0.05)
    factor = factors_after(opt, both[1:])
    assert factor[old].mean().item() == pytest.approx(1, abs=0.03)


def test_a_parameter_without_a_gradient_yet_does_not_count():
    p, q = parameters(1000, 1000)
    opt = SoftIRE(torch.optim.SGD([p, q], lr=0.0))
    factors_after(opt, [{p: torch.zeros(1000), q: torch.zeros(1000)}])  # as DCP makes state
    assert opt.counts[p] == opt.counts[q] == 0 and opt.param_groups[0]["ire_step"] == 0
    q.grad = None
    factor = factors_after(opt, [{p: uniform(0)}])
    assert (factor[q] == 1).all() and factor[p].std() > 0.05
    assert factor[p].mean().item() == pytest.approx(1, abs=1e-5)


def test_a_closure_that_is_called_twice_counts_once():
    (p,) = parameters(3)
    opt = SoftIRE(SAM(torch.optim.SGD([p], 0.0), rho=1.0), beta=0.5)

    def closure():
        p.grad = 1 + p.detach()  # elsewhere it is another
        return p.sum()

    opt.step(closure)
    assert torch.equal(opt.squares[p], torch.full((3,), 0.5)) and opt.counts[p] == 1


def test_hooks_run_once_a_step_beside_an_ire():
    IRE(torch.optim.SGD(parameters(1), 0.1), kappa=1, gamma=0.5)
    (p,) = parameters(3)
    opt = SoftIRE(torch.optim.SGD([p], 0.1))
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    factors_after(opt, [{p: torch.ones(3)}] * 2)
    assert calls == ["before", "after"] * 2


def test_a_grown_parameter_begins_anew_also_without_a_gradient():
    p, q = parameters(4, 4)
    opt = SoftIRE(torch.optim.SGD([p, q], 0.1))
    factors_after(opt, [{p: uniform(i, 4), q: uniform(i, 4)} for i in range(10)])
    p.data = torch.ones(7)
    p.grad = None
    factors_after(opt, [{q: uniform(0, 4)}])
    assert p not in opt.masks and p not in opt.squares and q in opt.squares
    SoftIRE(torch.optim.SGD([p, q], 0.1)).load_state_dict(opt.state_dict())


def test_complex_parameters():
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    grad = torch.tensor([1 + 1j, 2 - 2j, 3j])
    for curvature in ("squares", "second_moment"):
        opt = SoftIRE(torch.optim.Adam([p], 0.1, betas=(0.9, 0.98)), curvature=curvature)
        factor = factors_after(opt, [{p: grad}])[p]
        assert factor.dtype == torch.float32 and factor[0] > factor[1:].max()


def test_a_refused_step_changes_nothing():
    (p,) = parameters(3)
    opt = SoftIRE(torch.optim.SGD([p], 0.1))
    factors_after(opt, [{p: torch.ones(3)}])
    before = (p.clone(), opt.squares[p].clone(), opt.counts[p].clone())
    opt.param_groups[0]["kappa"] = 2
    with pytest.raises(ValueError, match="kappa: got 2"):
        opt.step()
    assert same(before, (p, opt.squares[p], opt.counts[p]))


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
        with pytest.raises(ValueError, match="base: got SoftIRE") as error:
            wrap(opt)
        assert "\n" not in str(error.value)
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
