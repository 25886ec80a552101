"""The probe of curvature="fisher", what it puts back, and the losses that are made for it."""

import copy
import math
import warnings
from contextlib import suppress

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import SGD, AdamW
from training import (
    BASES,
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

import ire
from ire import (
    IRE,
    SAM,
    frozen_batch_norm,
    sampled_binary_cross_entropy,
    sampled_cross_entropy,
    sampled_mse,
)


def SGDIRE(params, **settings):
    return ire.SGDIRE(params, 0.1, **{"kappa": 1, "gamma": 0.5, "curvature": "fisher", **settings})


# ---------------------------------------------------------------- when it is due
@each_wrapper
def test_a_probe_without_fisher_is_refused(wrap):
    """A loop copied from the paper must not become something else in silence."""
    model = make_model()
    opt = wrap(SGD(model.parameters(), 0.1))
    assert not opt.probe_due
    with pytest.raises(ValueError, match='allowed is curvature="fisher"'):
        probe(model, opt)


@each_wrapper
def test_a_probe_at_kappa_0_does_nothing(wrap):
    model = make_model()
    opt = wrap(SGD(model.parameters(), 0.1), kappa=0.0, curvature="fisher")
    probe(model, opt)
    with opt.probe():  # nothing is ranked, so no gradient is missing
        pass
    assert not opt.masks and not opt.probe_due


def test_probe_due_at_warmup_and_every_interval():
    model = make_model()
    opt = SGDIRE(model.parameters(), interval=3, warmup=4)
    due = []
    for step in range(10):
        if opt.probe_due:
            due.append(step)
        train(model, opt, [step])
    assert due == [4, 7]


def test_probe_due_is_false_once_probed_and_true_after_a_failed_probe_or_a_load():
    model = make_model()
    opt = SGDIRE(model.parameters())
    with pytest.raises(KeyError), opt.probe():
        raise KeyError("inside")
    assert opt.probe_due and not opt.masks
    saved = opt.state_dict()
    probe(model, opt)
    assert not opt.probe_due
    opt.load_state_dict(saved)
    assert opt.probe_due and not opt.masks


def test_a_missing_probe_is_said_at_the_1st_10th_and_100th_miss_and_the_mask_stays():
    model = make_model()
    opt = SGDIRE(model.parameters(), interval=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(99):
            backward(model)
            opt.step()
        assert not opt.masks
        probe(model, opt)
        opt.step()
        before = [mask.clone() for mask in masks(opt)]
        opt.step()
    assert equal(before, masks(opt)) and any(mask.any() for mask in before)
    said = [str(w.message) for w in caught]
    assert len(said) == 3
    for text, step in zip(said, (0, 9, 100)):
        assert f"no probe() at step {step} " in text


@pytest.mark.parametrize(
    "dtype, gradient, flat",
    [
        (torch.float32, [4e-25, -1e-25, 3e-25, 2e-25], [False, True, False, True]),
        (torch.float16, [4e-4, -1e-4, 3e-4, 2e-4], [False, True, False, True]),
        (torch.bfloat16, [4e-25, -1e-25, 3e-25, 2e-25], [False, True, False, True]),
        (torch.float64, [1 + 1e-12, 1, 1 + 3e-12, 1 + 2e-12], [True, True, False, False]),
    ],
)
def test_gradients_are_ranked_whose_squares_underflow(dtype, gradient, flat):
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    opt = SGDIRE([p])
    by_curvature(opt, {p: torch.tensor(gradient, dtype=dtype)})
    assert opt.masks[p].tolist() == flat


def test_backward_passes_in_a_probe_add_up_to_the_large_batch_and_its_scale_is_free():
    x, y = batch(0)
    found = []
    for scale, parts in ((1, 1), (1, 4), (1024, 4)):
        model = make_model(dtype=torch.float64)
        opt = SGDIRE(model.parameters())
        with opt.probe():
            for a, b in zip(x.double().chunk(parts), y.chunk(parts)):
                (scale * F.cross_entropy(model(a), b) / parts).backward()
        found.append(masks(opt))
    assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_a_gradient_in_the_probe_before_any_in_training():
    """A base makes its state when it finds an empty entry, and must not find ours there."""
    for make in BASES.values():
        model = make_model()
        late = nn.Parameter(torch.ones(3))
        base = make([*model.parameters(), late])
        opt = IRE(base, kappa=1, gamma=0.5, interval=2, curvature="fisher")
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

            make_step(opt, closure)
            opt.load_state_dict(reload(opt.state_dict()))
            assert (late.detach() != 1).any() == (step > 3)


# ---------------------------------------------------------------- what it puts back
@pytest.mark.parametrize("fails", [False, True])
def test_training_gradients_come_back_as_they_were(fails):
    model = make_model()
    opt = SGDIRE(model.parameters())
    backward(model)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    model[2].bias.grad = None
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    with suppress(KeyError), opt.probe():
        assert all(p.grad is None for p in model.parameters())
        backward(model, 1)
        if fails:
            raise KeyError("second backward")
    for p, (grad, content) in zip(model.parameters(), before):
        assert p.grad is grad and (grad is None or torch.equal(grad, content))
    assert (model[0].weight in opt.masks) != fails


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


EXTRAS = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "dropout": lambda: nn.Dropout(0.5),
    "counter": Counter,
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("head_alone", [False, True])
def test_a_probe_of_the_model_leaves_all_of_it_alone(extra, head_alone):
    """At kappa 0 the run is the base's bit for bit, also where zero_grad comes after the step, and
    where another optimizer has the other parameters. The last probe raises."""

    def run(wrap):
        torch.manual_seed(2)
        model = make_model(EXTRAS[extra]())
        trained = model[-1] if head_alone else model
        opt = wrap(AdamW(trained.parameters(), 0.01))
        other = SGD(model[0].parameters(), 0.1 if head_alone else 0.0)
        torch.manual_seed(1)
        for step in range(8):
            if getattr(opt, "probe_due", False):
                with suppress(KeyError), opt.probe(model):
                    sampled_cross_entropy(model(batch(step)[0])).backward()
                    if step == 6:
                        raise KeyError
            backward(model, step)
            for o in (opt, other):
                o.step()
                o.zero_grad()
        return [*model.parameters(), *model.buffers()]

    settings = dict(kappa=0, gamma=0.5, interval=2, curvature="fisher")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IRE: no probe")
        assert equal(run(lambda base: base), run(lambda base: IRE(base, **settings)))


def test_it_leaves_the_random_stream_but_draws_anew_each_time():
    model = make_model()
    opt = SGDIRE(model.parameters(), interval=1)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        with opt.probe():
            draws.append(torch.rand(3))
            backward(model)
        after = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(after, torch.rand(3))
        backward(model)
        opt.step()
    assert not torch.equal(*draws)
    torch.manual_seed(6)
    with SGDIRE(model.parameters()).probe():  # the first step again, with another seed
        assert not torch.equal(draws[0], torch.rand(3))
        backward(model)


def test_several_modules_and_two_optimizers_over_one_model():
    model = make_model(nn.BatchNorm1d(8))
    for modules in ([model], [*model]):
        one = SGDIRE(model[0].parameters())
        two = SGDIRE(model[3].parameters(), gamma=0.25)
        backward(model)
        before = [*(p.grad.clone() for p in model.parameters()), *map(torch.clone, model.buffers())]
        with one.probe(*modules), two.probe(*modules):
            sampled_cross_entropy(model(batch(0)[0])).backward()
        assert equal(before, [*(p.grad for p in model.parameters()), *model.buffers()])
        assert sum(flat_counts(one)) == 20 and sum(flat_counts(two)) == 6


def test_a_probe_does_not_begin_after_the_backward_pass_of_another():
    """Their gradients would add up."""
    model = make_model()
    one, two = SGDIRE(model.parameters()), SGDIRE(model.parameters())
    backward(model)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="before another one's backward pass"):
        with one.probe():
            sampled_cross_entropy(model(batch(0)[0])).backward()
            with two.probe():
                pass
    assert equal(before, [p.grad for p in model.parameters()])


def test_a_graph_from_before_the_probe_still_runs():
    """One forward pass for both losses, through buffers that the graph holds."""
    model = make_model(nn.BatchNorm1d(8))
    opt = SGDIRE(model.parameters())
    x, y = batch(0)
    logits = model(x)
    with opt.probe(model):
        sampled_cross_entropy(logits).backward(retain_graph=True)
    F.cross_entropy(logits, y).backward()
    opt.step()


# ---------------------------------------------------------------- where it stands
@pytest.mark.parametrize("make", [lambda p: AdamW(p, 0.01), lambda p: SAM(SGD(p, 0.1))])
def test_a_probe_inside_the_closure_counts(make):
    """Lightning's training_step lives there."""

    def run(inside):
        model = make_model()
        settings = dict(kappa=2, gamma=0.5, interval=2, curvature="fisher")
        opt = IRE(make(model.parameters()), **settings)

        def closure():
            if inside and opt.probe_due:
                probe(model, opt)
            opt.zero_grad()
            return backward(model)

        for _ in range(5):
            if not inside and opt.probe_due:
                probe(model, opt)
            opt.step(closure)
        return [*model.parameters(), *opt.masks.values()]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(run(True), run(False))


def test_a_step_while_the_probe_is_open_is_refused():
    model = make_model()
    opt = SGDIRE(model.parameters())
    for p in model.parameters():  # an optimizer in the backward pass
        p.register_post_accumulate_grad_hook(lambda p: opt.step())
    before = values(model)
    with pytest.raises(RuntimeError, match=r"step\(\) inside probe\(\)"):
        probe(model, opt)
    assert equal(before, values(model)) and not opt.masks and opt.probe_due


def test_a_probe_without_a_backward_pass_is_an_error():
    opt = SGDIRE(make_model().parameters())
    with pytest.raises(ValueError, match="no backward pass inside"), opt.probe():
        pass


# ---------------------------------------------------------------- losses
def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "loss, distribution",
    [
        (sampled_cross_entropy, torch.distributions.Categorical),
        (sampled_binary_cross_entropy, torch.distributions.Bernoulli),
    ],
)
def test_labels_are_drawn_from_the_softmax_or_the_sigmoid(loss, distribution):
    one = torch.tensor([-1.0, 0.0, 2.0])
    model = distribution(logits=one)
    logits = one.expand(20000, 3).clone().requires_grad_()
    found = loss(logits, generator=seeded())
    assert found.item() == pytest.approx(model.entropy().mean().item(), abs=0.02)
    found.backward()
    labels = (logits.grad < 0).float().mean(0)  # the gradient is negative at the label alone
    torch.testing.assert_close(labels, model.probs, atol=0.02, rtol=0)


def test_sampled_mse_draws_from_the_unit_normal():
    prediction = torch.zeros(20000, requires_grad=True)
    loss = sampled_mse(prediction, generator=seeded())
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=0.03)
    assert prediction.grad.std().item() * 10000 == pytest.approx(1, abs=0.03)


def test_losses_of_odd_inputs():
    for loss in (sampled_cross_entropy, sampled_binary_cross_entropy):
        assert loss(torch.full((3, 4), math.nan)).isnan()
        assert loss(torch.randn(6, 4, dtype=torch.bfloat16)).isfinite()
    for logits in (torch.randn(5, 1), torch.randn(2, 3, 1)):
        with pytest.raises(ValueError, match="logits: got .* two classes or more; yes/no outputs"):
            sampled_cross_entropy(logits)
    for logits in (torch.randn(7), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 8, 8)):
        with pytest.raises(ValueError, match="dim: got None, allowed is the dimension of the"):
            sampled_cross_entropy(logits)


def test_ignored_positions_and_the_dimension_of_the_classes():
    logits = torch.randn(2, 5, 4, 3, requires_grad=True)
    ignore = torch.zeros(2, 5, 4, dtype=torch.bool)
    ignore[0, :2] = True
    loss = sampled_cross_entropy(logits, generator=seeded(1), ignore=ignore, dim=-1)
    loss.backward()
    assert (logits.grad[ignore] == 0).all()
    assert ((logits.grad < 0).sum(-1)[~ignore] == 1).all()  # negative at the label alone
    first = logits.movedim(-1, 1)
    assert sampled_cross_entropy(first, generator=seeded(1), ignore=ignore, dim=1) == loss
    alike = [
        sampled_cross_entropy(logits, generator=seeded(1), dim=-1),
        sampled_cross_entropy(logits.flatten(0, 1), generator=seeded(1)),
        sampled_cross_entropy(logits.flatten(0, 2), generator=seeded(1)),
    ]
    assert alike[0] == alike[1] == alike[2] != loss


def test_frozen_batch_norm():
    model = nn.Sequential(
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, momentum=None),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.BatchNorm1d(4).eval(),
    )
    x = torch.randn(8, 4) + 3
    model(x)
    before = copy.deepcopy(model.state_dict())
    flags = [layer.track_running_stats for layer in model]
    expected = copy.deepcopy(model)(x)
    with pytest.raises(KeyError), frozen_batch_norm(model):
        with frozen_batch_norm(model):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        raise KeyError
    assert equal(before.values(), model.state_dict().values())
    assert flags == [layer.track_running_stats for layer in model]
