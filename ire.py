"""IRE: Implicit Regularization Enhancement (Wang et al., NeurIPS 2024, arXiv 2405.20763).

Near a minimum the loss has a few sharp directions, which cap the learning rate, and many flat ones,
along which training crawls. IRE finds the flat coordinates and makes their steps 1 + kappa times as
long. The sharp coordinates move as before. One line puts IRE on top of any optimizer:

    opt = IRE(torch.optim.AdamW(model.parameters(), lr=1e-3), kappa=1, gamma=0.6)

The training loop stays as it is. IRE finds the flat coordinates from the squares of the gradients.
The paper uses an extra backward pass, the probe: see `IRE.probe`. `SoftIRE` is our variant without
a threshold.
"""

import math
import numbers
import warnings
from contextlib import contextmanager
from fractions import Fraction

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import LBFGS, SGD, AdamW, Optimizer


def _of_base(name):
    return property(lambda self: getattr(self.base, name))


class _Wrapper(Optimizer):
    """An optimizer on top of another one, `base`. What is listed here is the base's."""

    _ranges = {}  # allowed values that differ from _RANGES
    state = _of_base("state")
    defaults = _of_base("defaults")
    add_param_group = _of_base("add_param_group")
    zero_grad = _of_base("zero_grad")
    train = _of_base("train")  # of schedule-free optimizers
    eval = _of_base("eval")
    state_dict = _of_base("state_dict")
    load_state_dict = _of_base("load_state_dict")

    def __init__(self, base, **settings):  # these go into every parameter group
        _check_base(self, base, settings)
        # Optimizer.__init__ would create a second state. This is the rest of its work.
        self.__setstate__({"base": base, "settings": settings})

    def __setstate__(self, state):  # copy and pickle call this, too
        super().__setstate__(state)
        # Hooks on saving and loading that are registered here are the base's.
        hooks = {name: x for name, x in vars(self.base).items() if "state_dict" in name}
        vars(self).update(hooks)

    def __getstate__(self):  # for copy and pickle, without `step`, which a scheduler replaces
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "step"}

    @property
    def param_groups(self):
        for group in self.base.param_groups:  # some may be new
            for name, value in self.settings.items():
                group.setdefault(name, value)
        return self.base.param_groups

    def _params(self):
        """{parameter: its group}"""
        return {p: group for group in self.param_groups for p in group["params"]}


class IRE(_Wrapper):
    """Algorithm 1 of the paper on top of `base`, any optimizer that makes one step per call.

    kappa: steps along flat coordinates are 1 + kappa times as long; >= 0, and 0 is the base.
    gamma: the fraction of all coordinates that is flat, in (0, 1). Ties are flat. An embedding row
        that no batch has used has curvature 0, so it is flat. Weights behind a layer that begins
        at zero have no gradient at first, so they look flat: then set warmup to one interval.
    interval: steps from one mask to the next (K in the paper).
    warmup: steps before IRE switches on (T_w in the paper).
    curvature: what measures where the loss is flat.
        "squares": the running mean of the squared gradient. IRE reads the base's mean if the base
            keeps one for all parameters (`exp_avg_sq` of Adam). Otherwise IRE keeps its own, in 4
            bytes per parameter, as on top of SGD and Muon. A gradient spike enters this mean even
            if the base skips the step, so clip the gradients first. If `step` has a closure, IRE
            reads the gradients as the base leaves them.
        "fisher": squared gradients from `probe()`, as in the paper (Eq. 6).
    beta: decay per step of IRE's own mean, in [0, 1).

    `kappa` and `gamma` are entries of each parameter group. They may be changed there at any time.
    A group with kappa 0 is neither ranked nor lengthened. Groups with the same gamma are ranked
    together. `masks[p]` has p's shape and is True where p is flat, in 1 byte per parameter. If all
    curvature is 0, the last mask stays. A step needs room for one copy of the weights. If you move
    the state to another device, move `masks` and `squares` too. To set an attribute of the base,
    set it on `opt.base`. A base with its own copy of the weights undoes the longer steps.
    Raises ValueError if a setting is out of range, also if it was changed later.
    """

    _saved_as = "flat"
    _missed = 0

    def __init__(
        self, base, *, kappa, gamma, interval=10, warmup=0, curvature="squares", beta=0.98
    ):
        self._set_up(base, {"kappa": kappa, "gamma": gamma}, interval, warmup, curvature, beta)

    def _set_up(self, base, settings, interval=10, warmup=0, curvature="squares", beta=0.98):
        super().__init__(base, **settings, ire_step=0)
        self.interval = interval
        self.warmup = warmup
        self.curvature = curvature
        self.beta = beta
        self.masks = {}
        self.squares = {}  # {p: running mean of the squared gradient}, if IRE keeps it
        self.counts = {}  # {p: number of gradients in that mean}
        self.probed = None  # the last step with a probe
        _check_settings(self)

    @torch.compiler.disable
    def step(self, closure=None):
        """Algorithm 1: theta_new = theta_base + kappa * mask * (theta_base - theta), where the base
        leads from theta to theta_base. Before `warmup`, without a mask, and where kappa is 0, this
        is the base's step exactly. Returns what the base returns. Raises RuntimeError inside a
        probe, and if the ranks differ in their curvature."""
        _check_settings(self)
        if _OPEN & self._params().keys():
            raise RuntimeError("IRE: step() inside probe() would train on the probe's loss")
        if _is_rehearsal(self, closure):
            return _rehearse(self)
        t = self.param_groups[0]["ire_step"]
        params = self._active()
        moving = [p for p in params if p.requires_grad or p.grad is not None]
        old = {p: _local(p).clone() for p in moving if t >= self.warmup}  # theta

        if closure is None:
            _observe(self, params)  # first, as some bases change p.grad in place
            loss = self.base.step()  # theta_base
        else:
            loss = self.base.step(closure)
            _observe(self, params)
        if self.squares and _squares_of_base(self, params):  # the base has made its own
            self.squares.clear()
            self.counts.clear()

        if self._due():
            squares = _mean_squares(self, params)
            if squares:
                self._update_masks(squares)
            elif params and self.probed != t:
                _warn_of_miss(self)  # no gradient was seen, or there was no probe in this step
        for p, theta in old.items():
            if p in self.masks:
                step = torch.sub(_local(p), theta, out=theta)  # theta_base - theta
                step.nan_to_num_(0, 0, 0)  # a step that is not finite is not lengthened
                _local(p).add_(step.mul_(_local(self.masks[p])), alpha=float(params[p]["kappa"]))
        for group in self.param_groups:
            group["ire_step"] = t + 1
        return loss

    def _update_masks(self, curvature):
        """Eq. 5: the mask is True for the floor(gamma * n) smallest curvatures. `curvature` holds
        squares, or the probe's gradients. These are ranked by |g|, as small squares underflow."""
        groups = self._params()
        by_gamma = {}
        for p, x in curvature.items():
            by_gamma.setdefault(groups[p]["gamma"], {})[p] = x
        for gamma, h in by_gamma.items():
            n = sum(p.numel() for p in h)
            k = math.floor(Fraction(str(gamma)) * n)  # exact, as int(0.29 * 100) is 28
            threshold = kth_smallest(h.values(), k) if k else torch.tensor(-1.0, device="cpu")
            if _is_usable(self, threshold, h):
                for p, x in h.items():  # sharp where x is not a number
                    flat = _local(x).abs().to(threshold.dtype) <= threshold
                    _begin(self.masks, p, torch.bool).copy_(flat)

    @property
    def probe_due(self):
        """True if this step wants a new mask from `probe()`."""
        _check_settings(self)
        is_probed = self.probed == self.param_groups[0]["ire_step"]
        return self.curvature == "fisher" and self._due() and not is_probed

    @contextmanager
    def probe(self, *models):
        """With curvature="fisher", the gradients of backward passes inside set the mask (Eq. 5 and
        6). They are then discarded:

            for x, y in batches:
                opt.zero_grad()
                if opt.probe_due:  # every `interval` steps
                    with opt.probe(model):
                        sampled_cross_entropy(model(x)).backward()
                cross_entropy(model(x), y).backward()
                opt.step()

        Several backward passes add up, and the loss may be scaled. Afterwards `.grad`, the buffers
        of `models` (such as batch norm's statistics) and torch's random streams are as before. The
        streams of numpy and `random` are not. Two optimizers on one model nest their probes:
        `with a.probe(m), b.probe(m)`. Raises ValueError with another curvature, or without a
        backward pass inside.

        On several ranks, give each rank with data of its own a seed of its own, such as
        torch.manual_seed(seed + rank). With one seed for all, the labels of the ranks are alike and
        the mask is wrong. DDP needs a forward pass for the probe alone, through the DDP module. If
        FSDP2 accumulates without synchronization, probe before the first micro-batch."""
        _check_settings(self)
        _require(self.curvature == "fisher", "probe()", self.curvature, 'curvature="fisher"')
        t = self.param_groups[0]["ire_step"]
        with _put_back(self._params(), models, torch.initial_seed() + t):
            yield
            params = self._active()
            gradients = {p: _gradient(p) for p in params if p.grad is not None}
            if gradients:
                self._update_masks(gradients)
            elif params:
                raise ValueError("probe(): there was no backward pass inside")
        self.probed = t

    def flat_share(self):
        """{"flat": the share of the coordinates that is flat}. {} for SoftIRE or without masks."""
        masks = [x for x in self.masks.values() if x.dtype == torch.bool]
        return {"flat": _nonzero(masks) / sum(x.numel() for x in masks)} if masks else {}

    def _due(self):
        since = self.param_groups[0]["ire_step"] - self.warmup
        return since >= 0 and since % self.interval == 0

    def _active(self):
        """{p: its group} of the parameters that are ranked and lengthened"""
        return {p: group for p, group in self._params().items() if group["kappa"] != 0}

    def state_dict(self):
        return _save(self)

    def load_state_dict(self, state_dict):
        _load(self, state_dict)

    def __repr__(self):
        source = "not known yet"
        if self.curvature == "fisher":
            source = "probe()"
        elif self.squares:
            source = "kept by IRE"
        elif self.masks:
            source = "the base's exp_avg_sq"
        every = f"every {self.interval} steps from step {self.warmup} on"
        return f"{super().__repr__()}\ncurvature: {self.curvature} ({source}), {every}"


# ------------------------------------------------------------------------ the mean of the squares
def _observe(ire, params):
    """Adds the squared gradients to IRE's own running means, unless the base keeps such means."""
    if ire.curvature == "fisher" or _squares_of_base(ire, params):
        return
    for p in params:
        if p.grad is not None:
            mean = _begin(ire.squares, p, _wide(p))
            zero = torch.zeros((), dtype=torch.float32, device="cpu")  # whatever the defaults are
            count = ire.counts.setdefault(p, zero).add_(1)
            # Without the denominator, a mean that began later than others would look flat.
            weight = (1 - ire.beta) / (1 - ire.beta ** float(count))
            g = _local(_gradient(p)).to(mean.dtype)
            square = (g * g).nan_to_num_(0, 0, 0)  # infinity would stay in the mean for ever
            mean.lerp_(square, weight)


def _mean_squares(ire, params):
    """{p: running mean of the squared gradient}. All come from the base, or all are IRE's own."""
    if ire.curvature == "fisher":
        return {}
    squares = _squares_of_base(ire, params)
    if not squares:
        return {p: ire.squares[p] for p in params if p in ire.squares}
    # Adam's means begin at 0, so a mean that began later is smaller and would look flat. Divided by
    # 1 - beta2^t, they compare.
    weights = {}
    for p in squares:
        beta2 = params[p].get("betas", (0, 0))[1]
        t = ire.state[p].get("step", math.inf)
        weights[p] = 1 - float(beta2) ** float(t)
    if len(set(weights.values())) == 1:  # all began together
        return squares
    return {p: v / weights[p] for p, v in squares.items()}


def _squares_of_base(ire, params):
    """{p: the base's running mean of squared gradients}. {} if the base lacks the mean of some
    parameter, as means of the base and of IRE are on different scales."""
    states = {p: ire.state.get(p, {}) for p in params}
    squares = {p: x.get("exp_avg_sq") for p, x in states.items() if x or p.grad is not None}
    # A mean that is quantized is another kind of tensor, which cannot be ranked (torchao).
    fits = all(type(v) is type(p.data) and v.shape == p.shape for p, v in squares.items())
    rotated = any("Q" in x for x in states.values())  # SOAP's is in another basis
    return squares if fits and not rotated else {}


# ------------------------------------------------------------------------ without a threshold
class SoftIRE(IRE):
    """IRE without a threshold. This variant is ours, not the paper's. The step of a coordinate with
    curvature v becomes `factor` times as long:

        factor = (v / median of all v) ** -alpha, kept between 1 / limit and limit,
                 divided by the mean of all factors.

    So flat coordinates take longer steps and sharp ones shorter steps, and the learning rate keeps
    its meaning. Coordinates with v = 0 do not count here and move as the base moves them.

    params: the parameters that get factors; the base moves all others. None: all of two or more
        dimensions. SoftIRE was measured with `hidden_matrices(model)` of transformers only. If the
        base does not have them, SoftIRE raises ValueError, also in a later step.
    alpha: strength, in [0, 1]. At 0 all factors are 1.
    limit: the largest factor, before the mean is taken out; >= 1.
    kappa: strength in a parameter group, in [0, 1]. The new weights are
        theta_base + kappa * (factor - 1) * (theta_base - theta). 0 leaves the group out.

    The other arguments are IRE's, except gamma. `masks[p]` is factor - 1, in 4 bytes per parameter.
    """

    _saved_as = "soft_factor"
    _ranges = {"kappa": (lambda x: 0 <= x <= 1, "a number in [0, 1]")}

    def __init__(self, base, *, params=None, alpha=0.3, limit=4.0, kappa=1.0, **others):
        self.params = None if params is None else list(params)
        self.alpha = alpha
        self.limit = limit
        self._set_up(base, {"kappa": kappa}, **others)
        self._active()  # raises if `params` does not fit

    def _active(self):
        wanted = {p for p in self._params() if p.dim() >= 2}
        if self.params is not None:
            wanted = set(self.params)
        if not wanted or wanted - self._params().keys():  # some may have been replaced since
            raise ValueError("params: some are not in the base, or there are none")
        return {p: group for p, group in super()._active().items() if p in wanted}

    def _update_masks(self, curvature):
        """In place of Eq. 5: masks = factor - 1."""
        h = list(curvature.values())
        n = sum(x.numel() for x in h)
        live = _nonzero(h)
        median = kth_smallest(h, n - live // 2)  # of those that are not 0: zeros come first
        if not _is_usable(self, median, curvature):
            return
        power = 2 if self.curvature == "fisher" else 1  # h are gradients, or squares
        for p, x in curvature.items():
            factor = _begin(self.masks, p, _wide(p))
            factor.copy_(_local(x).abs()).div_(float(median)).pow_(-power * self.alpha)
            factor.clamp_(1 / self.limit, self.limit)
            factor.nan_to_num_(1 / self.limit)  # sharp where x is not a number
            factor.mul_(_local(x) != 0)
        factors = [self.masks[p] for p in curvature]
        mean = float(_total(lambda x: x.sum(dtype=torch.float64), factors)) / live
        for p, x in curvature.items():
            _local(self.masks[p]).div_(mean).sub_(1).mul_(_local(x) != 0)


# ------------------------------------------------------------------------ the probe's loss
def sampled_cross_entropy(logits, *, generator=None, ignore=None, dim=None):
    """The probe's loss (Eq. 6): mean cross entropy of `logits` (..., classes) against labels drawn
    from softmax(logits). Positions where the bool tensor `ignore` (...) is True do not count.
    dim: where the classes are. Logits of two and three dimensions have them last by default;
        others must say it, such as images (batch, classes, height, width) with dim=1.
    Raises ValueError if such a `dim` is missing, or if there is only one class."""
    shape = tuple(logits.shape)
    if dim is None:
        _require(len(shape) in (2, 3), "dim", dim, f"the dimension of the classes in {shape}")
    logits = logits.movedim(-1 if dim is None else dim, -1)
    several = "two classes or more; yes/no outputs want sampled_binary_cross_entropy"
    _require(logits.shape[-1] > 1, "logits", shape, several)
    with torch.no_grad():  # the argmax of logits + Gumbel noise; torch.multinomial raises on NaN
        noise = torch.empty_like(logits, dtype=_wide(logits)).exponential_(generator=generator)
        labels = (logits - noise.log_()).argmax(-1)
        if ignore is not None:
            labels = labels.masked_fill(ignore, -100)
    logits = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(logits, labels.reshape(-1))  # -100 is ignored


# ================================================================================================
# You can stop reading here: this was the method. What follows is SAM, the named optimizers, losses
# for other tasks, and helpers. The helpers make IRE exact (the k-th smallest, the probe that leaves
# no trace), resumable (saving and loading) and sharded (DDP, FSDP2 and DTensors on several ranks).
# ================================================================================================


class SAM(_Wrapper):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021) on top of `base`.

    rho: length of the climb, over all parameters together; >= 0. It is an entry of each parameter
        group and scales the climb of this group.
    adaptive: climb in proportion to the weights (ASAM, Kwon et al., ICML 2021).
    average: climb by rho * xi, where xi ~ N(0, I/n) is random and n is the number of coordinates
        (Average SAM).

    For batch norm in the second pass see `frozen_batch_norm`. GradScaler refuses closures: use
    bfloat16, or scale the loss and divide the gradients by a constant in the closure.
    Raises ValueError if an argument is out of range, or if there is no closure.
    """

    def __init__(self, base, *, rho=0.05, adaptive=False, average=False):
        super().__init__(base, rho=rho)
        self.adaptive = adaptive
        self.average = average
        _require(not (adaptive and average), "adaptive", adaptive, "False where average is True")
        _check_settings(self)

    @torch.compiler.disable
    def step(self, closure=None):
        """Takes the gradient, climbs, takes the gradient there, goes back exactly, and lets the
        base step. `closure` does zero_grad, forward and backward and returns the loss. Returns the
        loss before the climb. Average SAM calls `closure` after the climb only, and returns that
        loss. If the first gradient is not finite, the step is skipped with a warning."""
        if _is_rehearsal(self, closure):
            return self.base.step()
        what = "a function that does zero_grad, forward and backward and returns the loss"
        _require(callable(closure), "closure", closure, what)
        _check_settings(self)
        closure = torch.enable_grad()(closure)
        here = None if self.average else closure()
        direction, length = self._at_random() if self.average else self._uphill()
        if not math.isfinite(length):
            _warn(self, f"skipped a step, since the norm of the gradient is {length}")
            return here
        groups = self._params()
        old = {p: _local(p).clone() for p in direction}
        try:
            for p, x in direction.items():
                rho = float(groups[p]["rho"])
                scale = rho / length if length > 0 else 0  # may be too large for float16
                _local(p).add_(x.to(_wide(x)), alpha=scale)
            there = closure()
        finally:
            for p, values in old.items():
                _local(p).copy_(values)
        self.base.step()
        return there if self.average else here

    def _uphill(self):
        """Direction and length: the climb is rho * direction / length. SAM has g and |g|, ASAM has
        T * T * g and |T * g| with T = |theta|."""
        params = [p for p in self._params() if p.grad is not None]
        # T is in float32, as T * T * g may be too small for float16.
        scale = {p: p.detach().to(_wide(p)).abs() if self.adaptive else 1 for p in params}
        scaled = {p: _gradient(p).detach() * scale[p] for p in params}
        square = _total(lambda x: torch.linalg.vector_norm(x, dtype=_wide(x)) ** 2, scaled.values())
        return {p: _local(x * scale[p]) for p, x in scaled.items()}, float(square) ** 0.5

    def _at_random(self):
        """The same for Average SAM: normal directions, equal on all ranks, and the root of n."""
        direction = {}
        for p in [p for p in self._params() if p.requires_grad]:
            x = torch.randn(p.shape, dtype=p.dtype, device=p.device)
            if hasattr(p, "placements"):
                x = dist.tensor.distribute_tensor(x, p.device_mesh, p.placements)
            elif _several_ranks():
                dist.broadcast(x, 0)
            direction[p] = _local(x)
        return direction, sum(p.numel() for p in direction) ** 0.5


# ------------------------------------------------------------------------ named optimizers
class SGDIRE(IRE):
    """IRE on top of torch.optim.SGD, with the keyword arguments of both. Here curvature is "fisher"
    by default, as the probe was better than the squares on images."""

    def __init__(self, params, lr, *, curvature="fisher", **kwargs):
        ire = _arguments_of_ire(kwargs)
        super().__init__(SGD(params, lr, **kwargs), curvature=curvature, **ire)


class AdmIRE(IRE):
    """IRE on top of torch.optim.AdamW, by default the fused one, with the keyword arguments of
    both. AdmIRE is the paper's name."""

    def __init__(self, params, lr, **kwargs):
        ire = _arguments_of_ire(kwargs)
        kwargs.setdefault("fused", not kwargs.get("foreach"))
        super().__init__(AdamW(params, lr, **kwargs), **ire)


class SAMIRE(IRE):
    """IRE on top of SAM on top of `base_cls(params)`, with the keyword arguments of all three."""

    def __init__(self, params, base_cls, *, rho, adaptive=False, average=False, **kwargs):
        ire = _arguments_of_ire(kwargs)
        base = SAM(base_cls(params, **kwargs), rho=rho, adaptive=adaptive, average=average)
        super().__init__(base, **ire)


def _arguments_of_ire(kwargs):
    """Takes IRE's arguments out of kwargs."""
    names = ("kappa", "gamma", "interval", "warmup", "curvature", "beta")
    return {name: kwargs.pop(name) for name in names if name in kwargs}


# ------------------------------------------------------------------------ other losses and tools
def sampled_binary_cross_entropy(logits, *, generator=None):
    """The probe's loss for yes/no and multi-label outputs: mean binary cross entropy of `logits`
    (of any shape) against labels drawn from Bernoulli(sigmoid(logits))."""
    with torch.no_grad():
        noise = torch.empty_like(logits, dtype=_wide(logits)).uniform_(generator=generator)
        labels = (noise < logits.to(noise.dtype).sigmoid()).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, labels)


def sampled_mse(prediction, *, generator=None):
    """The probe's loss for regression: mean squared error of `prediction` against targets drawn
    from N(prediction, 1)."""
    noise = torch.empty_like(prediction).normal_(generator=generator)
    return F.mse_loss(prediction, prediction.detach() + noise)


@contextmanager
def frozen_batch_norm(model):
    """Batch-norm layers of `model` normalise as before but leave their running statistics alone."""
    kind = nn.modules.batchnorm._BatchNorm
    layers = [m for m in model.modules() if isinstance(m, kind) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def hidden_matrices(model):
    """The weight matrices of a transformer's blocks, for `SoftIRE(base, params=...)`. These are the
    parameters of two dimensions inside an nn.ModuleList or nn.Sequential. Embeddings are left out.
    So is a head: the last layer of an nn.Sequential, if it has the last matrix of the model.
    Raises ValueError if there are none."""
    matrices = [p for _, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2]
    inside, apart = set(), set()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            apart.add(module.weight)
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            inside.update(module.parameters())
        if isinstance(module, nn.Sequential) and len(module):
            apart.update(set(module[-1].parameters(recurse=False)) & set(matrices[-1:]))
    found = [p for p in dict.fromkeys(matrices) if p in inside - apart]
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no matrices in an nn.ModuleList")
    return found


# ------------------------------------------------------------------------ the k-th smallest
def kth_smallest(tensors, k):
    """The exact k-th smallest (1-based) absolute value in floating `tensors`, as a 0-dim float32
    tensor on the CPU (float64 if one of them is). NaN is largest. Shards of DTensors count over
    their ranks.
    Raises ValueError if k is not in 1 .. n.

    This is a radix select. The bits of non-negative floats, read as integers, sort as the floats
    do. So a histogram of 65,536 bins for every 16 bits finds the element, without a copy of all
    tensors."""
    tensors = list(tensors)
    n = sum(x.numel() for x in tensors)
    _require(1 <= k <= n, "k", k, f"1 to n = {n}")
    wide = any(x.dtype == torch.float64 for x in tensors)
    floats, ints = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    prefix = None  # the bits that are known

    def histogram(x):  # of the next 16 bits of the elements that begin with `prefix`
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=x.device)
        for piece in x.flatten().split(1 << 20):
            digits = piece.to(floats).abs().view(ints) >> shift
            if prefix is not None:
                digits = digits[digits >> 16 == prefix] & 0xFFFF
            counts += torch.bincount(digits, minlength=1 << 16)
        return counts

    shift = torch.finfo(floats).bits
    while shift > 0:
        shift -= 16
        counts = _total(histogram, tensors)
        digit = int(torch.searchsorted(counts.cumsum(0), k))
        k -= int(counts[:digit].sum())
        prefix = (prefix or 0) << 16 | digit
    return torch.tensor(prefix, dtype=ints, device="cpu").view(floats)


# ------------------------------------------------------------------------ small helpers
def _gradient(p):
    """p's gradient, sharded as p is."""
    _require(not p.grad.is_sparse, "gradient", "a sparse one", "a dense one")
    return p.grad.redistribute(placements=p.placements) if hasattr(p, "placements") else p.grad


def _is_usable(ire, threshold, curvature):
    """False, with a warning, if all curvature is 0 or the threshold is not finite."""
    _check_agreement(threshold, curvature)
    all_zero = threshold == 0 and _nonzero(curvature.values()) == 0
    usable = bool(threshold.isfinite()) and not all_zero
    if not usable:
        _warn(ire, f"the threshold of the curvature is {float(threshold)}, so the last mask stays")
    return usable


def _warn_of_miss(ire):
    ire._missed += 1
    if math.log10(ire._missed).is_integer():  # the 1st, 10th, 100th, ...
        t = ire.param_groups[0]["ire_step"]
        missing = "no gradients in p.grad" if ire.curvature == "squares" else "no probe()"
        _warn(ire, f"{missing} at step {t} ({ire._missed} times so far), so the last mask stays")


def _warn(wrapper, text):
    warnings.warn(f"{type(wrapper).__name__}: {text}", stacklevel=2)


def _begin(kept, p, dtype):
    """This rank's part of kept[p], zeros at first."""
    if p not in kept:
        kept[p] = torch.zeros_like(p, dtype=dtype)
    return _local(kept[p])


def _nonzero(tensors):
    """How many elements are not 0, over all ranks."""
    return int(_total(torch.count_nonzero, tensors))


def _wide(x):
    """x's dtype, or float32 if x has fewer bits."""
    return torch.promote_types(x.dtype, torch.float32)


# ------------------------------------------------------------------------ the probe leaves no trace
_OPEN = set()  # the parameters whose gradients an open probe will put back


@contextmanager
def _put_back(params, models, seed):
    """Afterwards gradients, buffers and random streams are as before. Inside, gradients are None
    and the random streams begin at `seed`, so that labels are drawn anew in every probe. A probe
    inside another one leaves the gradients to be put back by the outer one."""
    if any(p.grad is not None for p in _OPEN.intersection(params)):
        raise RuntimeError("probe(): open it before another one's backward pass")
    params = {*params, *(p for m in models for p in m.parameters())} - _OPEN
    grads = {p: p.grad for p in params}
    if _several_ranks():  # DDP uses the memory of its gradients again
        grads = {p: g if g is None else g.clone() for p, g in grads.items()}
    buffers = _buffers(models)
    devices = {p.device.index for p in params if p.is_cuda}
    _OPEN.update(params)
    try:
        for p in params:
            p.grad = None
        with torch.random.fork_rng(devices):
            # Not torch.manual_seed, which also seeds devices that are not put back.
            torch.default_generator.manual_seed(seed % 2**63)
            for i in devices:
                torch.cuda.default_generators[i].manual_seed(seed % 2**63)
            yield
    finally:
        _OPEN.difference_update(params)
        for p, grad in grads.items():
            p.grad = grad
        for module, name, x, values in buffers:
            # .data hides the change from a graph that holds x since before the probe.
            x.data.copy_(values)
            module._buffers[name] = x


def _buffers(models):
    """[(module, name of a buffer, the buffer, a copy of its values)]"""
    modules = [module for m in models for module in m.modules()]
    return [
        (m, name, x, x.clone()) for m in modules for name, x in m._buffers.items() if x is not None
    ]


# ------------------------------------------------------------------------ saving and loading
# In a saved state, our tensors stand in the entry of each parameter beside the base's own. They are
# looked up after hooks on the base have run, as such hooks may match parameters by name. The base
# must not train with our tensors in its state: Adam does not initialise an entry that is not empty.
_OURS = {"flat", "soft_factor", "ire_square", "ire_count"}


def _kept(ire):
    """{name in a saved state: {p: tensor}}"""
    return {ire._saved_as: ire.masks, "ire_square": ire.squares, "ire_count": ire.counts}


def _keys(ire, saved):
    """Pairs of a parameter and its key in a saved state."""
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    params = [p for group in ire.param_groups for p in group["params"]]  # also twice
    return zip(params, keys, strict=False)  # the base raises if their numbers differ


def _save(ire):
    """The base's state_dict with ours in it. Where there is no mask yet, it has zeros, since
    torch.distributed.checkpoint loads only files with all that `_rehearse` creates."""
    saved = ire.base.state_dict()
    state = dict(saved["state"])
    active = ire._active()
    for p, key in _keys(ire, saved):
        own = {name: kept[p] for name, kept in _kept(ire).items() if p in kept}
        if p in active and (own or key in state):
            own.setdefault(ire._saved_as, torch.zeros_like(p, dtype=_type_of_mask(ire, p)))
        if own:
            state[key] = {**state.get(key, {}), **own}
    return {**saved, "state": state}


def _load(ire, saved):
    """Loads the base's state and our tensors. If the base raises, ours stay as they are."""
    before = [dict(group) for group in ire.param_groups]
    found = {}

    def copy_of_saved():
        return {**saved, "state": dict(saved["state"])}

    def take(_, state):
        entries = state["state"]
        for p, key in _keys(ire, state):
            entry = entries.get(key, {})
            if entry is None:  # ZeRO has put None where another rank has the parameter
                continue
            found[p] = {name: entry[name] for name in _OURS & entry.keys()}
            # An entry of ours alone goes: Adam looks for its `step` in every entry. From the others
            # `_adopt` takes ours out later, since some bases read them again after loading.
            if len(found[p]) == len(entry):
                entries.pop(key, None)

    take(ire, copy_of_saved())  # in case the base calls no hooks
    handle = ire.base.register_load_state_dict_pre_hook(take)
    try:
        ire.base.load_state_dict(copy_of_saved())
    finally:
        handle.remove()
    _adopt(ire, found)
    for group, old in zip(ire.base.param_groups, before, strict=True):
        for name in ire.settings:  # a bare base's state lacks them
            group.setdefault(name, old[name])
    ire.probed = None


def _adopt(ire, found):
    """Replaces our tensors with those of a saved state, {p: {name: tensor}}."""
    kept = _kept(ire)
    for tensors in kept.values():
        tensors.clear()
    for p, own in found.items():
        entry = ire.state.get(p) or {}
        for name, x in own.items():
            entry.pop(name, None)  # the base has taken x for its own
            if name in kept:
                kept[name][p] = x.to("cpu" if name == "ire_count" else p.device, copy=True)
        if not entry:
            ire.state.pop(p, None)


def _is_rehearsal(wrapper, closure):
    """If an optimizer has no state, torch.distributed.checkpoint creates one by a step with lr 0
    and gradients of 0. Returns True in that step, which must not count or warn."""
    still = all(group.get("lr", 1) == 0 for group in wrapper.param_groups)
    grads = [p.grad for p in wrapper._params() if p.grad is not None]
    fits = closure is None and still and grads and not wrapper.state
    return bool(fits and _nonzero(grads) == 0)


def _rehearse(ire):
    """Creates what a saved state holds, with zeros in it. On top of a base without a state, such a
    step also comes in the middle of training. Then our tensors are there and stay."""
    params = {p: group for p, group in ire._active().items() if p.grad is not None}
    ire.base.step()
    if ire.masks or ire.squares:
        return
    _observe(ire, params)
    for p in params:
        _begin(ire.masks, p, _type_of_mask(ire, p))
    for count in ire.counts.values():
        count.zero_()


def _type_of_mask(ire, p):
    return _wide(p) if isinstance(ire, SoftIRE) else torch.bool


# ------------------------------------------------------------------------ ranks
def _local(x):
    """This rank's part of x, without its history."""
    return (x.to_local() if hasattr(x, "to_local") else x).detach()


def _several_ranks():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _total(measure, tensors):
    """The sum of measure(this rank's part of x) over all tensors x, devices and ranks. Replicas are
    alike and count once."""
    totals = {}  # {(device, the groups of ranks that hold shards): sum}
    for x in tensors:
        places = enumerate(getattr(x, "placements", ()))
        groups = [x.device_mesh.get_group(i) for i, place in places if not place.is_replicate()]
        where = (x.device, *groups)
        totals[where] = totals.get(where, 0) + measure(_local(x))
    for (_, *groups), total in totals.items():
        for group in groups:
            dist.all_reduce(total, group=group)
    return sum(total.cpu() for total in totals.values())


def _check_agreement(threshold, params):
    """Raises RuntimeError if the ranks found different thresholds, though plain parameters are
    replicas on all ranks (DDP)."""
    plain = any(not hasattr(p, "placements") for p in params)
    if plain and _several_ranks():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, repr(float(threshold)))
        if len(set(found)) > 1:
            raise RuntimeError(
                "IRE: the ranks differ in their curvature. Their gradients must be averaged as in "
                "training: not under no_sync(), and not through model.module"
            )


# ------------------------------------------------------------------------ settings
def _check_base(wrapper, base, settings):
    """Raises ValueError if `base` does not fit. Marks it as wrapped."""
    name = type(base).__name__
    allowed = "a torch.optim.Optimizer except LBFGS, IRE, and SAM inside SAM"
    fits = isinstance(base, Optimizer) and not isinstance(base, (LBFGS, IRE, type(wrapper)))
    _require(fits, "base", name, allowed)
    for setting in settings:
        _require(setting not in base.defaults, setting, name, f"a base without a {setting}")
    params = [p for group in base.param_groups for p in group["params"]]
    odd = any(p.is_complex() or getattr(p, "_fsdp_flattened", False) for p in params)
    _require(not odd, "base", "complex parameters or those of FSDP1", "real ones, of DDP or FSDP2")
    # Its groups would hold the settings of another wrapper, which would win in silence.
    again = hasattr(base, "_is_wrapped") or "ire_step" in base.param_groups[0]
    fresh = "a new one, which was never wrapped and has not loaded a state of IRE"
    _require(not again, "base", name, fresh)
    base._is_wrapped = True


_RANGES = {
    "curvature": (lambda x: x in ("squares", "fisher"), "squares or fisher"),
    "interval": (lambda x: x >= 1 and x % 1 == 0, "a whole number >= 1"),
    "warmup": (lambda x: x >= 0 and x % 1 == 0, "a whole number >= 0"),
    "beta": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "alpha": (lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "limit": (lambda x: 1 <= x < math.inf, "a finite number >= 1"),
    "kappa": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
    "gamma": (lambda x: 0 < x < 1, "a number in (0, 1)"),
    "rho": (lambda x: 0 <= x < math.inf, "a finite number >= 0"),
}


def _check_settings(wrapper):
    """Raises ValueError for a setting out of range, also for one that was changed later."""
    ranges = _RANGES | wrapper._ranges
    groups = [{name: group[name] for name in wrapper.settings} for group in wrapper.param_groups]
    for settings in [vars(wrapper), *groups]:
        for name in ranges.keys() & settings.keys():
            fits, allowed = ranges[name]
            value = settings[name]
            number = isinstance(value, numbers.Real) or name == "curvature"
            _require(number and fits(value), name, value, allowed)
    for name in wrapper.settings.keys() & vars(wrapper).keys():
        raise ValueError(f"{name}: set it in opt.param_groups, not as opt.{name}")


def _require(fits, name, value, allowed):
    if not fits:
        shown = value if isinstance(value, str) and " " in value else repr(value)
        raise ValueError(f"{name}: got {shown}, allowed is {allowed}")
