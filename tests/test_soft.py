"""SoftIRE against its definition, and what it does with gradients that are late, huge or not
numbers. What it shares with IRE: test_ire.py."""

import warnings

import pytest
import torch
import torch.nn as nn
from training import by_curvature, equal

from ire import SAM, SoftIRE, hidden_matrices

BASES = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, betas=(0.9, 0.98)),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.down = nn.Linear(5, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.norm(self.up(x))))


class Net(nn.Module):
    """The outline of a transformer: an embedding, of which one row is not used, blocks, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 9, bias=False)
        self.double()

    def loss(self, step):
        g = torch.Generator().manual_seed(step)
        x = torch.randint(8, (16,), generator=g)
        y = torch.randint(8, (16,), generator=g)
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return nn.functional.cross_entropy(self.head(h), y)


def train(net, opt, steps):
    for step in steps:
        opt.zero_grad()
        net.loss(step).backward()
        opt.step()
    return [p.detach().clone() for p in net.parameters()]


# ---------------------------------------------------------------- the definition
def written_out(net, base, params, steps, *, alpha, limit, beta, interval, warmup):
    v = [torch.zeros_like(p) for p in params]
    factors = None
    for step in steps:
        base.zero_grad()
        net.loss(step).backward()
        v = [beta * x + (1 - beta) * p.grad**2 for x, p in zip(v, params)]
        old = [p.detach().clone() for p in params]
        base.step()
        if step >= warmup and (step - warmup) % interval == 0:
            live = torch.cat([x[x > 0] for x in v])
            median = live.sort().values[(len(live) - 1) // 2]
            raw = [((x / median) ** -alpha).clamp(1 / limit, limit) for x in v]
            mean = torch.cat([r[x > 0] for r, x in zip(raw, v)]).mean()
            factors = [(r / mean).where(x > 0, 1) for r, x in zip(raw, v)]
        if factors:
            for p, before, f in zip(params, old, factors):
                p.data = before + f * (p.data - before)
    return [p.detach().clone() for p in net.parameters()]


DEFINITIONS = [
    {"alpha": 0.3, "limit": 4.0, "beta": 0.98, "interval": 10, "warmup": 0},
    {"alpha": 0.7, "limit": 2.0, "beta": 0.98, "interval": 3, "warmup": 4},
    {"alpha": 1.0, "limit": 1.5, "beta": 0.98, "interval": 1, "warmup": 0},
]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("settings", DEFINITIONS)
@pytest.mark.parametrize("which", ["matrices", "hidden", "all"])
def test_it_is_its_definition(base, settings, which):
    """By default it takes all parameters of two or more dimensions. Unused rows do not count."""
    expected, net = Net(), Net()

    def chosen(net):
        if which == "hidden":
            return hidden_matrices(net)
        return [p for p in net.parameters() if which == "all" or p.dim() >= 2]

    weights = written_out(
        expected, BASES[base](expected.parameters()), chosen(expected), range(25), **settings
    )
    params = None if which == "matrices" else chosen(net)
    opt = SoftIRE(BASES[base](net.parameters()), params=params, **settings)
    for p, q in zip(train(net, opt, range(25)), weights):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert set(opt.masks) == set(chosen(net))


def test_the_fisher_curvature_of_a_probe_at_any_scale_of_the_loss():
    p, q = parameters(40, 60)
    h = {p: uniform(0, 40), q: uniform(1, 60) ** 3}
    square = torch.cat([x.flatten() for x in h.values()]) ** 2
    raw = (square / square.sort().values[49]) ** -0.5
    raw = raw.clamp(0.5, 2)
    for scale in (1e-25, 1, 1e25):  # float32 does not hold all the squares
        opt = SoftIRE(torch.optim.SGD([p, q], 0.0), alpha=0.5, limit=2.0, curvature="fisher")
        by_curvature(opt, {x: scale * g for x, g in h.items()})
        factor = torch.cat([1 + opt.masks[x].flatten() for x in h])
        torch.testing.assert_close(factor, raw / raw.mean())


# ---------------------------------------------------------------- which parameters
def test_hidden_matrices_are_those_of_the_blocks():
    embed, head, tied = nn.Embedding(9, 6), nn.Linear(6, 9), nn.Linear(6, 9)
    tied.weight = embed.weight
    blocks = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)) for _ in range(2)]
    expected = [id(block[i].weight) for block in blocks for i in (0, 2)]
    layers = nn.ModuleList(blocks)
    others = nn.ModuleList([embed, *blocks, nn.Conv2d(1, 1, 3)])
    for model in (
        nn.Sequential(embed, *blocks, head),
        nn.ModuleDict({"embed": embed, "layers": layers, "head": head}),
        nn.ModuleDict({"embed": embed, "layers": layers, "head": tied}),
        nn.ModuleDict({"layers": others, "head": head}),
    ):
        assert [id(p) for p in hidden_matrices(model)] == expected
    head_first = nn.ModuleDict({"head": head, "layers": nn.Sequential(Block(), Block())})
    assert len(hidden_matrices(head_first)) == 4
    with pytest.raises(ValueError, match="has no matrices in an nn.ModuleList"):
        hidden_matrices(nn.Linear(2, 3))


def test_groups_with_kappa_0_are_left_out_as_with_params():
    one, two = Net(), Net()
    hidden = set(hidden_matrices(one))
    groups = [
        {"params": [p for p in one.parameters() if p in hidden]},
        {"params": [p for p in one.parameters() if p not in hidden], "kappa": 0.0},
    ]
    train(one, SoftIRE(torch.optim.SGD(groups, 0.1)), range(12))
    opt = SoftIRE(torch.optim.SGD(two.parameters(), 0.1), params=hidden_matrices(two))
    train(two, opt, range(12))
    assert equal(one.parameters(), two.parameters())
    assert set(opt.masks) == set(hidden_matrices(two))


def test_kappa_takes_a_part_of_the_factors():
    nets = {kappa: Net() for kappa in (0.0, 0.5, 1.0)}
    for kappa, net in nets.items():
        train(net, SoftIRE(torch.optim.SGD(net.parameters(), 0.1), kappa=kappa), range(1))
    base, half, full = (net.head.weight for net in nets.values())
    torch.testing.assert_close(half, (base + full) / 2)
    assert not torch.equal(base, full)


# ---------------------------------------------------------------- hostile gradients
def parameters(*sizes):
    """Columns: by default SoftIRE takes matrices."""
    return [nn.Parameter(torch.zeros(n, 1)) for n in sizes]


def uniform(seed, n=1000):
    return 1 + torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))


def factors_after(opt, grads):
    """1 + masks after steps whose gradients are given, {p: gradient} each."""
    for step in grads:
        for p, grad in step.items():
            p.grad = grad
        opt.step()
    return {p: 1 + mask for p, mask in opt.masks.items()}


def test_a_second_moment_that_is_not_a_number_is_sharp():
    p, q = parameters(4, 1)
    opt = SoftIRE(torch.optim.Adam([p, q], 0.01), interval=1)
    factors_after(opt, [{p: torch.arange(1.0, 5.0)[:, None], q: torch.ones(1, 1)}])
    opt.state[p]["exp_avg_sq"][0] = float("nan")
    factor = factors_after(opt, [{}])
    assert all(x.isfinite().all() for x in factor.values()) and q.isfinite().all()
    assert factor[p][0] == factor[p].min()


@pytest.mark.parametrize("wrong", (float("inf"), float("nan"), 1e30))
def test_a_step_that_the_base_skips_leaves_no_trace_of_its_gradient(wrong):
    (p,) = parameters(4)
    opt = SoftIRE(SAM(torch.optim.SGD([p], 0.01)), interval=2)
    for step in range(8):

        def closure():
            p.grad = torch.arange(1.0, 5.0)[:, None].clone()
            if step == 3:
                p.grad[0] = wrong
            return p.sum()

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step(closure)
        assert [str(w.message)[:12] for w in caught] == ["SAM: skipped"] * (step == 3)
    factor = 1 + opt.masks[p].flatten()
    assert p.isfinite().all() and (factor[:-1] > factor[1:]).all()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_parameter_that_joins_later_is_not_flat_for_that(cls):
    old, new = parameters(1000, 1000)
    opt = SoftIRE(cls([old], 0.01), interval=5)
    factors_after(opt, [{old: uniform(i)} for i in range(50)])
    opt.add_param_group({"params": [new]})
    both = [{old: uniform(i), new: uniform(100 + i)} for i in range(50, 58)]
    for steps in (both[:1], both[1:]):
        factor = factors_after(opt, steps)
        assert factor[old].mean().item() == pytest.approx(1, abs=0.05)
        assert factor[new].mean().item() == pytest.approx(1, abs=0.05)


def test_low_precision():
    net = Net().to(torch.bfloat16)
    opt = SoftIRE(torch.optim.SGD(net.parameters(), 0.1))
    train(net, opt, range(12))
    mask = opt.masks[net.head.weight]
    assert mask.dtype == torch.float32 and mask.std() > 0 and opt.flat_share() == {}
    assert all(p.isfinite().all() for p in net.parameters())


# ---------------------------------------------------------------- bad input
def test_params_that_the_base_does_not_have_and_vectors_alone_are_refused():
    net = Net()
    vectors = [p for p in net.parameters() if p.dim() == 1]
    for base, params in ((net.head.parameters(), hidden_matrices(net)), (vectors, None)):
        with pytest.raises(ValueError, match="params: some are not in the base, or there are none"):
            SoftIRE(torch.optim.SGD(base, 0.1), params=params)


def test_params_that_were_replaced_are_an_error_in_the_next_step():
    net = Net()
    base = torch.optim.SGD(net.parameters(), 0.1)
    opt = SoftIRE(base, params=hidden_matrices(net))
    base.param_groups[0]["params"] = list(Net().parameters())
    with pytest.raises(ValueError, match="params: some are not in the base"):
        opt.step()
