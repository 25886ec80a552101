"""IRE: Implicit Regularization Enhancement (Wang et al., NeurIPS 2024, arXiv 2405.20763).

Near a minimum the loss has a few sharp directions, which cap the learning rate, and many flat
ones, along which training crawls. IRE finds the flat coordinates, the fraction gamma of all
parameters with the smallest diagonal Fisher information, and takes 1 + kappa times longer steps
there. The sharp ones move as before.

    opt = AdmIRE(model.parameters(), lr=6e-4, kappa=2, gamma=0.6, warmup=500)
    for x, y in batches:
        if opt.probe_due:  # each `interval`-th step: where is it flat now?
            with opt.probe(model):
                sampled_cross_entropy(model(x)).backward()
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()

Over any other optimizer: `IRE(base, kappa=2, gamma=0.6)`. Over one that keeps Adam's second moment,
`curvature="second_moment"` needs no probe. Ours, and without a threshold: `SoftIRE`. Plain, DDP,
FSDP2 and DTensor parameters.
"""

import math
import numbers
import warnings
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import LBFGS, SGD, AdamW, Optimizer


class _Wrapper(Optimizer):
    """An optimizer around `base`, whose groups, state and defaults stay the base's own objects."""

    state = property(lambda self: self.base.state)
    defaults = property(lambda self: self.base.defaults)
    add_param_group = property(lambda self: self.base.add_param_group)
    _checked = False

    def __init__(self, base, **settings):
        """settings: those of the wrapper, which stand in every group beside the base's."""
        optimizer = isinstance(base, Optimizer)
        others = sorted({"LBFGS (a line search)", "IRE", type(self).__name__})
        _require(
            optimizer and not isinstance(base, (LBFGS, IRE, type(self))),
            "base",
            f"{type(base).__name__} (an optimizer)" if optimizer else base,
            f"a torch.optim.Optimizer other than {', '.join(others)}",
        )
        for name in settings:
            _require(
                name not in base.defaults,
                name,
                f"{type(base).__name__}, which has a setting of this name",
                "a base without one",
            )
        # What a group had before the base was ever wrapped is the user's; else the latest holds.
        typed = vars(base).setdefault("_typed_in_groups", {})
        for name, value in settings.items():
            for i, group in enumerate(base.param_groups):
                own = name in group and "ire_step" not in group
                if not typed.setdefault((name, i), own):
                    group[name] = value
        # Optimizer.__init__ would make a second state.
        self.__setstate__({"base": base, "settings": settings})
        flattened = any(getattr(p, "_fsdp_flattened", False) for p in self._params())
        what = "parameters of FSDP1, of which each rank knows only its own"
        _require(not flattened, "base", what, "those of DDP or of FSDP2 (fully_shard)")

    def __getstate__(self):
        """As torch's: without hooks and what schedulers patch in."""
        return {k: v for k, v in vars(self).items() if k[0] != "_" and k != "step"}

    @property
    def param_groups(self):
        for group in self.base.param_groups:  # one added later, or loaded from a bare base
            for name, value in self.settings.items():
                group.setdefault(name, value)
        return self.base.param_groups

    def state_dict(self):
        """The base's own, with what the wrapper adds."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        saved = self._pack(self.base.state_dict())
        for hook in self._optimizer_state_dict_post_hooks.values():
            saved = hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict):
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._unpack(state_dict)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _pack(self, saved):
        return saved

    def _unpack(self, saved):
        """Loads the base. A group keeps its own settings where the saved one has none."""
        before = [dict(group) for group in self.param_groups]
        self.base.load_state_dict(saved)
        for group, own in zip(self.base.param_groups, before, strict=False):
            for name in self.settings:
                if not name.startswith("ire_"):  # counters
                    group.setdefault(name, own[name])

    def train(self):
        """The base's own, where it has one, as schedule-free optimizers do."""
        if hasattr(self.base, "train"):
            self.base.train()

    def eval(self):
        """As train()."""
        if hasattr(self.base, "eval"):
            self.base.eval()

    def _params(self):
        return list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))

    def _check_ranks_once(self):
        if not self._checked:
            _check_replicas(
                self._params(), "before the first step: each wants all plain parameters"
            )
        self._checked = True

    def _makes_state(self):
        """True in the step at lr 0 with gradients of 0 by which torch.distributed.checkpoint fills
        a fresh optimizer's state. It is no step of training: it does not count or warn."""
        grads = [p.grad for p in self._params() if p.grad is not None]
        if self.state or not grads or any(group.get("lr", 1) != 0 for group in self.param_groups):
            return False
        return not _total(lambda parts: _added(g.count_nonzero() for g in parts), grads)


# In saved states, whichever wrapper saved them.
_OURS = ("flat", "soft_factor", "soft_square", "soft_count")


class IRE(_Wrapper):
    """Algorithm 1 of the paper around `base`, any optimizer that makes one step a call.

    kappa: steps along flat coordinates are 1 + kappa times as long; >= 0, and 0 is the base.
    gamma: fraction of all coordinates that is flat, in (0, 1): the floor(gamma * n) smallest, exact
        for the decimal that gamma prints as, and all ties at the threshold. Coordinates without
        curvature, such as embedding rows that no batch uses, come first and may take most of gamma:
        see `flat_share`.
    interval, warmup: steps from one mask to the next (K in the paper), and before the first (T_w).
    curvature: "fisher", from gradients made in `probe()`, or "second_moment", the base's own
        `exp_avg_sq`, which must be one number a coordinate.

    `kappa` and `gamma` stand in each parameter group and may be changed there at any time; groups
    of one gamma are ranked together. `masks[p]` is the mask of parameter p, bool and of p's shape,
    from its first step or probe on; in a saved state it is `flat` in p's entry.

    Raises ValueError: an argument out of range, a base without second moment, a probe with no
    gradient or sparse ones. RuntimeError: a step inside the probe, ranks that disagree.

    What it cannot see: a base that keeps its own copy of the weights (float32 masters, offload)
    undoes the longer steps; a second moment in a rotated basis is not that of the weights. Ranks
    step and probe together, and hold the same plain parameters; a communication hook with memory
    (PowerSGD) remembers the probe's gradients too.
    """

    _probing = False
    _missed = 0
    _kinds = ("fisher",)  # of curvature; over the Adam family second_moment too
    _shown = ("interval", "warmup", "curvature")

    def __init__(self, base, *, kappa, gamma, interval=10, warmup=0, curvature="fisher"):
        self._set_up(base, interval, warmup, curvature, kappa=kappa, gamma=gamma)

    def _set_up(self, base, interval, warmup, curvature, **settings):
        # The counters stand in the groups: distributed checkpoints drop what is beside them.
        super().__init__(base, **settings, ire_step=0, ire_probed=-1, ire_dead=0)
        self._check_groups()
        for name, value, least in (("interval", interval, 1), ("warmup", warmup, 0)):
            whole = _is_finite(value) and value >= least and value == int(value)
            _require(whole, name, value, f"a whole number >= {least}")
        adam = any("beta" in name for name in base.defaults)
        kinds = [*self._kinds, *(["second_moment"] if adam else [])]
        allowed = f"{' or '.join(kinds)} over {type(base).__name__}"
        _require(curvature in kinds, "curvature", curvature, allowed)
        self.interval = interval
        self.warmup = warmup
        self.curvature = curvature
        self.masks = {}

    def __repr__(self):
        lines = [f"\n{name}: {getattr(self, name)}" for name in self._shown]
        return super().__repr__() + "".join(lines)

    @property
    def probe_due(self):
        """True when this step wants a new mask and `probe()` has not made it yet."""
        return self.curvature == "fisher" and self._mask_due() and not self._probed()

    @contextmanager
    def probe(self, model=None, *more):
        """Gradients made inside become the mask (Eq. 5, 6) and are dropped; those of training come
        back. With `model`, a module or several, so does all that a forward and backward moves in
        it: the gradients of all its parameters and its buffers (batch norm's statistics). Random
        streams come back too; inside, they are seeded by the step. Backward passes add up; the
        loss may be scaled.

        Two optimizers over one model: open both probes around the backward. Under DDP the probe
        wants a forward pass of its own, through the DDP module and not under `no_sync`. One forward
        for both losses, with `retain_graph=True`, is right elsewhere (compiled:
        `torch._functorch.config.donated_buffer = False`)."""
        modules = _modules(model, more)
        with ExitStack() as stack:
            stack.enter_context(_gradients_set_aside(self._params(), modules))
            stack.enter_context(_buffers_kept(modules))
            stack.enter_context(_random_streams_kept(torch.initial_seed() + self._t))
            self._probing = True
            try:
                yield
            finally:
                self._probing = False
            self._update_masks({p: p.grad for p in self._params() if p.grad is not None})
            for group in self.param_groups:
                group["ire_probed"] = self._t

    def step(self, closure=None):
        """theta = theta_base + kappa * flat * (theta_base - theta_old), theta_base being where the
        base's step leads. Returns what the base returns. Without a mask, before `warmup`, and
        where kappa is 0, it is the base's step to the bit."""
        return self._step(closure)

    def _step(self, closure):
        self._check_step()
        counts = not self._makes_state()
        closure = self._observed(closure, counts)
        old = self._copy_weights()
        loss = self.base.step() if closure is None else self.base.step(closure)
        self._begin_masks()
        if counts:
            self._refresh_or_warn()
            self._lengthen(old)
            self._count()
        return loss

    def flat_share(self):
        """{"flat": the share of the coordinates that is flat, "flat_live": that among those whose
        curvature was not 0 at the last refresh}; {} while there is no mask. For logs; it waits for
        the device, and all ranks of sharded parameters call it together."""
        masks = [self.masks[p] for p in self._params() if p in self.masks]
        n = sum(mask.numel() for mask in masks)
        if n == 0:
            return {}
        flat = int(_total(lambda parts: _added(mask.count_nonzero() for mask in parts), masks))
        dead = self.param_groups[0]["ire_dead"]  # all of them flat
        return {"flat": flat / n, "flat_live": (flat - dead) / max(n - dead, 1)}

    @property
    def _t(self):
        return self.param_groups[0]["ire_step"]

    def _probed(self):
        return self.param_groups[0]["ire_probed"] == self._t

    def _mask_due(self):
        return self._t >= self.warmup and (self._t - self.warmup) % self.interval == 0

    def _check_groups(self):
        for group in self.param_groups:
            kappa, gamma = group["kappa"], group["gamma"]
            _require(_is_finite(kappa) and kappa >= 0, "kappa", kappa, "a finite number >= 0")
            _require(_is_finite(gamma) and 0 < gamma < 1, "gamma", gamma, "a number in (0, 1)")

    def _check_step(self):
        if self._probing:
            raise RuntimeError("IRE: a step inside its own probe would train on the probe's loss")
        self._check_groups()
        self._check_ranks_once()
        for p in [p for p in self._params() if p in self.masks]:
            if self.masks[p].shape != p.shape:  # p has grown: nothing of it is flat until a probe
                for kept in self._kept().values():
                    kept.pop(p, None)

    def _observed(self, closure, counts):
        """For SoftIRE: a look at the gradients of training, before the base's step."""
        return closure

    @torch._disable_dynamo  # a compiled training step breaks its graph here
    @torch.no_grad()
    def _copy_weights(self):
        """What the step may lengthen: [(its group, where it is, its values in one buffer)]."""
        copies = []
        for group in self.param_groups:
            if group["kappa"] != 0 and self._t >= self.warmup:
                params = [p for p in group["params"] if p in self.masks or self._mask_due()]
                for where in _batches(params):
                    values = torch.cat([_piece(*x).reshape(-1) for x in where])
                    copies.append((group, where, values))
        return copies

    def _begin_masks(self):
        """Nothing is flat yet. The mask is there from the first step on, since distributed
        checkpoints load only what a fresh optimizer has."""
        for p in self._params():
            if p.grad is not None and p not in self.masks:
                self.masks[p] = torch.zeros_like(p, dtype=torch.bool)

    def _refresh_or_warn(self):
        if self.curvature == "second_moment":
            moments = self._second_moments()
            if self._mask_due() and moments:
                self._update_masks(moments)
        elif self.probe_due:
            self._missed += 1
            if math.log10(self._missed).is_integer():  # the 1st, 10th, 100th, ...
                last = self.param_groups[0]["ire_probed"]
                what = "nothing was amplified" if last < 0 else f"the mask of step {last} goes on"
                text = f"IRE: no probe before step {self._t}, {self._missed} missed so far: {what}"
                warnings.warn(text, stacklevel=5)

    @torch._disable_dynamo
    @torch.no_grad()
    def _lengthen(self, copies):
        for group, where, step in copies:
            new = [_piece(*x) for x in where]
            parts = step.split([p.numel() for p in new])
            back = [x.view_as(p) for x, p in zip(parts, new, strict=True)]
            factor = _joined([_piece(self._mask_as(p), *at) for p, *at in where])
            if factor.dtype == torch.bool:
                factor = factor.view(torch.uint8)  # multiplies faster
            torch._foreach_sub_(back, new)
            step.nan_to_num_(0, 0, 0)  # a step to infinity counts as none, since 0 * inf is not 0
            step.mul_(factor)
            torch._foreach_add_(new, back, alpha=-float(group["kappa"]))

    def _mask_as(self, p):
        """This rank's part of p's mask, in memory laid out as p is now."""
        mask = self.masks.get(p)
        if mask is None:
            return torch.zeros_like(_local(p), dtype=torch.bool)
        mask, p = _local(mask), _local(p)
        if mask.stride() == p.stride():
            return mask
        return torch.empty_like(p, dtype=mask.dtype).copy_(mask)

    def _count(self):
        if self._probed():
            _check_replicas(
                self._params(),
                f"after step {self._t}: are the gradients averaged? DDP does that once a forward "
                "pass, so the probe wants one of its own",
            )
        t = self._t
        for group in self.param_groups:
            group["ire_step"] = t + 1

    def _second_moments(self):
        """{p: exp_avg_sq}. Raises ValueError where a parameter that IRE amplifies has none."""
        moments = {}
        for group in self.param_groups:
            for p in group["params"]:
                entry = self.state.get(p, {})
                v = entry.get("exp_avg_sq")
                if torch.is_tensor(v) and v.shape == p.shape and "Q" not in entry:  # Q: SOAP's
                    moments[p] = v
                elif group["kappa"] != 0 and (entry or p.grad is not None):
                    what = f"no exp_avg_sq in {type(self.base).__name__}'s state"
                    if v is not None:
                        what = f"exp_avg_sq of another shape or basis in {type(self.base).__name__}"
                    raise ValueError(
                        f"second_moment of a parameter {tuple(p.shape)}: got {what}, allowed is "
                        "one number for each coordinate; kappa 0 in its group leaves p out"
                    )
        return moments

    @torch.no_grad()
    def _update_masks(self, curvature):
        """Eq. 5: flat are the floor(gamma * n) smallest over all ranks, ranked by |g|, since the
        B * g * g of Eq. 6 underflows. curvature: {p: a tensor of p's shape}."""
        _require(
            curvature, "curvature", "no gradient from backward() inside probe()", "one or more"
        )
        layouts = {h.layout for h in curvature.values()}
        _require(layouts == {torch.strided}, "gradient", layouts, "dense, not sparse")
        by_gamma = {}
        for group in self.param_groups:
            ranked = [p for p in group["params"] if p in curvature]
            by_gamma.setdefault(group["gamma"], []).extend(ranked)
        masks = {}
        thresholds = []
        dead = 0
        for gamma, params in by_gamma.items():
            h = {p: _laid_out_as(curvature[p], p) for p in params}
            threshold, zeros = _threshold(list(h.values()), gamma)
            thresholds.append(threshold)
            dead += zeros
            if threshold is not None:
                masks.update({p: _at_most(h[p], threshold, p) for p in params})
        _check_thresholds(curvature, thresholds)
        self.masks.update(masks)
        for group in self.param_groups:
            group["ire_dead"] = dead

    def _kept(self):
        """What stands beside the base's entries in a saved state: {name: {p: of p's shape, or one
        number if it is a count}}."""
        return {"flat": self.masks}

    def _pack(self, saved):
        saved = {**saved, "state": dict(saved.get("state", {}))}
        for p, key in self._keys(saved):
            own = {name: kept[p] for name, kept in self._kept().items() if p in kept}
            if own:
                saved["state"][key] = {**saved["state"].get(key, {}), **own}
        return saved

    def _unpack(self, saved):
        own, rest = self._separated(saved)
        loaded = {name: {} for name in self._kept()}
        for p, key in self._keys(saved):
            for name, x in own.get(key, {}).items():
                loaded[name][p] = _taken_over(name, x, p)
        super()._unpack(rest)  # only now: what does not fit changes nothing
        for name, kept in self._kept().items():
            kept.clear()
            kept.update(loaded[name])

    def _separated(self, saved):
        """A saved state as ({key: what is ours in its entry}, a state for the base)."""
        own = {}
        state = {}
        for key, entry in saved.get("state", {}).items():
            if isinstance(entry, dict):
                own[key] = {name: entry[name] for name in self._kept() if name in entry}
                entry = {name: x for name, x in entry.items() if name not in _OURS}
            if not isinstance(entry, dict) or entry:  # a base takes an empty entry for a full one
                state[key] = entry
        rest = {name: value for name, value in saved.items() if name != "state"}
        if "param_groups" in saved:
            rest["param_groups"] = [self._without_foreign(group) for group in saved["param_groups"]]
        if "param_groups" in saved or state:  # else of a base that saves in its own way
            rest["state"] = state
        return own, rest

    def _without_foreign(self, group):
        """kappa means one thing to IRE, which has a gamma, and another to SoftIRE."""
        if "ire_step" in group and ("gamma" in group) != ("gamma" in self.settings):
            return {name: x for name, x in group.items() if name not in ("kappa", "gamma")}
        return group

    def _keys(self, saved):
        """[(p, its key in a saved state)]"""
        groups = saved.get("param_groups")
        if groups is None:
            return [(p, i) for i, p in enumerate(self._params())]
        pairs = zip(self.param_groups, groups, strict=True)
        return [
            x for ours, theirs in pairs for x in zip(ours["params"], theirs["params"], strict=True)
        ]


class SGDIRE(IRE):
    """IRE over torch.optim.SGD, to which `kwargs` go: momentum, weight_decay, nesterov, ..."""

    def __init__(self, params, lr, *, kappa, gamma, interval=10, warmup=0, **kwargs):
        base = SGD(params, lr, **kwargs)
        super().__init__(base, kappa=kappa, gamma=gamma, interval=interval, warmup=warmup)


class AdmIRE(IRE):
    """IRE over torch.optim.AdamW, fused where the device has it. `kwargs` go there: betas, eps,
    weight_decay, ..."""

    def __init__(
        self, params, lr, *, kappa, gamma, interval=10, warmup=0, curvature="fisher", **kwargs
    ):
        params = list(params)
        try:
            base = AdamW(params, lr, **{"fused": True, **kwargs})
        except RuntimeError:
            base = AdamW(params, lr, **kwargs)
        super().__init__(
            base, kappa=kappa, gamma=gamma, interval=interval, warmup=warmup, curvature=curvature
        )


class SAMIRE(IRE):
    """IRE over SAM over `base_cls(params, **kwargs)`."""

    def __init__(
        self,
        params,
        base_cls,
        *,
        rho,
        adaptive=False,
        average=False,
        kappa,
        gamma,
        interval=10,
        warmup=0,
        curvature="fisher",
        **kwargs,
    ):
        base = SAM(base_cls(params, **kwargs), rho=rho, adaptive=adaptive, average=average)
        super().__init__(
            base, kappa=kappa, gamma=gamma, interval=interval, warmup=warmup, curvature=curvature
        )


class SoftIRE(IRE):
    """IRE without a threshold; ours, not the paper's. The step of a coordinate is multiplied by
    (v / median of v) ** -alpha, kept within 1 / limit and limit, over the mean of all these
    factors. v is the running mean of its squared gradient, rid of its start at 0. So flat
    coordinates take longer steps and sharp ones shorter ones, and the learning rate keeps its
    meaning: coordinates that get no gradient (v = 0) do not count, and move as the base moves them.
    For the matrices of a transformer's blocks, over AdamW or Muon; chapter 12 of the book says
    where it was tried and what it gained: most in short runs.

    alpha: how unlike the factors are, in [0, 1]. limit: the largest of them and one over the
        smallest, before the mean is taken out; >= 1.
    kappa: how much of it a group takes, in [0, 1]: theta_base + kappa * (factor - 1) * step. 0
        leaves its parameters out, as is right for embeddings, the head and norms.
    interval, warmup: steps from one set of factors to the next, and before the first.
    curvature: "squares", where v is kept here and decays by beta a step, in [0, 1), or
        "second_moment", where it is the base's own `exp_avg_sq`. A square that is not finite
        counts as 0, since the base may skip such a step; a second moment that is none, as sharp.

    No probe. `masks[p]` is factor - 1; that and v are two float32 numbers a coordinate to keep.
    Warns where v is 0 everywhere or not finite for half of the coordinates.
    Raises ValueError: an argument out of range, sparse gradients, a base without second moment.
    """

    _kinds = ("squares",)
    _shown = ("alpha", "limit", "beta", "interval", "warmup", "curvature")

    def __init__(
        self,
        base,
        *,
        alpha=0.3,
        limit=4.0,
        beta=0.98,
        kappa=1.0,
        interval=10,
        warmup=0,
        curvature="squares",
    ):
        self._set_up(base, interval, warmup, curvature, kappa=kappa)
        _require(_is_finite(alpha) and 0 <= alpha <= 1, "alpha", alpha, "a number in [0, 1]")
        _require(_is_finite(limit) and limit >= 1, "limit", limit, "a finite number >= 1")
        _require(_is_finite(beta) and 0 <= beta < 1, "beta", beta, "a number in [0, 1)")
        self.alpha = alpha
        self.limit = limit
        self.beta = beta
        self.squares = {}
        self.counts = {}

    def probe(self, model=None, *more):
        raise RuntimeError("SoftIRE: there is no probe; v is from the gradients of training")

    def flat_share(self):
        """{}: nothing is either flat or sharp."""
        return {}

    def step(self, closure=None):
        """theta = theta_base + kappa * (factor - 1) * (theta_base - theta_old); see IRE.step."""
        return self._step(closure)  # IRE.step would run torch's hooks a second time

    def _observed(self, closure, counts):
        """Squares are taken before the base's step, as some bases change the gradients; with a
        closure, at its first call, as SAM's second one is elsewhere."""
        if self.curvature == "second_moment":
            return closure
        if closure is None:
            self._observe(counts)
            return None
        seen = False

        def observed():
            nonlocal seen
            loss = closure()
            if not seen:
                self._observe(counts)
            seen = True
            return loss

        return observed

    @torch._disable_dynamo
    @torch.no_grad()
    def _observe(self, counts):
        params = [p for p in self._amplified() if p.grad is not None]
        for p in params:
            layout = p.grad.layout
            _require(layout == torch.strided, "gradient", layout, "dense, not sparse")
            if p not in self.squares or self.squares[p].shape != p.shape:  # new, or p has grown
                self.squares[p] = torch.zeros_like(p, dtype=_real(p))
                self.counts[p] = torch.zeros(())
        if params and counts:
            squares = [_local(self.squares[p]) for p in params]
            grads = torch._foreach_abs([_local(_laid_out_as(p.grad, p)) for p in params])
            grads = [g.to(v.dtype) for g, v in zip(grads, squares, strict=True)]
            torch._foreach_mul_(grads, grads)
            for g in grads:  # a base may skip such a step, and v would never forget it
                g.nan_to_num_(0, 0, 0)
            torch._foreach_lerp_(squares, grads, 1 - self.beta)
            torch._foreach_add_([self.counts[p] for p in params], 1)

    def _amplified(self):
        return [p for group in self.param_groups if group["kappa"] != 0 for p in group["params"]]

    def _check_groups(self):
        for group in self.param_groups:
            kappa = group["kappa"]
            _require(_is_finite(kappa) and 0 <= kappa <= 1, "kappa", kappa, "a number in [0, 1]")

    def _begin_masks(self):
        for p in self._amplified():
            if p.grad is not None:
                self._begin_mask(p)

    def _begin_mask(self, p):
        if p not in self.masks:
            self.masks[p] = torch.zeros_like(p, dtype=_real(p))

    def _refresh_or_warn(self):
        own = self.curvature == "squares"
        squares = self.squares if own else self._second_moments()
        if not self._mask_due():
            return
        weights = {**dict.fromkeys(squares, 1.0), **self._weights()}
        seen = [p for p in self._amplified() if p in squares and weights[p] > 0]
        squares = {p: squares[p] for p in seen}
        if len({weights[p] for p in seen}) > 1:  # one for all goes with the median
            squares = {p: squares[p] / weights[p] for p in seen}
        self._update_masks(squares)

    def _weights(self):
        """{p: what the weights in its running mean add up to, which began at 0}; a parameter that
        joined later would look flat without it."""
        if self.curvature == "squares":
            return {p: 1 - self.beta ** float(n) for p, n in self.counts.items()}
        weights = {}
        for group in self.param_groups:
            for p in group["params"]:
                step = self.state.get(p, {}).get("step")
                if step is not None and "betas" in group:
                    weights[p] = 1 - float(group["betas"][1]) ** float(step)
        return weights

    @torch.no_grad()
    def _update_masks(self, squares):
        """Coordinates without gradient (v = 0) have factor 1 and do not count."""
        n = sum(v.numel() for v in squares.values())
        if n == 0:
            return
        live = int(_total(lambda parts: _added(v.count_nonzero() for v in parts), squares.values()))
        middle = n - live + (live + 1) // 2
        median = float(kth_smallest(squares.values(), middle)) if live else 0.0
        _check_thresholds(squares, [median])
        if not 0 < median < math.inf:
            what = "not finite for half of the coordinates" if live else "0 everywhere"
            text = f"SoftIRE: the curvature is {what}, so the last factors go on"
            warnings.warn(text, stacklevel=7)
            return
        for p, v in squares.items():
            self._begin_mask(p)
            v = _local(v)
            raw = _local(self.masks[p]).copy_(v.abs() if v.is_complex() else v)
            raw.div_(median).pow_(-self.alpha).clamp_(1 / self.limit, self.limit)
            raw.nan_to_num_(1 / self.limit).mul_(v != 0)  # not a number counts as sharp
        factors = [self.masks[p] for p in squares]
        total = _total(lambda parts: _added(x.sum(dtype=torch.float64) for x in parts), factors)
        mean = float(total) / live
        for p, v in squares.items():
            _local(self.masks[p]).div_(mean).sub_(1).mul_(_local(v) != 0)

    def _kept(self):
        kept = {"soft_factor": self.masks}
        if self.curvature == "squares":
            kept |= {"soft_square": self.squares, "soft_count": self.counts}
        return kept


class SAM(_Wrapper):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021) around `base`.

    rho: length of the climb, over all parameters together, >= 0. It stands in every group.
    adaptive: climb in proportion to the weights (ASAM, Kwon et al., ICML 2021).
    average: climb along a random xi ~ N(0, I/p), p the number of parameters (Average SAM).

    GradScaler refuses closures: use bfloat16, or scale the loss and divide the gradients by a
    constant in the closure. For batch norm in the second pass see `frozen_batch_norm`.
    Raises ValueError: an argument out of range, no closure.
    """

    def __init__(self, base, *, rho=0.05, adaptive=False, average=False):
        super().__init__(base, rho=rho)
        self._check_groups()
        _require(not (adaptive and average), "adaptive", adaptive, "False where average is True")
        self.adaptive = adaptive
        self.average = average

    def _check_groups(self):
        for group in self.param_groups:
            rho = group["rho"]
            _require(_is_finite(rho) and rho >= 0, "rho", rho, "a finite number >= 0")

    def step(self, closure=None):
        """Gradient here, climb, gradient there, exactly back, the base's step. `closure` does
        zero_grad, forward and backward and returns the loss. Returns the loss here (Average SAM
        makes no pass here: the loss there). A gradient here that is not finite skips the step
        with a warning."""
        if self._makes_state():
            return self.base.step()
        what = "a function that does zero_grad, forward, backward, returns the loss"
        _require(callable(closure), "closure", closure, what)
        self._check_groups()
        self._check_ranks_once()
        here = None if self.average else torch.enable_grad()(closure)()
        direction, length = self._random() if self.average else self._uphill()
        if not math.isfinite(length):
            text = f"SAM: skipped a step, since the gradient's norm is {length}"
            warnings.warn(text, stacklevel=3)
            return here
        old = {p: _local(p).clone() for p in direction}
        try:
            self._climb(direction, length)
            there = torch.enable_grad()(closure)()
        finally:
            for p, values in old.items():
                _local(p).copy_(values)
        self.base.step()
        return there if self.average else here

    def _climb(self, direction, length):
        for group in self.param_groups:
            for p in group["params"]:
                if p in direction:
                    alpha = float(group["rho"]) / max(length, 1e-30)
                    _local(p).add_(direction[p], alpha=alpha)

    @torch.no_grad()
    def _uphill(self):
        """(g, |g|) or, with T = |theta|, (T * T * g, |T * g|): the climb is rho * the first / the
        second."""
        direction = {}
        scaled = []
        for p in self._params():
            if p.grad is not None:
                weight = p.abs() if self.adaptive else 1
                scaled.append(_laid_out_as(p.grad, p) * weight)
                direction[p] = _local(scaled[-1] * weight)
        square = _total(lambda parts: _added(_square(x) for x in parts), scaled)
        return direction, float(square) ** 0.5

    def _random(self):
        """Standard normal directions and sqrt(p). Replicas draw alike, shards of one parameter do
        not."""
        direction = {p: torch.empty_like(_local(p)) for p in self._params() if p.requires_grad}
        seed = torch.randint(2**62, (), device=next(iter(direction.values())).device)
        if _several_ranks():
            dist.broadcast(seed, 0)
        for i, (p, x) in enumerate(direction.items()):
            key = hash((int(seed), i, *map(dist.get_rank, _shard_groups(p)))) % 2**63
            x.normal_(generator=torch.Generator(x.device).manual_seed(key))
        return direction, sum(p.numel() for p in direction) ** 0.5


def sampled_cross_entropy(logits, *, generator=None, ignore=None, dim=None):
    """The probe's loss (Eq. 6): mean cross entropy of `logits` (..., classes) against labels drawn
    from softmax(logits). Positions where the bool tensor `ignore` (...) holds do not count.
    dim: where the classes are, 1 for images; logits of one dimension or above three must say it.
    Raises ValueError: no dim there, a single class."""
    shape = tuple(logits.shape)
    known = dim is not None or logits.dim() in (2, 3)
    _require(known, "dim", dim, f"the dimension of the classes in logits of shape {shape}")
    logits = logits.movedim(-1 if dim is None else dim, -1)
    several = "two classes or more; yes/no outputs want sampled_binary_cross_entropy"
    _require(logits.shape[-1] > 1, "logits", shape, several)
    with torch.no_grad():  # the argmax of logits + Gumbel noise; torch.multinomial raises on NaN
        float32 = torch.promote_types(logits.dtype, torch.float32)
        noise = torch.empty_like(logits, dtype=float32).exponential_(generator=generator)
        labels = (logits - noise.log_()).argmax(-1)
        if ignore is not None:
            labels = labels.masked_fill(ignore, -100)
    logits = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(logits, labels.reshape(-1), ignore_index=-100)


def sampled_binary_cross_entropy(logits, *, generator=None):
    """The same for yes/no and multi-label outputs: mean binary cross entropy of `logits`, of any
    shape, against labels drawn from Bernoulli(sigmoid(logits))."""
    with torch.no_grad():
        float32 = torch.promote_types(logits.dtype, torch.float32)
        noise = torch.empty_like(logits, dtype=float32).uniform_(generator=generator)
        labels = (noise < logits.to(float32).sigmoid()).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, labels)


def sampled_mse(prediction, *, generator=None):
    """The same for regression: mean squared error of `prediction` against targets drawn from
    N(prediction, 1)."""
    noise = torch.empty_like(prediction).detach().normal_(generator=generator)
    return F.mse_loss(prediction, prediction.detach() + noise)


def kth_smallest(tensors, k, group=None):
    """The exact k-th smallest (1-based) element of non-negative floating `tensors`, as a 0-dim
    float32 tensor (float64 where one of them is). NaN is largest; signs are ignored. Shards of
    DTensors count over their ranks, other tensors over the process group, if one is passed.
    Raises ValueError: k is not in 1 .. n."""
    tensors = list(tensors) or [torch.empty(0)]
    return _kth_and_zeros(tensors, k, group)[0].to(tensors[0].device)


@contextmanager
def frozen_batch_norm(model):
    """Batch-norm layers of `model` normalise as before but leave their running statistics alone."""
    layers = [
        m
        for m in model.modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
        and m.track_running_stats
        and not torch.nn.parameter.is_lazy(m.running_mean)
    ]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


# ------------------------------------------------------------------------------------ the mask
def _threshold(h, gamma):
    """The largest flat curvature, None where all are 0, and how many are 0."""
    n = sum(x.numel() for x in h)
    k = math.floor(Fraction(str(float(gamma))) * n)
    if k == 0:
        return torch.tensor(-1.0), 0
    threshold, zeros = _kth_and_zeros(h, k)
    if zeros == n:
        text = "IRE: the curvature is 0 everywhere, so the last mask goes on"
        text += ": is the probe's loss one that depends on the weights?"
        warnings.warn(text, stacklevel=2)
        return None, zeros
    if not threshold.isfinite():
        text = f"IRE: more than {1 - gamma:.2g} of the curvature is not finite, and counts as sharp"
        warnings.warn(text, stacklevel=2)
        threshold = torch.tensor(torch.finfo(threshold.dtype).max, dtype=threshold.dtype)
    return threshold, zeros


def _at_most(h, threshold, p):
    """Where |h| <= threshold, as p is laid out over the ranks and in memory."""
    flat = torch.empty_like(p, dtype=torch.bool)
    torch.le(_local(h).abs().to(threshold.dtype), threshold, out=_local(flat))
    return flat


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _kth_and_zeros(tensors, k, group=None):
    """kth_smallest on the CPU, and the number of zeros. A radix select: the bits of non-negative
    floats order as the numbers do, so a histogram for every 16 bits finds it, without a copy of
    the model."""
    wide = any(x.dtype in (torch.float64, torch.complex128) for x in tensors)
    floats = torch.float64 if wide else torch.float32
    prefix = None
    for shift in range(torch.finfo(floats).bits - 16, -1, -16):
        counts = _total(partial(_histogram, floats, shift, prefix), tensors, group)
        below = counts.cumsum(0)
        if prefix is None:
            zeros = int(counts[0])  # or so small that all of the first 16 bits are 0
            n = int(below[-1])
            good = isinstance(k, numbers.Integral) and 1 <= k <= n
            _require(good, "k", k, f"1 to the number of elements, {n}")
            prefix = 0
            rank = k
        digit = int(torch.searchsorted(below, rank))
        rank -= int(below[digit] - counts[digit])
        prefix = prefix << 16 | digit
    return torch.tensor(prefix, dtype=_BITS[floats]).view(floats), zeros


def _histogram(floats, shift, prefix, tensors):
    """Counts (65536) of the 16 bits from `shift` on, of |x| whose bits above those are `prefix`."""
    ints = _BITS[floats]
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=tensors[0].device)
    for where in _batches(tensors):
        x = _joined([_piece(*at) for at in where])
        x = x.abs() if x.is_complex() else x
        digits = (x.to(floats).view(ints) & torch.iinfo(ints).max) >> shift  # without the sign
        if prefix is not None:
            digits = digits[digits >> 16 == prefix] & 0xFFFF
        counts += _bincount(digits).to(counts.device)
    return counts


def _bincount(digits):
    if not digits.is_cuda:
        return torch.bincount(digits, minlength=1 << 16)
    # There it waits twice for the device, and the many zeros would queue for one counter.
    live = digits[digits != 0]
    one = torch.ones((), dtype=torch.int64, device=digits.device)
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=digits.device)
    counts.index_add_(0, live, one.expand_as(live))
    counts[0] = len(digits) - len(live)
    return counts


# ------------------------------------------------------------------------------------ the probe
_SET_ASIDE = set()  # the parameters whose gradients an open probe brings back


@contextmanager
def _gradients_set_aside(own, modules):
    """An inner probe leaves alone what an outer one brings back, beside its own parameters."""
    others = [p for m in modules for p in m.parameters() if p not in _SET_ASIDE]
    before = {p: p.grad for p in [*own, *others]}
    copies = {}
    if _several_ranks():  # DDP's gradients may be views that it uses again
        copies = {p: grad.clone() for p, grad in before.items() if grad is not None}
    begun = before.keys() - _SET_ASIDE
    _SET_ASIDE.update(begun)
    for p in before:
        p.grad = None
    try:
        yield
    finally:
        _SET_ASIDE.difference_update(begun)
        for p, grad in before.items():
            p.grad = grad.copy_(copies[p]) if p in copies else grad


@contextmanager
def _buffers_kept(modules):
    kept = [
        (owner, name, buffer, buffer.clone())
        for m in modules
        for owner in m.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and not torch.nn.parameter.is_lazy(buffer)
    ]
    try:
        yield
    finally:
        for owner, name, buffer, values in kept:
            buffer.data.copy_(values)  # .data: a graph from before the probe may hold the buffer
            owner._buffers[name] = buffer


@contextmanager
def _random_streams_kept(seed):
    """Inside, the CPU's and those of all devices in use are seeded by `seed`."""
    seed = seed % 2**63
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would wake up devices
        for kind in ("cuda", "xpu", "mps"):
            module = getattr(torch, kind, None)
            awake = getattr(module, "is_initialized", getattr(module, "is_available", bool))
            if awake():
                devices = range(module.device_count())
                stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
                seed_all = getattr(module, "manual_seed_all", None) or module.manual_seed
                seed_all(seed)
        yield


def _modules(model, more):
    if model is None:
        return []
    modules = list(model) if isinstance(model, (list, tuple)) else [model]
    modules.extend(more)
    good = all(isinstance(m, torch.nn.Module) for m in modules)
    _require(good, "model", model, "a torch.nn.Module or several")
    return modules


# ------------------------------------------------------------------------------------ states
def _taken_over(name, x, p):
    """A copy of what was saved under `name` for p, laid out as p is; a count is one number."""
    count = name == "soft_count"
    shape = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
    wanted = () if count else tuple(p.shape)
    _require(shape == wanted, name, shape, f"of {wanted}, as p is")
    return torch.empty_like(x if count else p, dtype=x.dtype).copy_(x)


# ------------------------------------------------------------------------------------ memory
_BATCH = {"cpu": 1 << 19}  # elements that fit a CPU's cache; elsewhere 2^24, to save launches


def _batches(tensors):
    """Lists of pieces (tensor, start, stop) of one device and dtype, of about so many elements:
    large tensors are cut, small ones go together."""
    alike = {}
    for x in tensors:
        alike.setdefault((x.device, x.dtype), []).append(x)
    for (device, _), group in alike.items():
        size = _BATCH.get(device.type, 1 << 24)
        batch = []
        count = 0
        for x in group:
            n = _local(x).numel()
            length = size if _in_a_line(_local(x)) is not None else max(n, 1)
            for start in range(0, n, length):
                stop = min(start + length, n)
                batch.append((x, start, stop))
                count += stop - start
                if count >= size:
                    yield batch
                    batch = []
                    count = 0
        if batch:
            yield batch


def _piece(x, start, stop):
    """A view of a piece of x, or all of an x with gaps in its memory."""
    x = _local(x)
    line = _in_a_line(x)
    return x if line is None else line[start:stop]


def _joined(pieces):
    """Pieces in one dimension; a view where there is but one."""
    lines = [x.reshape(-1) for x in pieces]
    return torch.cat(lines) if len(lines) > 1 else lines[0]


def _in_a_line(x):
    """A view of x in one dimension, in the order of its memory; None where that has gaps."""
    if x.is_contiguous():
        return x.view(-1)
    if torch.empty_like(x, device="meta").stride() == x.stride():
        return x.as_strided((x.numel(),), (1,))
    return None


def _added(values):
    """The sum of 0-dim tensors that may be on several devices."""
    values = list(values)
    return sum(x.to(values[0].device) for x in values)


def _real(x):
    """The dtype of |x|, float32 at least."""
    return torch.promote_types(x.dtype.to_real(), torch.float32)


def _square(x, dtype=torch.float32):
    """|x|^2 in `dtype` at least: squares of float16 overflow."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, dtype)) ** 2


# ------------------------------------------------------------------------------------ ranks
def _several_ranks():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _local(x):
    """This rank's part of x, without its history."""
    return (x.to_local() if hasattr(x, "to_local") else x).detach()


def _laid_out_as(x, p):
    """A gradient laid out over the ranks as its parameter is."""
    return x.redistribute(placements=p.placements) if hasattr(p, "placements") else x


def _shard_groups(x):
    """The process groups that each hold x once, in shards."""
    places = enumerate(getattr(x, "placements", ()))
    return [x.device_mesh.get_group(i) for i, place in places if place.is_shard()]


def _total(measure, tensors, group=None):
    """The sum over all ranks of measure(local parts); replicas, which are alike, count once."""
    by_groups = {}
    for x in tensors:
        groups = tuple(_shard_groups(x)) or (group,)
        by_groups.setdefault(groups, []).append(_local(x))
    values = []
    for groups, parts in by_groups.items():
        values.append(measure(parts))
        for each in groups:
            if each is not None:
                dist.all_reduce(values[-1], group=each)
    return _added(values)


def _plain(tensors):
    return [x for x in tensors if not hasattr(x, "placements")]


@torch.no_grad()
def _check_replicas(params, problem):
    """Raises RuntimeError where ranks do not hold the same plain parameters."""
    plain = [p for p in _plain(params) if p.is_floating_point()]
    if not plain or not _several_ranks():
        return
    n = sum(p.numel() for p in plain)
    total = float(_added(p.sum(dtype=torch.float64) for p in plain))
    square = float(_added(_square(p, torch.float64) for p in plain))
    # Rounding on unlike devices moves them by less, a step of other gradients by more.
    spreads = [0, 1e-5 * square**0.5, 1e-5 * square / n**0.5]
    _check_alike([n, total, square], spreads, plain[0].device, f"weights {problem}")


def _check_thresholds(curvature, thresholds):
    if not _plain(curvature) or not _several_ranks():
        return
    n = sum(p.numel() for p in curvature)
    total = sum(-2.0 if x is None else float(x) for x in thresholds)
    problem = "curvature: reduce it as in training (not under no_sync, not through model.module)"
    _check_alike([n, total], [0, 0], next(iter(curvature)).device, problem)


def _check_alike(values, spreads, device, problem):
    values = torch.tensor(values, dtype=torch.float64, device=device)
    ends = torch.stack((values, -values))
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    spread = ends.sum(0).cpu()
    if (spread > torch.tensor(spreads, dtype=torch.float64)).any():
        raise RuntimeError(f"IRE: ranks differ in their {problem}")


# ------------------------------------------------------------------------------------ arguments
def _is_finite(x):
    return isinstance(x, (numbers.Real, torch.Tensor)) and math.isfinite(x)


def _require(good, name, value, allowed):
    if not good:
        shown = value if isinstance(value, str) and " " in value else repr(value)
        raise ValueError(f"{name}: got {shown}, allowed is {allowed}")
