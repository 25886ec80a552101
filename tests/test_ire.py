"""What IRE, SAM and the helpers do beside the arithmetic, which test_oracle.py checks."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import SGD, AdamW

from ire import (
    IRE,
    SAM,
    SAMIRE,
    SGDIRE,
    AdmIRE,
    frozen_batch_norm,
    sampled_cross_entropy,
    sampled_mse,
)

SETTINGS = dict(kappa=2, gamma=0.6, interval=3, warmup=2)


def make_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step, dtype=torch.float32):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, generator=g).to(dtype), torch.randint(3, (16,), generator=g)


def wants_closure(opt):
    return isinstance(opt, SAM) or isinstance(getattr(opt, "base", None), SAM)


def train(
    model,
    opt,
    steps,
    start=0,
    dtype=torch.float32,
    loss=lambda out, y: F.cross_entropy(out.float(), y),
):
    for step in range(start, start + steps):
        x, y = batch(step, dtype)

        def closure():
            opt.zero_grad()
            value = loss(model(x), y)
            value.backward()
            return value

        if getattr(opt, "probe_due", False):
            with opt.probe():
                sampled_cross_entropy(model(x)).backward()
        if wants_closure(opt):
            opt.step(closure)
        else:
            closure()
            opt.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def masks(opt):
    return [opt.masks[p] for group in opt.param_groups for p in group["params"]]


class Lion(torch.optim.Optimizer):
    """A user's optimizer: makes its state when it finds none, looks at nothing else."""

    def __init__(self, params, lr=1e-3, decay=0.9):
        super().__init__(params, dict(lr=lr, decay=decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if len(state) == 0:
                        state["mean"] = torch.zeros_like(p)
                    state["mean"].lerp_(p.grad, 1 - group["decay"])
                    p.sub_(state["mean"].sign(), alpha=group["lr"])


BASES = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw plain": lambda p: AdamW(p, 0.01, eps=1e-5, foreach=False),
    "adamw foreach": lambda p: AdamW(p, 0.01, eps=1e-5, foreach=True),
    "adamw fused": lambda p: AdamW(p, 0.01, fused=True),
    "adamw amsgrad": lambda p: AdamW(p, 0.01, eps=1e-5, amsgrad=True),
    "lion": lambda p: Lion(p),
    "sam": lambda p: SAM(AdamW(p, 0.01, eps=1e-5), rho=0.1),
    "adaptive sam": lambda p: SAM(SGD(p, 0.1, momentum=0.9), rho=0.1, adaptive=True),
}
each_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


# ------------------------------------------------------------ is it the base?
@each_base
def test_kappa_0_is_the_base_to_the_bit(make):
    """Also with probes, whose dropout, batch norm and labels leave the training alone."""

    def model():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))

    def run(wrap):
        net = model()
        opt = wrap(make(net.parameters()))
        torch.manual_seed(2)
        for step in range(12):
            x, y = batch(step)
            if getattr(opt, "probe_due", False):
                with opt.probe(), frozen_batch_norm(net):
                    sampled_cross_entropy(net(x)).backward()

            def closure():
                opt.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            closure()
            opt.step(closure) if wants_closure(opt) else opt.step()
        return [t.clone() for t in net.state_dict().values()]

    assert equal(run(lambda base: base), run(lambda base: IRE(base, **{**SETTINGS, "kappa": 0})))


@each_base
def test_before_warmup_and_without_a_probe_it_is_the_base(make):
    one, two, three = make_model(), make_model(), make_model()
    expected = train(one, make(one.parameters()), 8)
    assert equal(expected, train(two, IRE(make(two.parameters()), kappa=5, gamma=0.5, warmup=8), 8))
    opt = IRE(make(three.parameters()), kappa=5, gamma=0.5, warmup=2)
    opt.__class__ = type("Unprobed", (IRE,), {"probe_due": property(lambda self: False)})
    assert equal(expected, train(three, opt, 8))


@each_base
def test_flat_coordinates_move_1_plus_kappa_times_as_far_and_sharp_ones_as_the_base(make):
    model = make_model()
    opt = IRE(make(model.parameters()), **SETTINGS)
    train(model, opt, 4)
    twin, twin_opt = copy.deepcopy((model, opt))
    base = twin_opt.base
    start, flat = [p.detach().clone() for p in model.parameters()], masks(opt)
    assert sum(f.sum() for f in flat) == math.floor(0.6 * 67)
    there, plain = train(model, opt, 1, start=4), train(twin, base, 1, start=4)
    for s, t, b, f in zip(start, there, plain, flat):
        assert torch.equal(t[~f], b[~f])
        torch.testing.assert_close(t[f] - s[f], 3 * (b[f] - s[f]), rtol=1e-4, atol=1e-6)


def test_kappa_and_gamma_by_group_and_changed_mid_run():
    model = make_model()
    groups = [
        {"params": model[0].parameters(), "kappa": 0},
        {"params": model[2].parameters(), "gamma": 0.25},
    ]
    opt = IRE(SGD(groups, 0.1), **SETTINGS)
    train(model, opt, 4)
    assert sum(f.sum() for f in masks(opt)[:2]) == math.floor(
        0.6 * 40
    )  # ranked apart, as gamma differs
    assert sum(f.sum() for f in masks(opt)[2:]) == math.floor(0.25 * 27)
    twin = copy.deepcopy(model)
    plain = train(twin, SGD(twin.parameters(), 0.1), 1, start=4)
    moved = train(model, opt, 1, start=4)
    assert equal(plain[:2], moved[:2]) and not equal(plain[2:], moved[2:])
    for group in opt.param_groups:
        group["kappa"], group["lr"] = 0, 0.0
    assert equal(moved, train(model, opt, 3, start=5))


# ------------------------------------------------------------ the mask
def test_mask_is_the_floor_of_gamma_n_smallest_over_the_whole_model():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.29, interval=1)
    x, _ = batch(0)
    with opt.probe():
        sampled_cross_entropy(model(x), generator=torch.Generator().manual_seed(3)).backward()
        grads = [p.grad.clone() for p in model.parameters()]
    h = torch.cat([g.abs().flatten() for g in grads])
    threshold = h.sort().values[math.floor(0.29 * 67) - 1]
    assert equal(masks(opt), [g.abs() <= threshold for g in grads])
    assert all(
        m.dtype == torch.bool and m.shape == p.shape for m, p in zip(masks(opt), model.parameters())
    )


@pytest.mark.parametrize(
    "gamma, n, k",
    [(0.29, 100, 29), (0.57, 100, 57), (1e-9, 100, 0), (0.999, 100, 99), (0.1, 10, 1)],
)
def test_floor_of_gamma_n_is_that_of_the_decimal(gamma, n, k):
    p = nn.Parameter(torch.ones(n))
    opt = SGDIRE([p], 0.1, kappa=1, gamma=gamma)
    with opt.probe():
        (p * torch.arange(1, n + 1)).sum().backward()
    assert opt.masks[p].sum() == k and opt.masks[p][:k].all()


def test_ties_at_the_threshold_are_flat():
    p = nn.Parameter(torch.ones(10))
    opt = SGDIRE([p], 0.1, kappa=1, gamma=0.6)
    with opt.probe():
        p[9:].sum().backward()
    assert opt.masks[p].tolist() == [True] * 9 + [False]


@pytest.mark.parametrize(
    "dtype, small", [(torch.float32, 1e-25), (torch.float16, 1e-4), (torch.bfloat16, 1e-25)]
)
def test_curvatures_whose_squares_underflow_are_still_ranked(dtype, small):
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    opt = SGDIRE([p], 0.1, kappa=1, gamma=0.5)
    with opt.probe():
        p.grad = torch.tensor([4, -1, 3, 2], dtype=dtype) * small
    assert opt.masks[p].tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "values, flat",
    [
        ([math.nan, 1, math.inf, 2, -math.inf], [False, True, False, True, False]),
        ([math.nan] * 5, [False] * 5),
        ([math.inf, 3, 1, 2, 0], [False, True, True, True, True]),
    ],
)
def test_curvature_that_is_not_finite_is_sharp(values, flat):
    p = nn.Parameter(torch.ones(5))
    opt = SGDIRE([p], 0.1, kappa=1, gamma=0.9)
    with opt.probe():
        p.grad = torch.tensor(values)
    assert opt.masks[p].tolist() == flat


@pytest.mark.parametrize("kappa", [1, 5])
def test_a_sharp_coordinate_at_infinity_stays_what_the_base_made_of_it(kappa):
    p = nn.Parameter(torch.ones(4))
    opt = SGDIRE([p], 0.1, kappa=kappa, gamma=0.5)
    with opt.probe():
        p.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    p.grad = torch.tensor([1.0, 1.0, -math.inf, 1.0])
    opt.step()
    torch.testing.assert_close(
        p.detach(), torch.tensor([0.9 - 0.1 * kappa, 0.9 - 0.1 * kappa, math.inf, 0.9])
    )


def test_float64_threshold_is_not_rounded():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = SGDIRE([p], 0.1, kappa=1, gamma=0.4)
    with opt.probe():
        p.grad = torch.tensor([1 + 1e-12, 1, 1 + 2e-12], dtype=torch.float64)
    assert opt.masks[p].tolist() == [False, True, False]


def test_second_moment_follows_exp_avg_sq_without_probes():
    model = make_model()
    opt = AdmIRE(model.parameters(), 0.01, curvature="second_moment", **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 6)  # steps 0..5, the masks are of step 5
    v = torch.cat([opt.state[p]["exp_avg_sq"].flatten() for p in model.parameters()])
    expected = [
        opt.state[p]["exp_avg_sq"] <= v.sort().values[math.floor(0.6 * 67) - 1]
        for p in model.parameters()
    ]
    assert not opt.probe_due and equal(masks(opt), expected)
    train(model, opt, 2, start=6)
    assert equal(masks(opt), expected)


# ------------------------------------------------------------ the probe
def test_probe_due_at_warmup_and_each_interval():
    model = make_model()
    opt = AdmIRE(model.parameters(), 0.01, **SETTINGS)
    due = []
    for step in range(10):
        due.append(opt.probe_due)
        train(model, opt, 1, start=step)
    assert [t for t, d in enumerate(due) if d] == [2, 5, 8]


def test_probe_due_is_false_once_probed_and_true_after_a_failed_probe():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
    with pytest.raises(KeyError), opt.probe():
        raise KeyError("inside")
    assert opt.probe_due and not opt.masks
    with opt.probe():
        sampled_cross_entropy(model(batch(0)[0])).backward()
    assert not opt.probe_due


@pytest.mark.parametrize("fails", [False, True])
def test_training_gradients_come_back_as_they_were(fails):
    model = make_model()
    model[2].bias.grad = None
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    model[2].bias.grad = None
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    try:
        with opt.probe():
            assert all(p.grad is None for p in model.parameters())
            sampled_cross_entropy(model(x)).backward()
            if fails:
                raise RuntimeError("second backward")
    except RuntimeError:
        assert fails
    for p, (grad, values) in zip(model.parameters(), before):
        assert p.grad is grad and (grad is None or torch.equal(grad, values))
    assert (model[0].weight in opt.masks) != fails


def test_backward_passes_in_a_probe_add_up_to_the_large_batch_and_its_scale_is_free():
    x, y = batch(0)
    found = []
    for scale, parts in ((1, 1), (1, 4), (1024, 4)):
        model = make_model(dtype=torch.float64)
        opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
        with opt.probe():
            for a, b in zip(x.double().chunk(parts), y.chunk(parts)):
                (scale * F.cross_entropy(model(a), b) / parts).backward()
        found.append(masks(opt))
    assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_probe_leaves_the_random_stream_but_draws_anew_each_time():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5, interval=1)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        with opt.probe():
            draws.append(torch.rand(3))
            sampled_cross_entropy(model(batch(0)[0])).backward()
        after = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(after, torch.rand(3))
        opt.step()
    assert not torch.equal(*draws)


def test_probe_without_backward_is_an_error():
    opt = SGDIRE(make_model().parameters(), 0.1, kappa=1, gamma=0.5)
    with (
        pytest.raises(ValueError, match=r"no gradient from backward\(\) inside probe"),
        opt.probe(),
    ):
        pass


def test_a_missed_probe_warns_once_and_goes_on():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, kappa=1, gamma=0.5, interval=2)
    with pytest.warns(UserWarning, match="no probe before step 0") as caught:
        for _ in range(5):
            F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
            opt.step()
    assert len(caught) == 1 and caught[0].filename == __file__


def test_two_optimizers_over_one_model_with_nested_probes():
    model = make_model()
    one = SGDIRE(model[0].parameters(), 0.1, kappa=1, gamma=0.5)
    two = AdmIRE(model[2].parameters(), 0.1, kappa=1, gamma=0.25)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with one.probe(), two.probe():
        sampled_cross_entropy(model(batch(0)[0])).backward()
    assert equal(before, [p.grad for p in model.parameters()])
    assert sum(f.sum() for f in masks(one)) == 20 and sum(f.sum() for f in masks(two)) == 6
    one.step(), two.step()


# ------------------------------------------------------------ saving, copying
def reload(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@each_base
@pytest.mark.parametrize("curvature", ["fisher", "second_moment"])
def test_saved_at_any_step_and_resumed_to_the_bit(make, curvature):
    if curvature == "second_moment" and "exp_avg_sq" not in first_state(make):
        pytest.skip("no second moment")
    model = make_model()
    whole = IRE(make(model.parameters()), curvature=curvature, **SETTINGS)
    states = []
    for step in range(10):
        states.append(reload((model.state_dict(), whole.state_dict())))
        train(model, whole, 1, start=step)
    for step, (weights, state) in enumerate(states):
        other = make_model(seed=7)
        other.load_state_dict(weights)
        torch.manual_seed(
            0
        )  # a trainer restores the random state; probes are seeded by it and the step
        opt = IRE(make(other.parameters()), curvature=curvature, **SETTINGS)
        opt.load_state_dict(state)
        assert equal(list(model.parameters()), train(other, opt, 10 - step, start=step))
        assert equal(masks(opt), masks(whole)) and opt.probe_due == whole.probe_due


def first_state(make):
    model = make_model()
    opt = make(model.parameters())
    train(model, opt, 1)
    return next(iter(opt.state.values()), {})


def test_saved_between_probe_and_step():
    model = make_model()
    opt = AdmIRE(model.parameters(), 0.01, kappa=2, gamma=0.5)
    with opt.probe():
        sampled_cross_entropy(model(batch(0)[0])).backward()
    other = make_model()
    again = AdmIRE(other.parameters(), 0.01, kappa=2, gamma=0.5)
    again.load_state_dict(reload(opt.state_dict()))
    assert not again.probe_due and equal(masks(opt), masks(again))
    assert equal(train(model, opt, 4), train(other, again, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("through_base", [False, True])
def test_masks_come_back_bool(dtype, through_base):
    model = make_model(dtype=dtype)
    opt = AdmIRE(model.parameters(), 0.01, **SETTINGS)
    train(model, opt, 4, dtype=dtype)
    before = masks(opt)
    (opt.base if through_base else opt).load_state_dict(reload(opt.state_dict()))
    train(model, opt, 1, start=4, dtype=dtype)
    assert equal(before, masks(opt)) and all(
        m.dtype == torch.bool and m.element_size() == 1 for m in masks(opt)
    )


@pytest.mark.parametrize("how", ["load", "load base", "deepcopy", "pickle"])
def test_groups_and_state_stay_the_bases_own(how):
    model = make_model()
    opt = IRE(SAM(AdamW(model.parameters(), 0.01)), **SETTINGS)
    train(model, opt, 4)
    if how == "load":
        opt.load_state_dict(opt.state_dict())
    elif how == "load base":
        opt.base.base.load_state_dict(opt.base.base.state_dict())
    elif how == "deepcopy":
        model, opt = copy.deepcopy((model, opt))
    else:
        model, opt = pickle.loads(pickle.dumps((model, opt)))
    assert opt.param_groups is opt.base.param_groups is opt.base.base.param_groups
    assert (
        opt.state is opt.base.state is opt.base.base.state
        and opt.defaults is opt.base.base.defaults
    )
    assert (
        isinstance(opt, torch.optim.Optimizer)
        and opt.param_groups[0]["params"][0] is model[0].weight
    )
    before = [p.detach().clone() for p in model.parameters()]
    assert not equal(before, train(model, opt, 1, start=4))
    opt.param_groups[0]["lr"] = 0.0
    opt.param_groups[0]["weight_decay"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    assert equal(before, train(model, opt, 2, start=5))


def test_a_copy_steps_on_its_own():
    model = make_model()
    opt = AdmIRE(model.parameters(), 0.01, **SETTINGS)
    train(model, opt, 4)
    twin, twin_opt = copy.deepcopy((model, opt))
    before = [p.detach().clone() for p in twin.parameters()]
    after = train(model, opt, 3, start=4)
    assert equal(before, list(twin.parameters())) and equal(
        after, train(twin, twin_opt, 3, start=4)
    )


def test_state_of_the_plain_base_loads_and_lacks_nothing():
    model = make_model()
    plain = AdamW(model.parameters(), 0.01)
    train(model, plain, 3)
    for load in (lambda opt: opt, lambda opt: opt.base):
        opt = AdmIRE(model.parameters(), 0.01, **SETTINGS)
        load(opt).load_state_dict(plain.state_dict())
        assert opt.param_groups[0]["kappa"] == 2
        train(model, opt, 4)


# ------------------------------------------------------------ an optimizer like others
def test_hooks_fire_once_on_both():
    model = make_model()
    opt = IRE(SAM(SGD(model.parameters(), 0.1)), **SETTINGS)
    calls = []
    for name, o in (("ire", opt), ("sam", opt.base), ("sgd", opt.base.base)):
        o.register_step_pre_hook(lambda *a, name=name: calls.append(f"{name} before"))
        o.register_step_post_hook(lambda *a, name=name: calls.append(f"{name} after"))
    train(model, opt, 1)
    assert calls == [
        "ire before",
        "sam before",
        "sgd before",
        "sgd after",
        "sam after",
        "ire after",
    ]
    calls.clear()
    opt.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    opt.register_state_dict_post_hook(lambda o, d: calls.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda o, d: calls.append("loading"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert (
        calls == ["saving", "saved", "loading", "loaded"]
        and "SGD" not in repr(opt)
        and "kappa: 2" in repr(opt)
    )


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
            ],
            [2],
        ),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
    ids=["lambda", "onecycle", "sequential", "plateau"],
)
def test_schedulers(make, on_base):
    one, two = make_model(), make_model()
    plain, opt = (
        SGD(one.parameters(), 0.1, momentum=0.9),
        SGDIRE(two.parameters(), 0.1, momentum=0.9, **SETTINGS),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", "The epoch parameter"
        )  # SequentialLR of torch 2.6, on any optimizer
        schedules = make(plain), make(opt.base if on_base else opt)
        for step in range(8):
            train(one, plain, 1, start=step), train(two, opt, 1, start=step)
            for s in schedules:
                s.step(1.0) if "Plateau" in type(s).__name__ else s.step()
            assert (
                plain.param_groups[0]["lr"]
                == opt.param_groups[0]["lr"]
                == opt.base.param_groups[0]["lr"]
            )
            assert plain.param_groups[0]["momentum"] == opt.param_groups[0]["momentum"]
            if step == 4:
                opt.load_state_dict(reload(opt.state_dict()))
    pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("given", [{}, {"kappa": 5, "gamma": 0.3}])
def test_a_group_added_later(on_base, given):
    model = make_model()
    opt = AdmIRE(model[0].parameters(), 0.01, **SETTINGS)
    train(model, opt, 6)
    (opt.base if on_base else opt).add_param_group({"params": list(model[2].parameters()), **given})
    assert opt.param_groups[1]["kappa"] == given.get("kappa", 2)
    twin = copy.deepcopy(model)
    plain = AdamW(twin[2].parameters(), 0.01, fused=True)
    x, y = batch(6)
    for net, o in ((model, opt), (twin, plain)):
        o.zero_grad()
        F.cross_entropy(net(x), y).backward()
        o.step()
    assert equal(
        list(model[2].parameters()), list(twin[2].parameters())
    )  # no boost before the next probe
    opt.load_state_dict(reload(opt.state_dict()))
    train(model, opt, 4, start=7)
    assert masks(opt)[2].any()


def test_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    model = make_model()
    opt = AdmIRE(model.parameters(), 0.01, kappa=1, gamma=0.5, warmup=9)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss

    loss = opt.step(closure)
    assert calls == [True] and loss.item() == pytest.approx(
        F.cross_entropy(make_model()(batch(0)[0]), batch(0)[1]).item()
    )


# ------------------------------------------------------------ odd parameters
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_base
def test_half_precision(make, dtype):
    model = make_model(dtype=dtype)
    opt = IRE(make(model.parameters()), **SETTINGS)
    train(model, opt, 6, dtype=dtype)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
    assert sum(f.sum() for f in masks(opt)) >= math.floor(0.6 * 67)


def test_bf16_flat_step_is_rounded_once():
    p = nn.Parameter(torch.full((8,), 100.0, dtype=torch.bfloat16))
    opt = SGDIRE([p], 1.0, kappa=3, gamma=0.5)
    with opt.probe():
        p.grad = torch.arange(8).to(torch.bfloat16)
    p.grad = torch.ones_like(p)
    opt.step()
    assert p.tolist() == [96.0] * 4 + [99.0] * 4  # 100 - 4 * 1, where flat


def test_layouts_empty_and_scalar_parameters():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    params = [
        *conv.parameters(),
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.randn(6, 4).t()),
    ]

    def loss():
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        return (conv(x) ** 2).mean() * params[2] ** 2 + (params[4] ** 2).sum() + params[3].sum()

    for make in (
        lambda p: SGD(p, 0.01),
        lambda p: AdamW(p, 0.01, foreach=True),
        lambda p: SAM(SGD(p, 0.01)),
    ):
        opt = IRE(make(params), kappa=2, gamma=0.5, interval=2)
        for _ in range(5):
            if opt.probe_due:
                with opt.probe():
                    loss().backward()

            def closure():
                opt.zero_grad()
                value = loss()
                value.backward()
                return value

            opt.step(closure)
        n = sum(p.numel() for p in params)
        assert sum(f.sum() for f in masks(opt)) == n // 2
        assert all(
            f.shape == p.shape and f.stride() == p.stride() for f, p in zip(masks(opt), params)
        )


def test_parameters_without_gradient_do_not_move_and_keep_their_mask():
    model = make_model()
    expert = nn.Linear(4, 3)
    opt = AdmIRE([*model.parameters(), *expert.parameters()], 0.1, weight_decay=0.5, **SETTINGS)
    before = expert.weight.detach().clone()
    train(model, opt, 4)
    assert torch.equal(before, expert.weight) and expert.weight not in opt.masks
    assert sum(f.sum() for f in (opt.masks[p] for p in model.parameters())) == math.floor(0.6 * 67)
    both = nn.Sequential(model, nn.Identity())
    both.forward = lambda x: model(x) + expert(x)
    train(both, opt, 4, start=4)  # now it takes part, its state is made as alone
    moved, flat = expert.weight.detach().clone(), opt.masks[expert.weight]
    assert not torch.equal(before, moved)
    for p in expert.parameters():
        p.requires_grad_(False)
        p.grad = None
    train(model, opt, 4, start=8)
    assert torch.equal(moved, expert.weight) and opt.masks[expert.weight] is flat


def test_a_gradient_in_the_probe_before_any_in_training():
    for make in BASES.values():
        model, late = make_model(), nn.Parameter(torch.ones(3))
        opt = IRE(make([*model.parameters(), late]), kappa=1, gamma=0.5, interval=2)
        for step in range(6):
            x, y = batch(step)
            if opt.probe_due:
                with opt.probe():
                    sampled_cross_entropy(model(x) * late).backward()

            def closure():
                opt.zero_grad()
                loss = F.cross_entropy(model(x) * (late if step > 3 else 1), y)
                loss.backward()
                return loss

            closure()
            opt.step(closure) if wants_closure(opt) else opt.step()
            opt.load_state_dict(reload(opt.state_dict()))
            assert (late.detach() != 1).any() == (step > 3)


def test_tied_weights_count_once():
    embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    opt = AdmIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
    with opt.probe():
        sampled_cross_entropy(model(torch.arange(7))).backward()
    assert sum(f.sum() for f in masks(opt)) == 14
    opt.step()


def test_frozen_model_but_one():
    model = make_model()
    for p in list(model.parameters())[:3]:
        p.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    opt = AdmIRE(model.parameters(), 0.1, **SETTINGS)
    after = train(model, opt, 5)
    assert equal(before[:3], after[:3]) and not torch.equal(before[3], after[3])


def test_complex_parameters_work():
    p = nn.Parameter(torch.randn(6, dtype=torch.complex64))
    opt = SGDIRE([p], 0.1, kappa=1, gamma=0.5)
    with opt.probe():
        (p.abs() ** 2).sum().backward()
    assert opt.masks[p].sum() == 3
    before, flat = p.detach().clone(), opt.masks[p]
    (p.abs() ** 2).sum().backward()
    opt.step()
    torch.testing.assert_close(p.detach(), torch.where(flat, 0.6, 0.8) * before)


def test_sparse_gradients_are_a_clear_error():
    embed = nn.Embedding(5, 3, sparse=True)
    opt = SGDIRE(embed.parameters(), 0.1, kappa=1, gamma=0.5)
    with pytest.raises(ValueError, match="sparse"), opt.probe():
        embed(torch.tensor([1, 2])).sum().backward()


def test_one_byte_a_parameter_is_kept():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, **SETTINGS)
    train(model, opt, 5)
    assert not opt.state
    assert sum(mask.nbytes for mask in opt.masks.values()) == sum(
        p.numel() for p in model.parameters()
    )
    rest = {
        k: v for k, v in vars(opt).items() if "hook" not in k and k not in ("masks", "settings")
    }
    assert not any(torch.is_tensor(v) or isinstance(v, (list, dict)) for v in rest.values())


# ------------------------------------------------------------ SAM
def test_sam_comes_back_to_the_exact_weights_also_when_the_closure_raises():
    model = make_model()
    opt = SAM(SGD(model.parameters(), 0.0), rho=10.0)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(0)
    calls = []

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        calls.append(loss.item())
        if len(calls) == 4:
            raise KeyError
        return loss

    assert opt.step(closure) == calls[0] and calls[1] > calls[0]
    with pytest.raises(KeyError):
        opt.step(closure)
    assert equal(before, list(model.parameters()))


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_climbs_by_rho(adaptive):
    model = make_model()
    opt = SAM(SGD(model.parameters(), 0.0), rho=0.3, adaptive=adaptive)
    start, seen = [p.detach().clone() for p in model.parameters()], []

    def closure():
        seen.append([p.detach() - s for p, s in zip(model.parameters(), start)])
        opt.zero_grad()
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        return torch.zeros(())

    opt.step(closure)
    scaled = [d / s.abs().clamp_min(1e-12) if adaptive else d for d, s in zip(seen[1], start)]
    assert math.sqrt(sum(float(d.double().square().sum()) for d in scaled)) == pytest.approx(
        0.3, rel=1e-4
    )


def test_average_sam_draws_xi_of_unit_mean_square_length():
    p, seen = nn.Parameter(torch.zeros(20000)), []
    opt = SAM(SGD([p], 0.0), rho=0.5, average=True)

    def closure():
        opt.zero_grad()
        p.sum().backward()
        seen.append(p.detach().clone())
        return torch.tensor(7.0)

    assert opt.step(closure) == 7 and opt.step(closure) == 7
    assert len(seen) == 2 and not torch.equal(*seen) and torch.equal(p.detach(), torch.zeros(20000))
    for x in seen:
        assert x.norm().item() == pytest.approx(0.5, rel=0.02) and abs(x.mean().item()) < 1e-4


@pytest.mark.parametrize("values", [[math.nan, 1.0, 0.0], [math.inf, 1.0, 0.0], [0.0, 0.0, 0.0]])
def test_sam_with_bad_gradients(values):
    p = nn.Parameter(torch.ones(3))
    opt = SAM(AdamW([p], 0.1))

    def closure():
        p.grad = torch.tensor(values)
        return torch.tensor(1.0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step(closure)
    bad = not all(map(math.isfinite, values))
    assert len(caught) == bad and p.isfinite().all() and bool(opt.state) != bad


def test_sam_with_gradients_in_one_pass_only():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = SAM(SGD([p, q], 0.1))
    calls = []

    def closure():
        opt.zero_grad()
        calls.append(1)
        loss = (p if len(calls) % 2 else q).sum() + p.sum() * 0.5
        loss.backward()
        return loss

    opt.step(closure)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.95))
    torch.testing.assert_close(q.detach(), torch.full((3,), 0.9))


def test_sam_in_float16_does_not_overflow():
    p = nn.Parameter(torch.ones(1000, dtype=torch.float16))
    opt = SAM(SGD([p], 0.0), rho=1.0)

    def closure():
        p.grad = torch.full_like(p, 300.0)  # 1000 * 300^2 is beyond float16
        return torch.zeros(())

    opt.step(closure)
    assert torch.equal(p.detach(), torch.ones_like(p))


# ------------------------------------------------------------ wrong arguments
@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kappa=-1), "kappa: got -1, allowed is a finite number >= 0"),
        (dict(kappa=math.nan), "kappa: got nan, allowed is a finite number >= 0"),
        (dict(kappa="2"), "kappa: got '2', allowed is a finite number >= 0"),
        (dict(gamma=0), r"gamma: got 0, allowed is a number in \(0, 1\)"),
        (dict(gamma=1.0), r"gamma: got 1.0, allowed is a number in \(0, 1\)"),
        (dict(interval=0), "interval: got 0, allowed is a whole number >= 1"),
        (dict(interval=2.5), "interval: got 2.5, allowed is a whole number >= 1"),
        (dict(warmup=-1), "warmup: got -1, allowed is a whole number >= 0"),
        (dict(curvature="hessian"), "curvature: got 'hessian', allowed is fisher over SGD"),
        (
            dict(curvature="second_moment"),
            "curvature: got 'second_moment', allowed is fisher over SGD",
        ),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        IRE(SGD(make_model().parameters(), 0.1), **{**SETTINGS, **settings})


@pytest.mark.parametrize(
    "wrap, name",
    [
        (lambda p: IRE(torch.optim.LBFGS(p), **SETTINGS), "LBFGS"),
        (lambda p: IRE(AdmIRE(p, 0.1, **SETTINGS), **SETTINGS), "IRE"),
        (lambda p: IRE(list(p), **SETTINGS), "torch.optim.Optimizer"),
        (lambda p: SAM(SAM(SGD(p, 0.1))), "SAM"),
        (lambda p: SAM(SGDIRE(p, 0.1, **SETTINGS)), "IRE"),
    ],
)
def test_wrong_bases(wrap, name):
    with pytest.raises(ValueError, match=f"(?s)base: got .*allowed is .*{name}"):
        wrap(make_model().parameters())


def test_wrong_sam():
    params = list(make_model().parameters())
    with pytest.raises(ValueError, match="rho: got -1, allowed is a finite number >= 0"):
        SAM(SGD(params, 0.1), rho=-1)
    with pytest.raises(
        ValueError, match="adaptive: got True, allowed is False where average is True"
    ):
        SAM(SGD(params, 0.1), adaptive=True, average=True)
    with pytest.raises(ValueError, match="closure: got None, allowed is a function"):
        SAM(SGD(params, 0.1)).step()


def test_second_moment_that_never_comes():
    model = make_model()
    opt = IRE(torch.optim.Adamax(model.parameters()), curvature="second_moment", kappa=1, gamma=0.5)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(ValueError, match="no exp_avg_sq in Adamax"):
        opt.step()


# ------------------------------------------------------------ named optimizers
def test_named_optimizers_pass_their_settings_on():
    params = list(make_model().parameters())
    assert SGDIRE(params, 0.1, momentum=0.9, nesterov=True, **SETTINGS).param_groups[0]["nesterov"]
    opt = AdmIRE(
        params,
        0.1,
        betas=(0.8, 0.9),
        eps=1e-16,
        weight_decay=0.2,
        curvature="second_moment",
        **SETTINGS,
    )
    assert [opt.param_groups[0][k] for k in ("betas", "eps", "weight_decay", "fused")] == [
        (0.8, 0.9),
        1e-16,
        0.2,
        True,
    ]
    assert AdmIRE(params, 0.1, foreach=True, **SETTINGS).param_groups[0]["fused"] in (None, False)
    opt = SAMIRE(params, AdamW, rho=0.2, adaptive=True, lr=0.3, **SETTINGS)
    assert type(opt.base.base) is AdamW and opt.base.adaptive and opt.param_groups[0]["rho"] == 0.2


# ------------------------------------------------------------ helpers
def test_sampled_cross_entropy_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20000, 3).clone().requires_grad_()
    loss = sampled_cross_entropy(logits, generator=torch.Generator().manual_seed(0))
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert loss.item() == pytest.approx(-(p * p.log()).sum().item(), abs=0.02)  # the entropy
    loss.backward()
    labels = (logits.grad < 0).float().mean(0)  # the gradient is negative at the label alone
    assert torch.allclose(labels, p, atol=0.02)


def test_sampled_cross_entropy_shapes_ignore_and_generator():
    logits, ignore = torch.randn(2, 5, 7, requires_grad=True), torch.zeros(2, 5, dtype=torch.bool)
    ignore[0, 2:] = True

    def draw(**settings):
        generator = torch.Generator().manual_seed(1)
        return sampled_cross_entropy(logits, generator=generator, **settings)

    assert draw().item() == draw().item() and draw(ignore=ignore).item() != draw().item()
    draw(ignore=ignore).backward()
    assert logits.grad[0, 2:].abs().sum() == 0 and (logits.grad[1].abs().sum(-1) > 0).all()
    assert sampled_cross_entropy(torch.full((3, 4), math.nan)).isnan()
    assert sampled_cross_entropy(torch.randn(6, 4, dtype=torch.bfloat16)).isfinite()


def test_sampled_mse():
    prediction = torch.zeros(20000, requires_grad=True)
    loss = sampled_mse(prediction, generator=torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.item() == pytest.approx(
        1, abs=0.03
    ) and prediction.grad.std().item() * 10000 == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.BatchNorm1d(4), (8, 4)),
        (nn.BatchNorm2d(4), (8, 4, 3, 3)),
        (nn.BatchNorm3d(4), (8, 4, 2, 2, 2)),
        (nn.BatchNorm1d(4, momentum=None), (8, 4)),
        (nn.BatchNorm1d(4, track_running_stats=False), (8, 4)),
        (nn.BatchNorm1d(4, affine=False), (8, 4)),
        (nn.BatchNorm1d(4).eval(), (8, 4)),
    ],
)
def test_frozen_batch_norm(layer, shape):
    model = nn.Sequential(nn.Identity(), layer)
    x = torch.randn(shape) + 3
    model(x) if layer.training else None
    before, flags = (
        copy.deepcopy(model.state_dict()),
        (layer.training, layer.track_running_stats, layer.momentum),
    )
    expected = copy.deepcopy(model)(x)
    with pytest.raises(KeyError), frozen_batch_norm(model):
        with frozen_batch_norm(model):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert flags == (layer.training, layer.track_running_stats, layer.momentum)


def test_frozen_batch_norm_before_a_lazy_layer_knows_its_size():
    model = nn.LazyBatchNorm1d()
    x = torch.randn(8, 4)
    with frozen_batch_norm(model):
        model(x)
    model(x)
    assert model.running_mean.abs().sum() > 0 and model.num_batches_tracked >= 1
