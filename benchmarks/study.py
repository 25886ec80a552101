"""What the studies (speedup.py, map.py) share: runs kept in a file, the search, statistics.

A study's plan asks for runs. Those that the file holds are looked up, the others are trained and
saved at once, so that a study goes on where it stopped.
"""

import contextlib
import copy
import fcntl
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import train_gpt


class NotHeld(Exception):
    """The run is not in the results, and nothing is to be run."""


class Runs:
    """Runs in one JSON file, each a dict with `val_loss`, which is None where it diverged.

    settings_of: run -> the settings, a dict, by which it is found again.
    train: settings -> run, for those that are not held; None: only look up.
    head: () -> what stands before the runs in the file.
    held: the file as it was read.
    """

    def __init__(self, path, settings_of, train=None, head=dict):
        self.path = path
        self.settings_of = settings_of
        self.train = train
        self.head = head
        self.held = json.loads(path.read_text()) if path.exists() else {}
        self.runs = self.held.get("runs", [])
        self.index = {self.key(settings_of(run)): run for run in self.runs}

    @staticmethod
    def key(settings):
        return json.dumps(settings, sort_keys=True)

    def only_held(self):
        """The same runs, without training more."""
        other = copy.copy(self)
        other.train = None
        return other

    def loss(self, settings):
        """Validation loss at the end of the run; infinite where it diverged. Raises NotHeld."""
        key = self.key(settings)
        if key not in self.index:
            if self.train is None:
                raise NotHeld(key)
            self.index[key] = self.train(settings)
            self.runs.append(self.index[key])
            self.save()
        loss = self.index[key]["val_loss"]
        return math.inf if loss is None else loss

    def over(self, settings, seeds):
        """{seed: loss}; where nothing is trained, of those seeds that are held."""
        losses = {}
        for seed in seeds:
            with contextlib.suppress(NotHeld):
                losses[seed] = self.loss({**settings, "seed": seed})
        return losses

    def save(self):
        head = json.dumps({**self.head(), "runs": []}, indent=1)
        runs = ",\n".join("  " + json.dumps(run) for run in self.runs)  # a run a line
        text = head.replace('"runs": []', f'"runs": [\n{runs}\n ]')
        train_gpt.write_atomically(self.path, lambda f: f.write(text.encode()))


@contextlib.contextmanager
def locked(lock, path):
    """Ends the script where another process holds the file `lock`, and so works on `path`."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"{Path(sys.argv[0]).name}: another process works on {path}")
        yield


# --------------------------------------------------------------------------- search
class Spent(Exception):
    """All trials are used."""


def neighbour(grid, point, moves):
    """The point so many places on, {setting: places}; None outside the grid."""
    moved = dict(point)
    for name, move in moves.items():
        place = grid[name].index(point[name]) + move
        if not 0 <= place < len(grid[name]):
            return None
        moved[name] = grid[name][place]
    return moved


def search(start, grid, loss, trials):
    """The best of `trials` points of the grid {setting: values}: along one setting after the other
    from `start`, then, when nothing along one setting is better, along pairs. Returns it with its
    loss and the number of trials."""
    tried = {}

    def value(point):
        key = tuple(sorted(point.items()))
        if key not in tried:
            if len(tried) == trials:
                raise Spent
            tried[key] = loss(point)
        return tried[key]

    def descend(here, moves):
        """As far as it gets better in one direction."""
        near = neighbour(grid, here, moves)
        while near and value(near) < value(here):
            here, near = near, neighbour(grid, near, moves)
        return here

    singles = [{name: move} for name in grid for move in (1, -1)]
    pairs = [a | b for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys()]
    with contextlib.suppress(Spent):
        here = start
        before = None
        value(start)
        while here != before:
            before = here
            for moves in singles:
                here = descend(here, moves)
            for moves in pairs:
                if here == before:
                    here = descend(here, moves)
    best = min(tried, key=tried.get)
    return dict(best), tried[best], len(tried)


# --------------------------------------------------------------------------- statistics
def mean(values):
    """Mean and its standard error (None for a single value)."""
    values = list(values)
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), error


def crossing(curve, target):
    """The length at which the losses {length: loss} come down to `target`, along straight lines
    over log(length), and whether it lies beyond the lengths that were run, on the line through the
    two nearest."""
    lengths = sorted(curve)
    pairs = list(itertools.pairwise(lengths))
    nearest = pairs[0] if target > curve[lengths[0]] else pairs[-1]
    around = (pair for pair in pairs if curve[pair[0]] >= target >= curve[pair[1]])
    a, b = next(around, nearest)
    share = (curve[a] - target) / (curve[a] - curve[b])
    return math.exp(math.log(a) + share * math.log(b / a)), not 0 <= share <= 1


def number(value, error, sign=""):
    """1.2345 ± 0.0012; without the error where there is none."""
    text = f"{value:{sign}.4f}"
    return text if error is None else f"{text} ± {error:.4f}"
