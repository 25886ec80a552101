"""The optimizers of benchmarks/speedup.py: IRE with its mask spoiled on purpose, AdamW whose
learning rate jumps, Muon."""

import dataclasses

import torch

import train_gpt
from ire import IRE


# --------------------------------------------------------------------------- spoiled masks
def shuffled(mask, step):
    """The mask's values in another order, drawn from the run's seed and the step."""
    seed = hash((torch.initial_seed(), step, mask.numel())) % 2**63
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(seed))
    return mask.flatten()[order.to(mask.device)].view_as(mask)


class RandomMask(IRE):
    """As many flat coordinates as the curvature gives, anywhere in the model, drawn anew at each
    refresh."""

    def _update_masks(self, curvature):
        super()._update_masks(curvature)
        masks = [self.masks[p] for p in curvature]
        everywhere = shuffled(torch.cat([mask.flatten() for mask in masks]), self._t)
        parts = everywhere.split([mask.numel() for mask in masks])
        for mask, part in zip(masks, parts, strict=True):
            mask.copy_(part.view_as(mask))


class ShuffledMask(IRE):
    """As RandomMask, but every tensor keeps its own number of flat coordinates."""

    def _update_masks(self, curvature):
        super()._update_masks(curvature)
        for p in curvature:
            self.masks[p] = shuffled(self.masks[p], self._t)


class InvertedMask(IRE):
    """The sharp coordinates take the longer steps, the flat ones the base's."""

    def _update_masks(self, curvature):
        super()._update_masks(curvature)
        for p in curvature:
            self.masks[p].logical_not_()


class SharpestMask(IRE):
    """As many coordinates as in the flat mask take the longer steps, but the sharpest."""

    def _update_masks(self, curvature):
        super()._update_masks({p: 1 / h.abs().clamp_min(1e-30) for p, h in curvature.items()})


# --------------------------------------------------------------------------- other changes
class Smooth(IRE):
    """kappa rises from 0 in a straight line over the `rise` steps after warmup, to `top`."""

    def step(self, closure=None):
        share = max(0, self._t - self.warmup + 1) / self.rise
        for group in self.param_groups:
            group["kappa"] = self.top * min(1, share)
        return super().step(closure)


class DecayOnce(IRE):
    """The flat coordinates' step is 1 + kappa times as long without the weight decay's part."""

    @torch.no_grad()
    def step(self, closure=None):
        old = {p: p.clone() for group in self.param_groups for p in group["params"]}
        loss = super().step(closure)
        for group in self.param_groups:
            decay = group["kappa"] * group["lr"] * group["weight_decay"]
            for p in group["params"]:
                p += decay * self.masks[p] * old[p]
        return loss


class Jump(torch.optim.AdamW):
    """AdamW whose lr is `factor` times the schedule's from step `start` on. The caller sets lr
    anew before each step."""

    def __init__(self, groups, factor, start):
        super().__init__(groups)
        self.factor = factor
        self.start = start
        self.steps = 0

    def step(self, closure=None):
        if self.steps >= self.start:
            for group in self.param_groups:
                group["lr"] *= self.factor
        self.steps += 1
        return super().step(closure)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on the hidden matrices with `ratio` times the lr, AdamW on the rest. The caller sets lr
    anew before each step."""

    def __init__(self, model, c, ratio):
        named = model.named_parameters()
        hidden = [p for name, p in named if p.dim() == 2 and "layers" in name]
        self.ratio = ratio
        self.muon = torch.optim.Muon(hidden, c.lr, c.weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = adamw(model, c)
        for group in self.adamw.param_groups:
            group["params"] = [p for p in group["params"] if all(p is not h for h in hidden)]
        groups = [*self.muon.param_groups, *self.adamw.param_groups]
        super().__init__(groups, {})  # the groups themselves, not copies
        self.muon.state = self.adamw.state = self.state

    def step(self, closure=None):
        for group in self.muon.param_groups:
            group["lr"] *= self.ratio
        self.muon.step()
        self.adamw.step()


def adamw(model, c):
    return train_gpt.make_optimizer(model, dataclasses.replace(c, optimizer="adamw"))


SPOILED = {
    "random": RandomMask,
    "shuffled": ShuffledMask,
    "inverted": InvertedMask,
    "sharpest": SharpestMask,
    "smooth": Smooth,
    "decay": DecayOnce,
}


def builder(run):
    """build(model, c) for train_gpt.train: the optimizer of a run."""
    name = (run["ablation"] or "").removeprefix("early ")

    def build(model, c):
        base = (
            MuonAndAdamW(model, c, run["ratio"]) if "muon" in run["optimizer"] else adamw(model, c)
        )
        if run["optimizer"] in ("adamw", "muon"):
            return base
        if name in ("jump", "all"):
            share = c.gamma if name == "jump" else 1
            return Jump(base.param_groups, 1 + c.kappa * share, c.ire_warmup)
        settings = {name: getattr(c, name) for name in ("kappa", "gamma", "interval", "curvature")}
        opt = SPOILED.get(name, IRE)(base, warmup=c.ire_warmup, **settings)
        opt.top = c.kappa
        opt.rise = max(1, c.steps // 5)
        return opt

    return build
