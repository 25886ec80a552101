"""IRE with its default curvature: the arithmetic, the mask, saving, and being an optimizer like
others. The probe: test_probe.py. The soft rule: test_soft.py. Ranks: test_ranks.py."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, AdamW, lr_scheduler
from training import (
    BASES,
    CURVATURES,
    SETTINGS,
    WRAPPERS,
    backward,
    batch,
    by_curvature,
    each_wrapper,
    equal,
    flat_counts,
    make_model,
    make_step,
    masks,
    probe,
    reload,
    train,
    values,
)

from ire import IRE, SAM, SAMIRE, SGDIRE, AdmIRE, SoftIRE

each_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
each_curvature = pytest.mark.parametrize("curvature", CURVATURES)


# ---------------------------------------------------------------- where it is the base
@each_base
@each_curvature
@pytest.mark.parametrize("off", [{"kappa": 0}, {"warmup": 12}])
def test_kappa_0_and_the_steps_before_warmup_are_the_bases_bit_for_bit(make, curvature, off):
    """Dropout, batch norm and drawn labels of the probes leave the training alone."""

    def run(wrap):
        model = make_model(nn.BatchNorm1d(8), nn.Dropout(0.3))
        opt = wrap(make(model.parameters()))
        torch.manual_seed(2)
        train(model, opt, range(12))
        return model.state_dict().values()

    settings = {**SETTINGS, "curvature": curvature, **off}
    assert equal(run(lambda base: base), run(lambda base: IRE(base, **settings)))


# ---------------------------------------------------------------- the arithmetic
class Late(nn.Module):
    """Its second head takes part from step 4 on."""

    def __init__(self):
        super().__init__()
        self.body = make_model(dtype=torch.float64)
        self.late = nn.Linear(4, 3, dtype=torch.float64)

    def loss(self, step):
        x, y = batch(step, torch.float64)
        out = self.body(x)
        if step >= 4:
            out = out + self.late(x)
        return F.cross_entropy(out, y)


def written_out(model, base, steps, *, kappa, gamma, interval, warmup, beta):
    """IRE with the default curvature, without any care for memory, ranks or saving."""
    params = list(model.parameters())
    v = {p: torch.zeros_like(p) for p in params}
    seen = dict.fromkeys(params, 0)
    flat = {}
    for step in steps:
        base.zero_grad()
        model.loss(step).backward()
        old = {p: p.detach().clone() for p in params}
        base.step()
        for p in [p for p in params if p.grad is not None]:
            v[p] = beta * v[p] + (1 - beta) * p.grad**2
            seen[p] += 1
        if step >= warmup and (step - warmup) % interval == 0:
            h = {p: v[p] / (1 - beta ** seen[p]) for p in params if seen[p]}
            every = torch.cat([x.flatten() for x in h.values()]).sort().values
            flat = {p: x <= every[math.floor(gamma * len(every)) - 1] for p, x in h.items()}
        for p, mask in flat.items():
            p.data += kappa * mask * (p.data - old[p])
    return flat


class Keeps(SGD):
    """SGD that keeps `entry(p)` in its state, as other optimizers do."""

    def __init__(self, params, entry):
        super().__init__(params, 0.1)
        self.entry = entry

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].update(self.entry(p))


class ThreeBetas(AdamW):
    """The groups of Adan and AdEMAMix hold three numbers."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["betas"] = group["betas"][:2]
        super().step(closure)
        for group in self.param_groups:
            group["betas"] = (*group["betas"], 0.5)


def of_vectors(p):
    return {"exp_avg_sq": torch.ones_like(p)} if p.dim() == 1 else {}


# The base, and the decay of the running mean that must be in use: 0.95 is Adam's, 0.8 is IRE's.
SOURCES = {
    "AdamW": (lambda p: AdamW(p, 0.02, betas=(0.9, 0.95), weight_decay=0.1), 0.95),
    "AMSGrad": (lambda p: torch.optim.Adam(p, 0.02, betas=(0.9, 0.95), amsgrad=True), 0.95),
    "SGD": (lambda p: SGD(p, 0.1, momentum=0.9), 0.8),
    "three betas": (lambda p: ThreeBetas(p, 0.02, betas=(0.9, 0.95)), 0.95),
    "Adamax": (lambda p: torch.optim.Adamax(p, 0.01, betas=(0.9, 0.95)), 0.8),
    "of vectors alone": (lambda p: Keeps(p, of_vectors), 0.8),
    "factored": (lambda p: Keeps(p, lambda p: {"exp_avg_sq": torch.ones(1)}), 0.8),
    "rotated": (lambda p: Keeps(p, lambda p: {"exp_avg_sq": torch.ones_like(p), "Q": []}), 0.8),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_default_curvature_is_its_definition(source):
    """Also the source of the squares, and their correction for a head that joined late."""
    make, beta = SOURCES[source]
    one, two = Late(), Late()
    steps = range(14)
    flat = written_out(one, make(one.parameters()), steps, beta=beta, **SETTINGS)
    opt = IRE(make(two.parameters()), beta=0.8, **SETTINGS)
    for step in steps:
        opt.zero_grad()
        two.loss(step).backward()
        opt.step()
    assert equal(flat.values(), masks(opt))
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def extra(opt):
    """What a saved state has beside the base's: {(parameter, name): value}."""
    base = opt.base.state_dict()["state"]
    return {
        (i, name): value
        for i, entry in opt.state_dict()["state"].items()
        for name, value in entry.items()
        if name not in base.get(i, {})
    }


def test_what_it_keeps_and_says():
    """One byte a parameter over Adam, four more over SGD."""
    settings = {"kappa": 2, "gamma": 0.6, "interval": 7, "warmup": 3, "curvature": "squares"}
    for make, bytes_each, source in ((AdmIRE, 1, True), (SGDIRE, 5, False)):
        model = make_model()
        opt = make(model.parameters(), 0.01, **settings)
        assert opt.flat_share() == {}
        train(model, opt, range(1))
        assert bool(opt.squares) != source
        train(model, opt, range(1, 5))
        assert opt.flat_share() == {"flat": pytest.approx(40 / 67)}
        kept = [x for x in extra(opt).values() if torch.is_tensor(x) and x.dim() > 0]
        assert sum(x.nbytes for x in kept) == bytes_each * 67
        assert ("exp_avg_sq" in repr(opt)) == source
        for setting in ("kappa: 2", "gamma: 0.6", "7 steps", "step 3", "squares"):
            assert setting in repr(opt)


@each_wrapper
def test_squares_are_of_the_gradients_before_the_base_changes_them(wrap):
    """Some Muons leave their Nesterov step in p.grad."""
    one, two = make_model(), make_model()
    expected = train(one, wrap(SGD(one.parameters(), 0.1)), range(12))
    opt = wrap(SGD(two.parameters(), 0.1))
    opt.base.register_step_post_hook(lambda *_: nn.utils.clip_grad_value_(two.parameters(), 1e-3))
    assert equal(expected, train(two, opt, range(12)))


def test_means_kept_by_ire_end_where_the_bases_serve_all_groups_but_those_with_kappa_0():
    """Else they would miss the gradients from here on, and take part again later."""
    model = make_model()
    matrices = {"params": [model[0].weight, model[2].weight]}
    vectors = {"params": [model[0].bias, model[2].bias]}
    opt = IRE(Keeps([matrices, vectors], of_vectors), kappa=1, gamma=0.5, interval=1)
    train(model, opt, range(2))
    assert len(opt.squares) == 4 and "kept by IRE" in repr(opt)
    opt.param_groups[0]["kappa"] = 0
    train(model, opt, range(2, 3))
    assert not opt.squares and not opt.counts and "exp_avg_sq" in repr(opt)
    assert opt.masks[model[0].bias].all() and opt.masks[model[2].bias].all()  # all are 1
    opt.param_groups[0]["kappa"] = 1
    train(model, opt, range(3, 4))
    assert {float(n) for n in opt.counts.values()} == {1}


def test_kappa_and_gamma_by_group_and_changed_mid_run():
    """A group with kappa 0 is left out, and one of another gamma is ranked apart."""
    model = make_model()
    groups = [
        {"params": model[0].parameters(), "kappa": 0},
        {"params": [model[2].weight]},
        {"params": [model[2].bias], "gamma": 0.4},
    ]
    opt = IRE(SGD(groups, 0.1), **SETTINGS)
    train(model, opt, range(4))
    assert [int(opt.masks[p].sum()) for p in model[2].parameters()] == [14, 1]  # of 24 and 3
    twin = copy.deepcopy(model)
    plain = train(twin, SGD(twin.parameters(), 0.1), range(4, 5))
    moved = train(model, opt, range(4, 5))
    assert equal(plain[:2], moved[:2]) and not equal(plain[2:], moved[2:])
    opt.param_groups[1]["gamma"] = 0.25
    train(model, opt, range(5, 6))  # a new mask
    assert opt.masks[model[2].weight].sum() == 6  # of 24


# ---------------------------------------------------------------- the mask
@pytest.mark.parametrize(
    "curvature, gamma, flat",
    [
        (range(100), 0.29, [True] * 29 + [False] * 71),  # floor, as of decimals
        (range(100), 0.57, [True] * 57 + [False] * 43),
        (range(100), 0.999, [True] * 99 + [False]),
        (range(1, 101), 1e-9, [False] * 100),
        ([0.0] * 9 + [1.0], 0.6, [True] * 9 + [False]),  # ties
        ([math.inf, 3, 1, 2, 0], 0.6, [False, False, True, True, True]),
        ([math.nan, 1, math.inf, 2, -math.inf], 0.4, [False, True, False, True, False]),
    ],
)
def test_the_floor_of_gamma_n_and_ties_are_flat_and_what_is_not_finite_is_sharp(
    curvature, gamma, flat
):
    p = nn.Parameter(torch.ones(len(curvature)))
    base = Keeps([p], lambda p: {"exp_avg_sq": torch.tensor(curvature).to(p)})
    opt = IRE(base, kappa=1, gamma=gamma)
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.masks[p].tolist() == flat and opt.masks[p].dtype == torch.bool


@each_wrapper
@pytest.mark.parametrize("wrong", [0.0, math.nan])
def test_a_curvature_that_says_nothing_warns_and_the_last_mask_goes_on(wrap, wrong):
    model = make_model()
    opt = wrap(AdamW(model.parameters(), 0.01), interval=1)
    train(model, opt, range(1))
    before = [mask.clone() for mask in opt.masks.values()]
    for p in model.parameters():
        opt.state[p]["exp_avg_sq"].fill_(wrong)
        p.grad.zero_()
    name = type(opt).__name__
    with pytest.warns(UserWarning, match=f"^{name}: the threshold of .* last mask stays"):
        opt.step()
    assert equal(before, opt.masks.values()) and any(mask.any() for mask in before)


def test_a_sharp_coordinate_at_infinity_stays_what_the_base_made_of_it():
    p = nn.Parameter(torch.ones(4))
    opt = SGDIRE([p], 0.1, kappa=5, gamma=0.5)
    by_curvature(opt, {p: torch.tensor([1.0, 2.0, 3.0, 4.0])})
    p.grad = torch.tensor([1.0, 1.0, -math.inf, 1.0])
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.4, 0.4, math.inf, 0.9]))


@each_wrapper
def test_gradients_that_are_not_in_p_grad_are_said(wrap):
    """Such as float32 `main_grad`, or gradients that are used up in the backward pass."""
    p = nn.Parameter(torch.ones(3, 1))
    opt = wrap(SGD([p], 0.1), interval=1)
    with pytest.warns(UserWarning, match="no gradients in p.grad at step 0 "):
        opt.step()
    p.grad = torch.ones(3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        p.grad = None
        opt.step()


@each_base
@each_curvature
@each_wrapper
def test_saved_at_any_step_and_resumed_to_the_same_bits(make, curvature, wrap):
    def start(model):
        return wrap(make(model.parameters()), interval=3, warmup=2, curvature=curvature)

    model = make_model()
    whole = start(model)
    states = []
    for step in range(10):
        states.append(reload((model.state_dict(), whole.state_dict())))
        train(model, whole, [step])
    for step, (weights, state) in enumerate(states):
        other = make_model(seed=7)
        other.load_state_dict(weights)
        torch.manual_seed(0)  # a trainer restores the random state, by which probes are seeded
        opt = start(other)
        opt.load_state_dict(state)
        assert equal(values(model), train(other, opt, range(step, 10)))
        assert equal(opt.masks.values(), whole.masks.values())
        assert opt.probe_due == whole.probe_due


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [AdmIRE, SGDIRE])
@pytest.mark.parametrize("through_base", [False, True])
def test_masks_and_squares_keep_their_dtype(dtype, make, through_base):
    """torch casts what a state holds to the dtype of the parameter."""
    model = make_model(dtype=dtype)
    opt = make(model.parameters(), 0.01, curvature="squares", **SETTINGS)
    train(model, opt, range(4))
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
    assert sum(flat_counts(opt)) >= math.floor(0.6 * 67)
    before = extra(opt)
    if through_base:  # of which the wrapper sees nothing
        opt.base.load_state_dict(type(opt.base)(model.parameters(), 0.01).state_dict())
        assert opt.param_groups[0]["kappa"] == 2
    else:
        opt.load_state_dict(reload(opt.state_dict()))
    after = extra(opt)
    assert before.keys() == after.keys() and equal(before.values(), after.values())
    kinds = (torch.bool, torch.float32, torch.promote_types(dtype, torch.float32))
    assert all(x.dtype in kinds for x in after.values())


@pytest.mark.parametrize("gamma", [0.5, 1e-9])  # at 1e-9 nothing is flat
def test_counts_and_thresholds_have_neither_the_default_dtype_nor_the_default_device(gamma):
    model = make_model()
    opt = IRE(SGD(model.parameters(), 0.1), kappa=1, gamma=gamma)
    backward(model)
    torch.set_default_dtype(torch.bfloat16)  # counts to 256
    torch.set_default_device("meta")
    try:
        opt.step()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert {(n.dtype, n.device.type) for n in opt.counts.values()} == {(torch.float32, "cpu")}
    assert sum(flat_counts(opt)) == math.floor(67 * gamma)


@pytest.mark.parametrize("how", ["load", "load base", "deepcopy", "pickle"])
def test_groups_and_state_stay_the_bases_own(how):
    """And a copy steps on its own."""
    original = model = make_model()
    opt = IRE(SAM(AdamW(model.parameters(), 0.01)), **SETTINGS)
    untouched = train(model, opt, range(4))
    if how == "load":
        opt.load_state_dict(opt.state_dict())
    elif how == "load base":
        opt.base.base.load_state_dict(opt.base.base.state_dict())
    elif how == "deepcopy":
        model, opt = copy.deepcopy((model, opt))
    else:
        model, opt = pickle.loads(pickle.dumps((model, opt)))
    innermost = opt.base.base
    assert opt.param_groups is opt.base.param_groups is innermost.param_groups
    assert opt.state is opt.base.state is innermost.state
    assert opt.defaults is innermost.defaults and isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups[0]["params"][0] is model[0].weight
    before = values(model)
    assert not equal(before, train(model, opt, range(4, 5)))
    assert equal(untouched, values(original)) == (how in ("deepcopy", "pickle"))


@each_wrapper
def test_two_optimizers_that_load_one_state_share_no_tensor(wrap):
    first, second = (make_model() for _ in range(2))
    opts = [wrap(SGD(model.parameters(), 0.1), interval=2) for model in (first, second)]
    train(first, opts[0], range(3))
    state = opts[0].state_dict()
    opts[1].load_state_dict(state)
    before = [x.clone() for x in extra(opts[0]).values()]
    train(second, opts[1], range(3, 5))
    assert equal(before, extra(opts[0]).values())
    assert not opts[1].base._optimizer_load_state_dict_pre_hooks  # ours is gone


@pytest.mark.parametrize("make", [lambda p: AdamW(p, 0.01), lambda p: SGD(p, 0.1, momentum=0.9)])
@pytest.mark.parametrize(
    "before, after",
    [(None, "IRE"), (None, "SoftIRE"), ("IRE", "SoftIRE"), ("SoftIRE", "IRE")],
)
def test_what_another_optimizer_saved_loads_and_the_masks_begin_anew(make, before, after):
    model = make_model()
    plain = first = make(model.parameters())
    if before:
        first = WRAPPERS[before](plain)
    train(model, first, range(3))
    opt = WRAPPERS[after](make(model.parameters()))
    train(model, opt, range(3))
    assert opt.masks
    opt.load_state_dict(reload(first.state_dict()))
    assert not opt.masks
    for i, entry in plain.state_dict()["state"].items():
        assert opt.base.state_dict()["state"][i].keys() == entry.keys()
    train(model, opt, range(3, 16))
    kind = torch.bool if after == "IRE" else torch.float32
    assert {mask.dtype for mask in opt.masks.values()} == {kind}


def test_a_group_keeps_its_kappa_when_a_bare_state_is_loaded():
    model = make_model()

    def base():
        return SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], 0.1)

    opt = IRE(base(), **SETTINGS)
    opt.param_groups[1]["kappa"] = 0
    opt.load_state_dict(base().state_dict())
    assert [group["kappa"] for group in opt.param_groups] == [2, 0]


class BesideItsState(SGD):
    """Saves a number beside its state and another under a name in it, as MADGRAD does, and entries
    that it makes after torch's hooks."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        self.state["k"] = torch.tensor(self.count)
        return super().step(closure)

    def state_dict(self):
        saved = super().state_dict()
        state = {i: dict(self.state[p]) for i, p in enumerate(self.param_groups[0]["params"])}
        return {**saved, "state": {**state, "k": self.state["k"]}, "count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "count"})


class ReadsTwice(SGD):
    """Looks at its state again after torch has loaded it, as those of pytorch_optimizer do."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for i, p in enumerate(self.param_groups[0]["params"]):
            for name in state_dict["state"].get(i, {}):
                self.state[p][name] = self.state[p][name].clone()


class WithoutHooks(SGD):
    """Loads by itself and calls none of torch's hooks, as bitsandbytes does."""

    def load_state_dict(self, state_dict):
        (group,) = state_dict["param_groups"]
        for p, key in zip(self.param_groups[0]["params"], group["params"]):
            self.state[p] = dict(state_dict["state"][key])
        self.param_groups[0].update({k: v for k, v in group.items() if k != "params"})


@pytest.mark.parametrize("cls", [BesideItsState, ReadsTwice, WithoutHooks])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_base_that_saves_and_loads_in_its_own_way(cls, momentum):
    model, other = make_model(), make_model()
    opt, again = (
        IRE(cls(m.parameters(), lr=0.1, momentum=momentum), **SETTINGS) for m in (model, other)
    )
    train(model, opt, range(4))
    other.load_state_dict(model.state_dict())
    again.load_state_dict(reload(opt.state_dict()))
    entries = dict(again.base.state)
    if cls is BesideItsState:
        assert again.base.count == entries.pop("k") == 4
    assert len(entries) == (4 if momentum else 0)
    assert all(entry.keys() == {"momentum_buffer"} for entry in entries.values())
    assert equal(masks(opt), masks(again)) and masks(opt)[0].any()
    assert equal(train(model, opt, range(4, 9)), train(other, again, range(4, 9)))


def keyed_by_name(optimizer, saved):
    (group,) = saved["param_groups"]
    names = group["param_names"]
    state = {names[i]: entry for i, entry in saved["state"].items()}
    return {"state": state, "param_groups": [{**group, "params": names}]}


def match_by_name(optimizer, saved):
    (group,) = saved["param_groups"]
    names = optimizer.param_groups[0]["param_names"]
    state = {i: saved["state"][name] for i, name in enumerate(names) if name in saved["state"]}
    return {
        "state": state,
        "param_groups": [{**group, "params": [*range(len(names))], "param_names": names}],
    }


@pytest.mark.parametrize("cls", [AdamW, SGD])
@each_wrapper
def test_masks_and_squares_go_where_the_moments_go(cls, wrap):
    """Hooks on the base match what was saved by the names of parameters, in another order."""
    layers = {name: nn.Linear(4, 4, dtype=torch.float64) for name in "abc"}
    one = nn.ModuleDict(layers)
    two = nn.ModuleDict({name: copy.deepcopy(layers[name]) for name in "cab"})
    opts = []
    for model in (one, two):
        base = cls(model.named_parameters(), 0.01)
        base.register_state_dict_post_hook(keyed_by_name)
        base.register_load_state_dict_pre_hook(match_by_name)
        opts.append(wrap(base, interval=3))

    def step(model, opt, t):
        opt.zero_grad()
        x = torch.tanh(model["a"](batch(t, torch.float64)[0]))
        model["c"](torch.tanh(model["b"](x))).square().sum().backward()
        opt.step()

    for t in range(4):
        step(one, opts[0], t)
    two.load_state_dict(one.state_dict())
    opts[1].load_state_dict(reload(opts[0].state_dict()))
    for t in range(4, 11):
        step(one, opts[0], t)
        step(two, opts[1], t)
    for name, p in one.named_parameters():
        q = two.get_parameter(name)
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)
        assert (p in opts[0].masks) == (q in opts[1].masks)
        if p in opts[0].masks:
            torch.testing.assert_close(opts[1].masks[q], opts[0].masks[p], rtol=1e-6, atol=1e-6)
    assert any(mask.any() for mask in opts[1].masks.values())


def test_masks_of_a_probe_before_the_first_step_are_saved_and_loaded():
    model = make_model()
    opt, again = (AdmIRE(model.parameters(), 0.01, curvature="fisher", **SETTINGS) for _ in "12")
    probe(model, opt)
    again.load_state_dict(reload(opt.state_dict()))
    assert equal(masks(opt), masks(again)) and masks(opt)[0].any()
    train(model, again, range(2))


@each_curvature
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [1, 4])  # before the first mask and after it
def test_a_state_read_by_torchs_checkpoint_changes_nothing(curvature, momentum, steps):
    """Without momentum, SGD has no state. Then each reading makes a step with lr 0. What is read
    has the names that a fresh optimizer has: torch refuses to load a file that lacks one."""

    def start():
        base = SGD(model.parameters(), 0.1, momentum=momentum)
        return IRE(base, curvature=curvature, **SETTINGS)

    model = make_model()
    opt = start()
    train(model, opt, range(steps))
    opt.zero_grad()
    before = copy.deepcopy([list(opt.squares.values()), list(opt.counts.values()), values(model)])
    flat = [opt.masks.get(p, torch.zeros(p.shape)).bool() for p in model.parameters()]
    saved, fresh = (get_optimizer_state_dict(model, o)["state"] for o in (opt, start()))
    assert all(map(equal, before, [opt.squares.values(), opt.counts.values(), values(model)]))
    assert equal(flat, [entry["flat"] for entry in saved.values()])
    names = [{(p, name) for p, entry in x.items() for name in entry} for x in (saved, fresh)]
    assert names[0] == names[1]


def test_a_state_that_the_base_refuses_changes_nothing():
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, **SETTINGS)
    train(model, opt, range(4))
    twin, twin_opt = copy.deepcopy((model, opt))
    with pytest.raises(ValueError):
        opt.load_state_dict(SGDIRE(model[0].parameters(), 0.5, **SETTINGS).state_dict())
    assert equal(train(model, opt, range(4, 9)), train(twin, twin_opt, range(4, 9)))


# ---------------------------------------------------------------- an optimizer like others
def test_hooks_fire_once_on_both():
    model = make_model()
    opt = IRE(SAM(SGD(model.parameters(), 0.1)), **SETTINGS)
    calls = []
    for name, o in (("ire", opt), ("sam", opt.base), ("sgd", opt.base.base)):
        o.register_step_pre_hook(lambda *a, name=name: calls.append(f"{name} before"))
        o.register_step_post_hook(lambda *a, name=name: calls.append(f"{name} after"))
    train(model, opt, range(1))
    before = ["ire before", "sam before", "sgd before"]
    assert calls == [*before, "sgd after", "sam after", "ire after"]
    calls.clear()
    opt.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    opt.register_state_dict_post_hook(lambda o, d: calls.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda o, d: calls.append("loading"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert calls == ["saving", "saved", "loading", "loaded"]


SCHEDULES = [
    lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
]


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers(schedule, on_base):
    one, two = make_model(), make_model()
    plain = SGD(one.parameters(), 0.1, momentum=0.9)
    opt = SGDIRE(two.parameters(), 0.1, momentum=0.9, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = [schedule(o) for o in (plain, opt.base if on_base else opt)]
        for step in range(8):
            train(one, plain, [step])
            train(two, opt, [step])
            for s in schedules:
                s.step()
            for setting in ("lr", "momentum"):
                expected = plain.param_groups[0][setting]
                assert opt.param_groups[0][setting] == expected
                assert opt.base.param_groups[0][setting] == expected
            if step == 4:
                opt.load_state_dict(reload(opt.state_dict()))
    pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)


@each_curvature
@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("given", [{}, {"kappa": 5, "gamma": 0.3}])
def test_a_group_added_later(curvature, on_base, given):
    model = make_model()
    opt = AdmIRE(model[0].parameters(), 0.01, curvature=curvature, **SETTINGS)
    train(model, opt, range(6))
    (opt.base if on_base else opt).add_param_group({"params": [*model[2].parameters()], **given})
    assert opt.param_groups[1]["kappa"] == given.get("kappa", 2)
    twin = copy.deepcopy(model)
    plain = AdamW(twin[2].parameters(), 0.01, fused=True)
    for net, o in ((model, opt), (twin, plain)):
        o.zero_grad()
        backward(net, 6)
        o.step()
    assert equal(model[2].parameters(), twin[2].parameters())  # no mask before the next refresh
    opt.load_state_dict(reload(opt.state_dict()))
    train(model, opt, range(7, 11))
    assert masks(opt)[2].any()


def test_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    """Also where torch.distributed.checkpoint would make the state: at lr 0 and gradients of 0."""
    model = make_model()
    opt = AdmIRE(model.parameters(), 0.0, kappa=1, gamma=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        return backward(model)

    expected = backward(make_model()).item()
    with torch.no_grad():
        assert opt.step(closure).item() == pytest.approx(expected)
    assert calls == [True] and sum(flat_counts(opt)) == 33


def test_train_and_eval_are_the_bases_own():
    """Those of schedule-free optimizers."""
    base = SGD([torch.zeros(1)], 0.1)
    calls = []
    base.train = lambda: calls.append("train")
    base.eval = lambda: calls.append("eval")
    opt = IRE(SAM(base), kappa=1, gamma=0.5)
    opt.eval()
    opt.train()
    assert calls == ["eval", "train"]


def test_a_base_is_wrapped_once_and_before_it_loads():
    """Else the settings of the first wrapper would win in silence."""
    model = make_model()
    loaded = AdamW(model.parameters(), 0.01)
    loaded.load_state_dict(AdmIRE(model.parameters(), 0.01, **SETTINGS).state_dict())
    wrapped = IRE(AdamW(model.parameters(), 0.01), **SETTINGS).base
    climbing = SAM(SGD(model.parameters(), 0.1)).base
    for base in (loaded, wrapped, climbing):
        for wrap in (lambda: IRE(base, **SETTINGS), lambda: SAM(base)):
            with pytest.raises(ValueError, match="base: got .*, allowed is a new one"):
                wrap()


# ---------------------------------------------------------------- odd parameters
@each_base
@each_curvature
def test_empty_scalar_and_channels_last_parameters(make, curvature):
    shapes = (
        torch.randn(5, 3, 3, 3).to(memory_format=torch.channels_last),
        torch.tensor(2.0),
        torch.empty(0, 3),
        torch.randn(6, 4).t(),
        torch.randn(5, 4, 2)[..., 0],
    )
    params = [nn.Parameter(x) for x in shapes]
    opt = IRE(make(params), kappa=2, gamma=0.5, interval=2, curvature=curvature)

    def closure():
        opt.zero_grad()
        loss = sum(p.exp().sum() for p in params)
        loss.backward()
        return loss

    for _ in range(3):
        if opt.probe_due:
            with opt.probe():
                closure()
        make_step(opt, closure)
    assert [mask.shape for mask in masks(opt)] == [p.shape for p in params]
    assert sum(flat_counts(opt)) >= sum(p.numel() for p in params) // 2


@each_curvature
def test_parameters_without_gradient_do_not_move_and_keep_their_mask(curvature):
    model, expert = make_model(), nn.Linear(4, 3)
    params = [*model.parameters(), *expert.parameters()]
    opt = AdmIRE(params, 0.1, weight_decay=0.5, curvature=curvature, **SETTINGS)
    before = values(expert)
    train(model, opt, range(4))
    assert equal(before, expert.parameters()) and opt.masks.keys() == {*model.parameters()}
    assert sum(mask.sum() for mask in opt.masks.values()) == math.floor(0.6 * 67)
    both = nn.Sequential(model, nn.Identity())
    both.forward = lambda x: model(x) + expert(x)
    train(both, opt, range(4, 8))  # now it takes part, and its state is made as alone
    moved = values(expert)
    flat = opt.masks[expert.weight].clone()
    assert not equal(before, moved)
    train(model, opt, range(8, 10))
    assert equal(moved, expert.parameters())
    if curvature == "fisher":  # squares are a running mean, which still ranks it
        assert torch.equal(opt.masks[expert.weight], flat)


def test_tied_weights_count_once():
    embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    opt = AdmIRE(model.parameters(), 0.1, kappa=1, gamma=0.5)
    F.cross_entropy(model(torch.arange(7)), torch.arange(7)).backward()
    opt.step()
    assert flat_counts(opt) == [14]


@each_wrapper
def test_sparse_gradients_are_a_clear_error(wrap):
    embed = nn.Embedding(5, 3, sparse=True)
    opt = wrap(SGD(embed.parameters(), 0.1))
    embed(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="gradient: got a sparse one, allowed is a dense one"):
        opt.step()


# ---------------------------------------------------------------- wrong arguments
WRONG = [
    (IRE, "kappa", -1, "a finite number >= 0"),
    (IRE, "kappa", math.nan, "a finite number >= 0"),
    (IRE, "kappa", "2", "a finite number >= 0"),
    (SoftIRE, "kappa", 2, "a number in [0, 1]"),
    (IRE, "gamma", 0, "a number in (0, 1)"),
    (IRE, "gamma", 1.0, "a number in (0, 1)"),
    (IRE, "interval", 0, "a whole number >= 1"),
    (SoftIRE, "interval", 2.5, "a whole number >= 1"),
    (IRE, "warmup", -1, "a whole number >= 0"),
    (IRE, "beta", 1.0, "a number in [0, 1)"),
    (IRE, "curvature", "second_moment", "squares or fisher"),
    (SoftIRE, "alpha", -0.3, "a number in [0, 1]"),
    (SoftIRE, "limit", 0.5, "a finite number >= 1"),
]


@pytest.mark.parametrize("cls, name, value, allowed", WRONG)
@pytest.mark.parametrize("when", ["at first", "before a step", "before a probe"])
def test_wrong_values_are_refused_before_anything_moves(cls, name, value, allowed, when):
    model = make_model()
    wrap = WRAPPERS[cls.__name__]
    with pytest.raises(ValueError) as error:
        if when == "at first":
            wrap(SGD(model.parameters(), 0.1), **{"curvature": "fisher", name: value})
            pytest.fail("accepted")
        opt = wrap(SGD(model.parameters(), 0.1), curvature="fisher")
        before = train(model, opt, range(1))
        held = opt.param_groups[0] if name in opt.param_groups[0] else vars(opt)
        held[name] = value
        opt.step() if when == "before a step" else probe(model, opt)
    assert str(error.value) == f"{name}: got {value!r}, allowed is {allowed}"
    assert when == "at first" or equal(before, values(model))


@pytest.mark.parametrize("name", ["kappa", "gamma"])
def test_an_attribute_in_place_of_a_setting_of_the_groups_is_refused(name):
    """It would do nothing in silence."""
    model = make_model()
    opt = SGDIRE(model.parameters(), 0.1, **SETTINGS)
    setattr(opt, name, 0.5)
    with pytest.raises(ValueError, match=f"{name}: set it in opt.param_groups, not as opt.{name}"):
        opt.step()


WRONG_BASES = {
    "LBFGS": lambda p: IRE(torch.optim.LBFGS(p), **SETTINGS),
    "AdmIRE": lambda p: IRE(AdmIRE(p, 0.1, **SETTINGS), **SETTINGS),
    "SoftIRE": lambda p: IRE(SoftIRE(SGD(p, 0.1)), **SETTINGS),
    "list": lambda p: IRE(list(p), **SETTINGS),
    "SAM": lambda p: SAM(SAM(SGD(p, 0.1))),
    "SGDIRE": lambda p: SAM(SGDIRE(p, 0.1, **SETTINGS)),
}


@pytest.mark.parametrize("got", WRONG_BASES)
def test_wrong_bases(got):
    with pytest.raises(ValueError, match=f"base: got '{got}', allowed is a torch.optim.Opt"):
        WRONG_BASES[got](make_model().parameters())


def test_complex_parameters_are_refused():
    for wrap in (SAM, *WRAPPERS.values()):
        with pytest.raises(ValueError, match="base: got complex parameters"):
            wrap(SGD([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], 0.1))


def test_a_base_with_a_setting_of_our_name_is_refused():
    """AdaBound has a gamma."""
    params = list(make_model().parameters())
    first, second = SGD(params, 0.1), SGD(params, 0.1)
    first.defaults["gamma"] = second.defaults["gamma"] = 7
    with pytest.raises(ValueError, match="gamma: got 'SGD', allowed is a base without a gamma"):
        IRE(first, kappa=1, gamma=0.5)
    with pytest.raises(ValueError, match="rho: got 'Adadelta', allowed is a base without a rho"):
        SAM(torch.optim.Adadelta(params))
    assert "gamma" not in SoftIRE(second).param_groups[0]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_loads_its_own_mask():
    opts = []
    for _ in range(2):
        w, b = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))
        opts.append(IRE(SGD([w, w, b], 0.1, momentum=0.9), kappa=1, gamma=0.5))
    (w.sum() + b.sum()).backward()
    opts[1].step()
    opts[0].load_state_dict(reload(opts[1].state_dict()))
    assert [mask.shape for mask in opts[0].masks.values()] == [(4, 3), (3,)]


# ---------------------------------------------------------------- named optimizers
def test_named_optimizers_pass_their_settings_on():
    params = list(make_model().parameters())
    assert SGDIRE(params, 0.1, momentum=0.9, nesterov=True, **SETTINGS).param_groups[0]["nesterov"]
    adam = dict(betas=(0.8, 0.9), eps=1e-16, weight_decay=0.2)
    group = AdmIRE(params, 0.1, **adam, **SETTINGS).param_groups[0]
    assert {name: group[name] for name in adam} == adam and group["fused"]
    assert not AdmIRE(params, 0.1, foreach=True, **SETTINGS).param_groups[0]["fused"]
    opt = SAMIRE(params, AdamW, rho=0.2, adaptive=True, lr=0.3, **SETTINGS)
    assert type(opt.base.base) is AdamW and opt.base.adaptive
    assert opt.param_groups[0]["rho"] == 0.2 and opt.param_groups[0]["lr"] == 0.3
    for make in (SGDIRE, AdmIRE):
        opt = make(params, 0.1, curvature="fisher", **SETTINGS)
        assert (opt.interval, opt.warmup, opt.curvature) == (3, 2, "fisher")
        assert (opt.param_groups[0]["kappa"], opt.param_groups[0]["gamma"]) == (2, 0.6)
    assert SGDIRE(params, 0.1, **SETTINGS).curvature == "fisher"
    assert AdmIRE(params, 0.1, **SETTINGS).curvature == "squares"
