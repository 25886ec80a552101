"""Situations that users of such optimizers report, of which none may go wrong in silence: each is
mended, and the right value stands here, or refused in one line. Those on ranks: test_ranks.py."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import SGD, AdamW

import ire
from ire import (
    IRE,
    SAM,
    SAMIRE,
    SGDIRE,
    AdmIRE,
    kth_smallest,
    sampled_binary_cross_entropy,
    sampled_cross_entropy,
)

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def make_model(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *extra, nn.Tanh(), nn.Linear(8, 3))


def backward(model):
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    return loss


def train(model, opt, steps, probed=()):
    """Probes with the modules `probed`, zeroes gradients after the step; the weights at its end."""
    for _ in range(steps):
        if getattr(opt, "probe_due", False):
            with opt.probe(*probed):
                sampled_cross_entropy(model(X)).backward()
        backward(model)
        opt.step()
        opt.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- T2: what a base saves
class Counting(SGD):
    """Saves a counter beside its state, and refuses to load without it."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "count"})


class OwnFormat(Counting):
    """Saves in a form of its own, as Lookahead does."""

    def state_dict(self):
        return {"inner": super().state_dict()}

    def load_state_dict(self, state_dict):
        assert state_dict.keys() == {"inner"}
        super().load_state_dict(state_dict["inner"])


class Named(SGD):
    """Keeps a number under a name in its state, as MADGRAD does."""

    def step(self, closure=None):
        self.state["k"] = self.state.get("k", torch.tensor(0)) + 1
        return super().step(closure)


@pytest.mark.parametrize("base", [Counting, OwnFormat, Named])
def test_what_the_base_saves_of_its_own_survives(base):
    model = make_model()
    opt = IRE(base(model.parameters(), lr=0.1, momentum=0.9), kappa=1, gamma=0.5, interval=2)
    train(model, opt, 3)
    other = copy.deepcopy(model)
    again = IRE(base(other.parameters(), lr=0.1, momentum=0.9), kappa=1, gamma=0.5, interval=2)
    saved = opt.state_dict()
    again.load_state_dict(copy.deepcopy(saved))
    assert saved["state"][0]["flat"] is opt.masks[model[0].weight]
    assert getattr(again.base, "count", 3) == 3
    assert base is not Named or again.state["k"] == 3
    if base is OwnFormat:  # the settings, and so the counter, are the base's own to save
        again.param_groups[0].update(ire_step=3, ire_probed=2)
    assert equal(opt.masks.values(), again.masks.values())
    assert equal(train(model, opt, 4), train(other, again, 4))


def test_a_mask_of_another_shape_is_refused_at_load():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
    train(model, opt, 1)
    saved = opt.state_dict()
    saved["state"][1] = {"flat": torch.ones(1, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"flat: got \(1,\), allowed is of \(8,\)"):
        opt.load_state_dict(saved)


# ---------------------------------------------------------------- T3: settings
def test_a_base_with_a_setting_of_our_name_is_refused():
    params = list(make_model().parameters())

    class Kappa(SGD):
        def __init__(self, params):
            super().__init__(params, 0.1)
            self.defaults["kappa"] = 3

    for wrap in (
        lambda: SAM(torch.optim.Adadelta(params), rho=0.05),
        lambda: SAMIRE(params, torch.optim.Adadelta, rho=0.05, kappa=1, gamma=0.5),
        lambda: IRE(Kappa(params), kappa=1, gamma=0.5),
    ):
        with pytest.raises(ValueError, match="(rho|kappa): got .* has a setting of this name"):
            wrap()


def test_wrapped_again_the_latest_settings_hold_and_the_groups_own_stay():
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "kappa": 0}]
    base = AdamW(groups, 0.01)
    first = IRE(base, kappa=2, gamma=0.6)
    train(model, first, 3)
    second = IRE(base, kappa=5, gamma=0.9)
    assert [group["kappa"] for group in base.param_groups] == [5, 0]
    assert [group["gamma"] for group in base.param_groups] == [0.9, 0.9]
    assert second.probe_due and second.param_groups[0]["ire_step"] == 0 and not second.masks
    loaded = AdamW(model.parameters(), 0.01)
    loaded.load_state_dict(AdmIRE(model.parameters(), 0.01, kappa=2, gamma=0.6).state_dict())
    assert IRE(loaded, kappa=3, gamma=0.5).param_groups[0]["kappa"] == 3
    sam = SAM(SAM(base, rho=0.1).base, rho=0.3)
    assert [group["rho"] for group in sam.param_groups] == [0.3, 0.3]


@pytest.mark.parametrize("name, value", [("kappa", float("nan")), ("kappa", -1), ("gamma", 1.5)])
def test_settings_changed_to_nonsense_are_refused_before_anything_moves(name, value):
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
    before = train(model, opt, 2)
    opt.param_groups[0][name] = value
    backward(model)
    with pytest.raises(ValueError, match=f"{name}: got {value}, allowed"):
        opt.step()
    assert equal(before, model.parameters())


# ---------------------------------------------------------------- T4, T21: second moments
def adafactor(params):
    from transformers import Adafactor

    # A base of the Adam family by its settings, whose moments of matrices are factors.
    base = Adafactor(params, lr=0.01, relative_step=False, scale_parameter=False)
    base.defaults.setdefault("beta1", None)
    return base


class OfAnotherShape(AdamW):
    def step(self, closure=None):
        super().step(closure)
        for entry in self.state.values():
            entry["exp_avg_sq"] = entry["exp_avg_sq"][:1]


class Rotated(AdamW):
    def step(self, closure=None):
        super().step(closure)
        for entry in self.state.values():
            entry["Q"] = []


@pytest.mark.parametrize("base", [adafactor, torch.optim.Adamax, OfAnotherShape, Rotated])
def test_second_moment_is_refused_at_the_first_step_where_it_is_not_one_a_coordinate(base):
    model = make_model()
    opt = IRE(base(model.parameters()), kappa=1, gamma=0.5, warmup=5, curvature="second_moment")
    backward(model)
    with pytest.raises(ValueError, match="second_moment of a parameter .* got .*exp_avg_sq"):
        opt.step()


def test_second_moment_where_a_group_without_it_has_kappa_0():
    class Mixed(AdamW):
        """Keeps no second moment of matrices."""

        def step(self, closure=None):
            super().step(closure)
            for p, entry in self.state.items():
                if p.dim() == 2:
                    entry["v"] = entry.pop("exp_avg_sq", entry.get("v"))

    model = make_model()
    matrices = {"params": [model[0].weight, model[2].weight], "kappa": 0, "foreach": False}
    vectors = {"params": [model[0].bias, model[2].bias]}
    base = Mixed([matrices, vectors], 0.01)
    opt = IRE(base, kappa=1, gamma=0.5, curvature="second_moment")
    backward(model)
    opt.step()
    assert [int(opt.masks[p].sum()) for p in model.parameters()] == [
        0,
        *map(int, _flat(opt, model)),
    ]


def _flat(opt, model):
    """Counts of the vectors, ranked alone, with the matrices' zeros between."""
    v = torch.cat([opt.state[p]["exp_avg_sq"] for p in (model[0].bias, model[2].bias)])
    threshold = v.sort().values[len(v) // 2 - 1]
    first, second = (
        (opt.state[p]["exp_avg_sq"] <= threshold).sum() for p in (model[0].bias, model[2].bias)
    )
    return first, 0, second


# ---------------------------------------------------------------- T5, T10: where the probe is
@pytest.mark.parametrize("make", [lambda p: AdamW(p, 0.01), lambda p: SAM(SGD(p, 0.1))])
def test_a_probe_inside_the_closure_counts(make):
    def run(inside):
        model = make_model()
        opt = IRE(make(model.parameters()), kappa=2, gamma=0.5, interval=2)

        def probe():
            if opt.probe_due:
                with opt.probe(model):
                    sampled_cross_entropy(model(X)).backward()

        def closure():
            if inside:
                probe()
            opt.zero_grad()
            return backward(model)

        for _ in range(5):
            if not inside:
                probe()
            opt.step(closure)
        return [*model.parameters(), *opt.masks.values()]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(run(True), run(False))


def test_a_step_while_the_probe_is_open_is_refused():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
    for p in model.parameters():  # an optimizer in the backward pass
        p.register_post_accumulate_grad_hook(lambda p: opt.step())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="a step inside its own probe"), opt.probe():
        sampled_cross_entropy(model(X)).backward()
    assert equal(before, model.parameters()) and not opt.masks and opt.probe_due


# ---------------------------------------------------------------- T7, T8: the probe's loss
def test_one_class_and_unclear_dimensions_are_refused():
    for logits in (torch.randn(5, 1), torch.randn(2, 3, 1)):
        with pytest.raises(ValueError, match="logits: got .* two classes or more; yes/no outputs"):
            sampled_cross_entropy(logits)
    for logits in (torch.randn(7), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 8, 8)):
        with pytest.raises(ValueError, match="dim: got None, allowed is the dimension of the"):
            sampled_cross_entropy(logits)


def test_segmentation_logits_by_dim():
    logits = torch.randn(2, 3, 5, 4, requires_grad=True)
    ignore = torch.zeros(2, 5, 4, dtype=torch.bool)
    ignore[0, :2] = True
    losses = []
    for x, dim in ((logits, 1), (logits.movedim(1, -1).contiguous(), -1)):
        g = torch.Generator().manual_seed(1)
        losses.append(sampled_cross_entropy(x, generator=g, ignore=ignore, dim=dim))
    assert losses[0].isfinite()
    losses[0].backward()
    assert (logits.grad[0, :, :2] == 0).all()
    one = (logits.grad < 0).sum(1)  # the gradient is negative at the label alone
    assert (one[~ignore] == 1).all()


def test_yes_or_no_outputs():
    logits = torch.tensor([-2.0, 0.0, 1.0]).expand(20000, 3).clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    loss = sampled_binary_cross_entropy(logits, generator=generator)
    loss.backward()
    p = torch.tensor([-2.0, 0.0, 1.0]).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert loss.item() == pytest.approx(float(entropy), abs=0.02)
    torch.testing.assert_close((logits.grad < 0).float().mean(0), p, atol=0.02, rtol=0)
    assert sampled_binary_cross_entropy(torch.full((3, 4), torch.nan)).isnan()
    assert sampled_binary_cross_entropy(torch.randn(6, 4, dtype=torch.bfloat16)).isfinite()


def test_a_curvature_of_0_everywhere_warns_and_amplifies_nothing():
    one, two = make_model(), make_model()
    plain = train(one, SGD(one.parameters(), 0.1), 3)
    opt = SGDIRE(two.parameters(), 0.1, kappa=5, gamma=0.5, interval=1)
    with pytest.warns(UserWarning, match="the curvature is 0 everywhere"):
        for _ in range(3):
            with opt.probe(two):
                (sampled_cross_entropy(two(X)) * 0).backward()
            backward(two)
            opt.step()
            opt.zero_grad()
    assert equal(plain, two.parameters())


def test_a_curvature_that_is_nan_everywhere_warns():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=5, gamma=0.5, interval=1)
    with pytest.warns(UserWarning, match="more than 0.5 of the curvature is not finite"):
        with opt.probe(model):
            (sampled_cross_entropy(model(X)) * torch.nan).backward()
    assert not any(mask.any() for mask in opt.masks.values())


# ---------------------------------------------------------------- T11 to T13: what a probe moves
class Counter(nn.Module):
    """Buffers of three habits: changed in place, through .data, and replaced."""

    def __init__(self):
        super().__init__()
        for name in ("one", "two", "three"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x):
        self.one += 1
        self.two.data.add_(1)
        self.three = self.three + 1
        return x * (1 + 0.1 * self.one + 0.1 * self.two + 0.1 * self.three)


def spectral(*sizes):
    return nn.utils.parametrizations.spectral_norm(nn.Linear(*sizes))


@pytest.mark.parametrize(
    "extra",
    [
        lambda: nn.BatchNorm1d(8),
        lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
        lambda: spectral(8, 8),
        lambda: nn.Dropout(0.5),
        Counter,
    ],
)
@pytest.mark.parametrize("head_alone", [False, True])
def test_a_probe_of_the_model_leaves_all_of_it_alone(extra, head_alone):
    """At kappa 0 the run is the base's to the bit, also where zero_grad comes after the step and
    another optimizer, or none, has the other parameters."""

    def run(wrap):
        torch.manual_seed(2)
        model = make_model(extra())
        trained = model[-1] if head_alone else model
        opt = wrap(AdamW(trained.parameters(), 0.01))
        other = SGD(model[0].parameters(), 0.1) if head_alone else SGD([torch.zeros(1)], 0.1)
        torch.manual_seed(1)
        for _ in range(8):
            if getattr(opt, "probe_due", False):
                with opt.probe(model):
                    sampled_cross_entropy(model(X)).backward()
            backward(model)
            for o in (opt, other):
                o.step()
                o.zero_grad()
        return [*model.parameters(), *model.buffers()]

    wrapped = run(lambda base: IRE(base, kappa=0, gamma=0.5, interval=2))
    assert equal(run(lambda base: base), wrapped)


def test_several_modules_and_two_optimizers_over_one_model():
    model = make_model(nn.BatchNorm1d(8))
    for probe in (lambda o: o.probe([model[0], model[1], model[3]]), lambda o: o.probe(*model)):
        one = SGDIRE(model[0].parameters(), 0.1, kappa=1, gamma=0.5)
        two = SGDIRE(model[3].parameters(), 0.1, kappa=1, gamma=0.25)
        backward(model)
        before = [*(p.grad.clone() for p in model.parameters()), *map(torch.clone, model.buffers())]
        with probe(one), probe(two):
            sampled_cross_entropy(model(X)).backward()
        assert equal(before, [*(p.grad for p in model.parameters()), *model.buffers()])
        assert sum(mask.sum() for mask in one.masks.values()) == 20
        assert sum(mask.sum() for mask in two.masks.values()) == 6
    with pytest.raises(
        ValueError, match="model: got 'net', allowed is a torch.nn.Module or several"
    ):
        with one.probe("net"):
            pass
    assert one.step() is None


def test_a_graph_from_before_the_probe_still_runs():
    """One forward pass for both losses, through buffers that the graph holds."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.full((8,), 2.0))

        def forward(self, x):
            return x * self.scale

    model = make_model(Scaled())
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
    logits = model(X)
    with opt.probe(model):
        sampled_cross_entropy(logits).backward(retain_graph=True)
    F.cross_entropy(logits, Y).backward()
    opt.step()


def test_the_random_streams_of_all_devices_come_back(monkeypatch):
    class Device:
        """A device with two random streams, which torch's tools find under the name xpu."""

        states = [torch.tensor([1]), torch.tensor([2])]
        is_initialized = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 2)
        get_rng_state = classmethod(lambda cls, device: cls.states[device].clone())

        @classmethod
        def set_rng_state(cls, state, device):
            cls.states[device] = state

        @classmethod
        def manual_seed_all(cls, seed):
            cls.states = [torch.tensor([seed]), torch.tensor([seed])]

    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
    monkeypatch.setattr(torch, "xpu", Device)
    before = torch.get_rng_state()
    with opt.probe(model):
        assert Device.states[0] == Device.states[1] != torch.tensor([1])
        torch.rand(3)
        sampled_cross_entropy(model(X)).backward()
    assert torch.equal(before, torch.get_rng_state())
    assert [int(state) for state in Device.states] == [1, 2]


def test_a_probe_wakes_up_no_device():
    """torch.manual_seed would queue a seed for CUDA, which then starts from the probe's."""
    calls = torch.cuda._queued_calls if hasattr(torch.cuda, "_queued_calls") else []
    before = len(calls)
    opt = SGDIRE(make_model().parameters(), 0.1, kappa=1, gamma=0.5)
    train(make_model(), opt, 0)
    model = make_model()
    before = len(calls)
    train(model, SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5), 2)
    assert len(calls) == before and not torch.cuda.is_initialized()


# ---------------------------------------------------------------- T14 to T17: parameters
def test_a_model_over_two_devices():
    """The meta device stands for the second one: it has shapes and no values."""
    params = [nn.Parameter(torch.ones(6, device=d)) for d in ("cpu", "meta", "cpu")]
    opt = IRE(SGD(params, 0.1, foreach=False), kappa=1, gamma=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
        opt.masks[p] = torch.ones_like(p, dtype=torch.bool)
    opt.step()
    assert params[0].tolist() == params[2].tolist() == [pytest.approx(0.8)] * 6
    assert ire._added(ire._square(p) for p in params[1:]).device.type == "meta"


def test_batches_are_of_one_device_and_dtype():
    tensors = [torch.ones(3), torch.ones(2, device="meta"), torch.ones(4).half(), torch.ones(5)]
    batches = [[len(x) for x, *_ in batch] for batch in ire._batches(tensors)]
    assert batches == [[3, 5], [2], [4]]


def test_a_parameter_that_grew_is_not_amplified_until_the_next_probe():
    embed = nn.Embedding(5, 2)
    opt = AdmIRE(embed.parameters(), 0.1, kappa=3, gamma=0.5, interval=3)
    rows = torch.arange(5)

    def step(rows):
        if opt.probe_due:
            with opt.probe(embed):
                (embed(rows) * torch.arange(1.0, 3.0)).sum().backward()
        embed(rows).sum().backward()
        opt.step()
        opt.zero_grad()

    step(rows)
    assert opt.masks[embed.weight].any()
    p = embed.weight
    p.data = torch.cat([p.data, torch.zeros(2, 2)])
    for name, value in opt.state[p].items():
        if name != "step":
            opt.state[p][name] = torch.cat([value, torch.zeros(2, 2)])
    before, twin = p.detach().clone(), copy.deepcopy((embed, opt.base))
    step(torch.arange(7))
    twin[0](torch.arange(7)).sum().backward()
    twin[1].step()
    assert torch.equal(p, twin[0].weight) and not torch.equal(before, p)
    assert opt.masks[p].shape == (7, 2) and not opt.masks[p].any()
    step(torch.arange(7)), step(torch.arange(7))
    assert opt.masks[p].sum() == 7


def test_a_base_with_train_and_eval_of_its_own():
    class ScheduleFree(SGD):
        mode = "train"

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    opt = IRE(SAM(ScheduleFree([torch.zeros(1)], 0.1)), kappa=1, gamma=0.5)
    opt.eval()
    assert opt.base.base.mode == "eval"
    opt.train()
    assert opt.base.base.mode == "train"
    plain = SGDIRE([torch.zeros(1)], 0.1, kappa=1, gamma=0.5)
    plain.train(), plain.eval()


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "gaps": lambda x: torch.stack((x, x), -1)[..., 0],
    "rows with gaps": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 4), (900, 700)])  # 630,000 elements are cut in two
def test_layouts_give_the_same_bits(layout, shape):
    def run(lay_out):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        p = nn.Parameter(lay_out(values))
        opt = SGDIRE([p], 0.1, kappa=2, gamma=0.5, interval=2)
        for i in range(3):
            generator = torch.Generator().manual_seed(i)
            grad = torch.randn(shape, generator=generator)
            if opt.probe_due:
                with opt.probe():
                    p.grad = grad.cos()
            p.grad = grad
            opt.step()
        return p.detach(), opt.masks[p]

    assert equal(run(LAYOUTS["contiguous"]), run(LAYOUTS[layout]))
    assert layout == "contiguous" or not run(LAYOUTS[layout])[0].is_contiguous()


def test_memory_laid_out_anew_between_probe_and_step():
    """model.to(memory_format=...) after the mask was made."""

    def run(move):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 5, 3)
        opt = SGDIRE(conv.parameters(), 0.1, kappa=2, gamma=0.5, interval=9)
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        with opt.probe(conv):
            conv(x).square().mean().backward()
        if move:
            conv.to(memory_format=torch.channels_last)
        for p in conv.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        return list(conv.parameters())

    assert equal(run(False), run(True))


def test_the_path_of_gpus_counts_alike(monkeypatch):
    """On a GPU digits are counted without torch.bincount, which waits for the device."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) ** 9
    x[:2000] = 0
    expected = x.abs().sort().values
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for values in (x, x.double()):
        for k in (1, 2000, 2001, 3500, 5000):
            assert kth_smallest([values], k) == expected[k - 1]
    assert ire._kth_and_zeros([x], 3)[1] == 2000


# ---------------------------------------------------------------- T19, T22, T23: what it says
def test_the_share_among_live_coordinates():
    p, q = nn.Parameter(torch.ones(80)), nn.Parameter(torch.ones(20))
    opt = SGDIRE([p, q], 0.1, kappa=1, gamma=0.6)
    assert opt.flat_share() == {}
    with opt.probe():
        p.grad = torch.cat([torch.zeros(58), torch.ones(22)]) * torch.arange(80)
        q.grad = torch.arange(1.0, 21)
    assert opt.flat_share() == {"flat": 0.6, "flat_live": pytest.approx(2 / 42)}
    again = SGDIRE([p, q], 0.1, kappa=1, gamma=0.6)
    again.load_state_dict(opt.state_dict())
    assert again.flat_share() == opt.flat_share()


def test_a_missing_probe_says_what_it_means_and_is_said_again():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5, interval=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            backward(model)
            opt.step()
    said = [str(w.message) for w in caught]
    assert said == [
        f"IRE: no probe before step {step}, {step + 1} missed so far: nothing was amplified"
        for step in (0, 9)
    ]
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5, interval=1)
    train(model, opt, 2)
    backward(model)
    with pytest.warns(UserWarning, match="no probe before step 2.*the mask of step 1 goes on"):
        opt.step()


def test_repr_has_all_settings():
    text = repr(AdmIRE(make_model().parameters(), 0.1, kappa=2, gamma=0.6, interval=7, warmup=3))
    for setting in ("kappa: 2", "gamma: 0.6", "interval: 7", "warmup: 3", "curvature: fisher"):
        assert setting in text


def test_a_factor_that_is_neither_0_nor_1():
    """The seam for other forms of the idea: masks may hold numbers."""
    p = nn.Parameter(torch.zeros(3))
    opt = SGDIRE([p], 1.0, kappa=2, gamma=0.5, interval=9)
    with opt.probe():
        p.grad = torch.tensor([1.0, 2.0, 3.0])
    opt.masks[p] = torch.tensor([0.0, 0.25, -0.5])
    p.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [-1, -1.5, 0]
