"""IRE: Implicit Regularization Enhancement (Wang et al., NeurIPS 2024, arXiv 2405.20763).

Near a minimum the loss has a few sharp directions, which cap the learning rate, and many flat ones, along which
training crawls. IRE finds the flat coordinates, the fraction gamma of all parameters with the smallest diagonal
Fisher information, and takes 1 + kappa times longer steps there. The sharp ones move as before: it stays stable.

    opt = AdmIRE(model.parameters(), lr=6e-4, kappa=2, gamma=0.6, warmup=500)
    for x, y in batches:
        if opt.probe_due:                       # each `interval`-th step: where is it flat now?
            with opt.probe(): sampled_cross_entropy(model(x)).backward()
        opt.zero_grad(); cross_entropy(model(x), y).backward(); opt.step()

Over any other optimizer: `IRE(base, kappa=2, gamma=0.6)`. Plain, DDP, FSDP2 and DTensor parameters.
"""
import math
import warnings
from contextlib import contextmanager, suppress
from fractions import Fraction

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import LBFGS, SGD, AdamW, Optimizer


class _Wrapper(Optimizer):
    """An optimizer around `base`, whose groups, state and defaults stay the base's own objects."""
    state = property(lambda self: self.base.state)
    defaults = property(lambda self: self.base.defaults)
    add_param_group = property(lambda self: self.base.add_param_group)

    def __init__(self, base, **defaults):
        _check("base", base, lambda x: isinstance(x, Optimizer) and not isinstance(x, (LBFGS, IRE, type(self))),
               f"a torch.optim.Optimizer other than LBFGS (a line search), IRE and {type(self).__name__}")
        base.defaults.update(defaults)  # so that groups added to the base get them too
        self.__setstate__({"base": base, "names": tuple(defaults)})  # Optimizer.__init__ would make a second state

    def __getstate__(self):  # as torch's: without hooks and what schedulers patch in
        return {k: v for k, v in vars(self).items() if k[0] != "_" and k != "step"}

    @property
    def param_groups(self):
        for group in self.base.param_groups:  # a state dict of the bare base lacks our settings
            group.update({name: self.defaults[name] for name in self.names if name not in group})
        return self.base.param_groups

    def load_state_dict(self, state_dict):
        for hook in self._optimizer_load_state_dict_pre_hooks.values(): state_dict = hook(self, state_dict) or state_dict
        state = {i: dict(entry) for i, entry in state_dict["state"].items()}
        masks = {i: entry.pop("flat") for i, entry in state.items() if "flat" in entry}  # torch casts bool to float
        self.base.load_state_dict({**state_dict, "state": {i: entry for i, entry in state.items() if entry}})
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for p, i in zip(group["params"], saved["params"]):
                if i in masks: self.state[p]["flat"] = torch.empty_like(p, dtype=torch.bool).copy_(masks[i])
        for hook in self._optimizer_load_state_dict_post_hooks.values(): hook(self)

    def _params(self):
        return list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))

    def _makes_state(self):
        """torch.distributed.checkpoint fills a fresh optimizer's state by a step at lr 0 with gradients of zero.
        That is no step of training: it does not count, warn or need a closure."""
        grads = [p.grad for p in self._params() if p.grad is not None]
        return (not self.state and len(grads) > 0 and all(group.get("lr", 1) == 0 for group in self.param_groups)
                and not _total(lambda parts: sum(g.count_nonzero() for g in parts), grads))


class IRE(_Wrapper):
    """Algorithm 1 of the paper around `base`, any optimizer that makes one step a call.

    kappa: steps along flat coordinates are 1 + kappa times as long; >= 0, and 0 is the base.
    gamma: fraction of all coordinates that is flat, in (0, 1): the floor(gamma * n) smallest, exact for the decimal
        that gamma prints as, and all ties at the threshold (such as embedding rows that no batch uses, at 0).
    interval, warmup: steps from one mask to the next (K in the paper), steps before IRE switches on (T_w).
    curvature: "fisher", from gradients made in `probe()`, or "second_moment", the base's own `exp_avg_sq`.

    `kappa` and `gamma` stand in each parameter group and may be changed there at any time; groups of one gamma are
    ranked together. The mask of a parameter is `opt.state[p]["flat"]`, bool, from its first step on.
    Raises ValueError: an argument out of range, a base without second moment, a probe with none or sparse gradients.
    """
    _warned = False

    def __init__(self, base, *, kappa, gamma, interval=10, warmup=0, curvature="fisher"):
        super().__init__(base, kappa=kappa, gamma=gamma, ire_step=0, ire_probed=-1)
        for group in self.param_groups:
            _check("kappa", group["kappa"], lambda x: 0 <= x < math.inf, "a finite number >= 0")
            _check("gamma", group["gamma"], lambda x: 0 < x < 1, "a number in (0, 1)")
        _check("interval", interval, lambda x: x >= 1 and x == int(x), "a whole number >= 1")
        _check("warmup", warmup, lambda x: x >= 0 and x == int(x), "a whole number >= 0")
        kinds = ["fisher"] + ["second_moment"] * any("beta" in name for name in base.defaults)
        _check("curvature", curvature, kinds.__contains__, f"{' or '.join(kinds)} over {type(base).__name__}")
        self.interval, self.warmup, self.curvature = interval, warmup, curvature

    @property
    def _t(self):  # kept in the groups, as distributed checkpoints drop everything beside them
        return self.param_groups[0]["ire_step"]

    def _mask_due(self):
        return self._t >= self.warmup and (self._t - self.warmup) % self.interval == 0

    @property
    def probe_due(self):
        """True when this step wants a new mask and `probe()` has not made it yet."""
        return self.curvature == "fisher" and self._mask_due() and self.param_groups[0]["ire_probed"] != self._t

    @contextmanager
    def probe(self):
        """Gradients made inside become the mask (Eq. 5, 6) and are dropped; `.grad` and the random streams come
        back as they were (inside, they are seeded by the step). Backward passes add up; the loss may be scaled.
        Two optimizers over one model: open both probes around the backward."""
        before = {p: p.grad for p in self._params()}
        ranks = dist.is_available() and dist.is_initialized()  # DDP's gradients may be views that it uses again
        copies = {p: grad.clone() for p, grad in before.items() if grad is not None and ranks}
        for p in before: p.grad = None
        try:
            with torch.random.fork_rng({p.device.index for p in before if p.is_cuda}):
                torch.manual_seed((torch.initial_seed() + self._t) % 2**63)
                yield
            self._update_masks({p: p.grad for p in before if p.grad is not None})
            for group in self.param_groups: group["ire_probed"] = self._t
        finally:
            for p, grad in before.items(): p.grad = grad.copy_(copies[p]) if p in copies else grad

    def step(self, closure=None):
        """The base's step, then theta = theta_base + kappa * flat * (theta_base - theta_old). Returns what the base
        returns. Without a mask, before `warmup`, and where kappa is 0, it is the base's step to the bit."""
        t, counts, params = self._t, not self._makes_state(), self._params()
        if self.probe_due and counts and not self._warned:
            self._warned = True
            warnings.warn(f"IRE: no probe before step {t}: it is the base's step, or uses the last mask", stacklevel=3)
        reread = self.curvature == "second_moment" and self._mask_due() and counts
        masks = {p: self.state[p].pop("flat") for p in params if "flat" in self.state.get(p, ())}
        for p in [p for p in masks if not self.state[p]]: del self.state[p]  # bases make state where they find none
        old = {p: _local(p).clone() for group in self.param_groups for p in group["params"]
               if t >= self.warmup and group["kappa"] != 0 and (reread or p in masks)}
        try:
            loss = self.base.step() if closure is None else self.base.step(closure)
        finally:
            for p in params:
                if p in masks or p.grad is not None:  # bool(): `opt.base.load_state_dict` casts masks
                    self.state[p]["flat"] = masks[p].bool() if p in masks else torch.zeros_like(p, dtype=torch.bool)
        if reread:
            self._update_masks({p: s["exp_avg_sq"] for p in params if "exp_avg_sq" in (s := self.state.get(p, ()))})
        for group in self.param_groups:
            moved = [p for p in group["params"] if p in old and "flat" in self.state.get(p, ())]
            lists = zip(*((_local(p), old[p], _local(self.state[p]["flat"])) for p in moved))
            for new, back, flat in zip(*map(_batches, lists)):
                torch._foreach_sub_(back, new)
                for x in back: x.nan_to_num_(0, 0, 0)  # a step to infinity counts as none, since 0 * inf is not 0
                torch._foreach_mul_(back, [x.view(torch.uint8) for x in flat])  # faster than by bool
                torch._foreach_add_(new, back, alpha=-float(group["kappa"]))
            group["ire_step"] = t + counts
        return loss

    @torch.no_grad()
    def _update_masks(self, curvature):
        """Eq. 5: flat are the floor(gamma * n) smallest over all ranks, by |g|: Eq. 6's B * g * g underflows."""
        _check("curvature", self.curvature, lambda _: curvature, "one that a parameter has: found no gradient from "
               f"backward() inside probe(), or no exp_avg_sq in {type(self.base).__name__}'s state")
        _check("gradient", {h.layout for h in curvature.values()}, {torch.strided}.issuperset, "dense, not sparse")
        by_gamma = {}
        for group in self.param_groups:
            by_gamma.setdefault(group["gamma"], []).extend(p for p in group["params"] if p in curvature)
        for gamma, params in by_gamma.items():
            h = [h.abs() if h.is_complex() else h for h in (_like(curvature[p], p) for p in params)]
            k = math.floor(Fraction(str(float(gamma))) * sum(map(torch.numel, h)))
            threshold = kth_smallest(h, k) if k else torch.tensor(-1.0)
            threshold = threshold.nan_to_num(nan=torch.finfo(threshold.dtype).max)  # inf and NaN are sharp
            for x, p in zip(map(_local, h), params):
                self.state[p]["flat"] = torch.empty_like(p, dtype=torch.bool)
                torch.le(x.abs().to(threshold.dtype), threshold.to(x.device), out=_local(self.state[p]["flat"]))


class SAM(_Wrapper):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021) around `base`.

    rho: length of the climb, over all parameters together, >= 0. It stands in every group.
    adaptive: climb in proportion to the weights (ASAM, Kwon et al., ICML 2021).
    average: climb along a random xi ~ N(0, I/p), p the number of parameters (Average SAM).

    GradScaler refuses closures: use bfloat16, or scale the loss and divide the gradients by a constant in the closure.
    For batch norm in the second pass see `frozen_batch_norm`. Raises ValueError: an argument out of range, no closure.
    """
    def __init__(self, base, *, rho=0.05, adaptive=False, average=False):
        super().__init__(base, rho=rho)
        for group in self.param_groups:
            _check("rho", group["rho"], lambda x: 0 <= x < math.inf, "a finite number >= 0")
        _check("adaptive", adaptive, lambda x: not (x and average), "False where average is True")
        self.adaptive, self.average = adaptive, average

    def step(self, closure=None):
        """Gradient here, climb, gradient there, exactly back, the base's step. `closure` does zero_grad, forward and
        backward and returns the loss. Returns the loss here (Average SAM makes no pass here: the loss there).
        A gradient here that is not finite skips the step with a warning."""
        if self._makes_state(): return self.base.step()
        _check("closure", closure, callable, "a function that does zero_grad, forward, backward, returns the loss")
        loss = None if self.average else torch.enable_grad()(closure)()
        direction, length = self._random() if self.average else self._uphill()
        if not math.isfinite(length):
            warnings.warn(f"SAM: skipped a step, since the gradient's norm is {length}", stacklevel=3)
            return loss
        old = {p: _local(p).clone() for p in direction}
        try:
            for group in self.param_groups:
                for p in old.keys() & set(group["params"]):
                    _local(p).add_(direction[p], alpha=float(group["rho"]) / max(length, 1e-30))
            there = torch.enable_grad()(closure)()
        finally:
            for p, values in old.items(): _local(p).copy_(values)
        self.base.step()
        return there if self.average else loss

    @torch.no_grad()
    def _uphill(self):
        """(g, |g|) or, with T = |theta|, (T * T * g, |T * g|): the climb is rho * first / second."""
        T = {p: p.abs() if self.adaptive else 1 for p in self._params() if p.grad is not None}
        g = {p: _like(p.grad, p) * T[p] for p in T}
        square = _total(lambda parts: sum(torch.linalg.vector_norm(  # in float32 at least: squares of float16 overflow
            x, dtype=torch.promote_types(x.dtype, torch.float32)) ** 2 for x in parts), g.values())
        return {p: _local(g[p] * T[p]) for p in T}, float(square) ** 0.5

    def _random(self):
        """Standard normal directions and sqrt(p). Replicas draw alike, shards of one parameter do not."""
        direction = {p: torch.empty_like(_local(p)) for p in self._params() if p.requires_grad}
        seed = torch.randint(2**62, (), device=next(iter(direction.values())).device)
        if dist.is_available() and dist.is_initialized(): dist.broadcast(seed, 0)
        for i, (p, x) in enumerate(direction.items()):
            key = hash((int(seed), i, *map(dist.get_rank, _shard_groups(p)))) % 2**63
            x.normal_(generator=torch.Generator(x.device).manual_seed(key))
        return direction, sum(p.numel() for p in direction) ** 0.5


class SGDIRE(IRE):
    """IRE over torch.optim.SGD, to which `kwargs` go: momentum, weight_decay, nesterov, ..."""
    def __init__(self, params, lr, *, kappa, gamma, interval=10, warmup=0, **kwargs):
        super().__init__(SGD(params, lr, **kwargs), kappa=kappa, gamma=gamma, interval=interval, warmup=warmup)

class AdmIRE(IRE):
    """IRE over torch.optim.AdamW, fused where the device has it. `kwargs` go there: betas, eps, weight_decay, ..."""
    def __init__(self, params, lr, *, kappa, gamma, interval=10, warmup=0, curvature="fisher", **kwargs):
        params = list(params)
        try: base = AdamW(params, lr, **{"fused": True, **kwargs})
        except RuntimeError: base = AdamW(params, lr, **kwargs)
        super().__init__(base, kappa=kappa, gamma=gamma, interval=interval, warmup=warmup, curvature=curvature)

class SAMIRE(IRE):
    """IRE over SAM over `base_cls(params, **kwargs)`."""
    def __init__(self, params, base_cls, *, rho, adaptive=False, average=False, kappa, gamma, interval=10, warmup=0,
                 curvature="fisher", **kwargs):
        super().__init__(SAM(base_cls(params, **kwargs), rho=rho, adaptive=adaptive, average=average),
                         kappa=kappa, gamma=gamma, interval=interval, warmup=warmup, curvature=curvature)


def sampled_cross_entropy(logits, *, generator=None, ignore=None):
    """The probe's loss (Eq. 6): mean cross entropy of `logits` (..., classes) against labels drawn from
    softmax(logits). Positions where the bool tensor `ignore` (...) holds do not count."""
    with torch.no_grad():  # the argmax of logits + Gumbel noise; torch.multinomial would raise on NaN
        noise = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        labels = (logits - noise.exponential_(generator=generator).log_()).argmax(-1)
        labels = labels if ignore is None else labels.masked_fill(ignore, -100)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)

def sampled_mse(prediction, *, generator=None):
    """The same for regression: mean squared error of `prediction` against targets drawn from N(prediction, 1)."""
    noise = torch.empty_like(prediction).detach().normal_(generator=generator)
    return F.mse_loss(prediction, prediction.detach() + noise)

def kth_smallest(tensors, k, group=None):
    """The exact k-th smallest (1-based) element of non-negative floating `tensors`, as a 0-dim float32 tensor (float64
    where one of them is). NaN is largest; signs are ignored. Shards of DTensors count over their ranks, other tensors
    over the process group, if one is passed. Radix select: the bits of such numbers order as the numbers do, so that a
    histogram for every 16 bits finds it, without a copy of the model. Raises ValueError: k is not in 1 .. n."""
    wide, prefix, rank = any(x.dtype == torch.float64 for x in tensors), 0, k
    floats, ints, bits = (torch.float64, torch.int64, 64) if wide else (torch.float32, torch.int32, 32)

    def histogram(parts):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=parts[0].device)
        for batch in _batches(parts):
            x = torch.cat([x.reshape(-1) for x in batch]).to(floats).view(ints) & torch.iinfo(ints).max
            x = x if shift == bits - 16 else x[x >> (shift + 16) == prefix]
            counts += torch.bincount(x >> shift & 0xFFFF, minlength=1 << 16).to(counts.device)
        return counts

    for shift in range(bits - 16, -1, -16):
        counts = _total(histogram, list(tensors) or [torch.empty(0)], group)
        below = counts.cumsum(0)
        _check("k", k, lambda _: 1 <= rank <= below[-1], f"1 to the number of elements, {int(below[-1])}")
        digit = int(torch.searchsorted(below, rank))
        prefix, rank = prefix << 16 | digit, rank - int(below[digit] - counts[digit])
    return torch.tensor(prefix, dtype=ints, device=below.device).view(floats)

@contextmanager
def frozen_batch_norm(model):
    """Batch-norm layers of `model` normalise as before but leave their running statistics alone."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
              and m.track_running_stats and not torch.nn.parameter.is_lazy(m.running_mean)]
    for layer in layers: layer.track_running_stats = False
    try: yield
    finally:
        for layer in layers: layer.track_running_stats = True


def _check(name, value, allowed, what):
    with suppress(TypeError, ValueError, OverflowError):
        if allowed(value): return
    raise ValueError(f"{name}: got {value!r}, allowed is {what}")

def _batches(tensors):
    """Lists of tensors that fit a CPU's cache or save a GPU launches: large ones are cut, small ones go together."""
    batch, count = [], 0
    for x in tensors:
        size = 1 << (18 if x.is_cpu else 24)
        for piece in x.view(-1).split(size) if x.numel() > size and x.is_contiguous() else [x]:
            batch.append(piece)
            count += piece.numel()
            if count >= size:
                yield batch
                batch, count = [], 0
    if batch: yield batch

def _local(x):
    """This rank's part of x, without its history."""
    return (x.to_local() if hasattr(x, "to_local") else x).detach()

def _like(x, p):
    """A gradient laid out over the ranks as its parameter is."""
    return x.redistribute(placements=p.placements) if hasattr(p, "placements") else x

def _shard_groups(x):
    """The process groups that each hold x once, in shards."""
    return [x.device_mesh.get_group(i) for i, place in enumerate(getattr(x, "placements", ())) if place.is_shard()]

def _total(measure, tensors, group=None):
    """The sum over all ranks of measure(local parts); replicas, which are alike, count once."""
    by_groups = {}
    for x in tensors: by_groups.setdefault(tuple(_shard_groups(x)) or (group,), []).append(_local(x))
    values = [measure(parts) for parts in by_groups.values()]
    for value, groups in zip(values, by_groups):
        for each in filter(None, groups): dist.all_reduce(value, group=each)
    return sum(values)
