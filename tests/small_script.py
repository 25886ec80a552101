"""The smallest script on common.py, for test_common.py: a random walk of a hundred numbers."""

import dataclasses

import torch

import common

PRESETS = {"short": {}, "long": {"steps": 60, "optimizer": "adam"}}


@dataclasses.dataclass
class Config(common.Settings):
    home = "runs/small"

    preset: str = common.setting("short", "where to begin", tuple(PRESETS))
    steps: int = common.setting(10, "steps of the walk", common.COUNT)
    lr: float = common.setting(0.1, "length of a step", common.POSITIVE)
    optimizer: str = common.setting("sgd", "100% for the test", ("sgd", "adam"))
    momentum: float = common.setting(0.9, "of SGD", common.DECAY, of=("sgd",))
    save_interval: int = common.setting(3, "steps between checkpoints", common.COUNT, resume=True)
    label: str = common.setting("", "may be empty", resume=True)


def configure(typed):
    given = common.collect(Config, typed)
    c = Config(**PRESETS.get(given.get("preset"), {}) | given)
    common.refuse_unread(Config, typed, [c.optimizer], f"--optimizer {c.optimizer}")
    return c


def walk(typed):
    c = configure(typed)
    common.choose_device(c)
    common.choose_folder(c)
    common.set_up_torch(c)
    if c.label == "fails" and common.RANK == 1:
        raise OSError("no such disk on this machine")
    x = torch.zeros(100)
    step = 0
    with common.Run(c, c.steps) as run:
        if c.resume:
            saved = run.load()
            step, x = saved["step"], saved["x"]
        run.start_clock()
        while step < c.steps:
            torch.manual_seed(step)
            x = c.momentum * x + c.lr * torch.randn(100)
            step += 1
            loss = common.over_ranks([x.square().mean()])[0] / common.RANKS
            stopping = run.asked_to_stop()
            run.stop_clock()
            run.log(step, loss=loss, norm=float("inf"), numbers_per_second=100)
            run.check_finite(step, [loss if loss < 1e6 else float("nan")], "a lower --lr")
            if step % c.save_interval == 0 or step == c.steps or stopping:
                run.save(step, x=x)
            if stopping and step < c.steps:
                raise run.stopped()
            run.start_clock()
    common.say(walked=f"{step} steps")


def main(arguments=None):
    return common.main(Config, __doc__, walk, arguments, "take fewer numbers")


if __name__ == "__main__":
    common.leave(main())
