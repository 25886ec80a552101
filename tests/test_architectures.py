"""benchmarks/architectures.py: the models, the edge of stability, a run of each kind, and what
others reach on the same data."""

import collections
import math
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import architectures
import study
import text
import train_gpt

ROOT = Path(__file__).resolve().parents[1]

sklearn = pytest.importorskip("sklearn")


def held():
    return study.Study.read(ROOT / "results" / "architectures.json")


# --------------------------------------------------------------------------- the models
def test_a_selective_state_space_is_its_recurrence():
    layer = architectures.Selective(8, heads=2, state=4).double()
    u = torch.randn(3, 7, 8, dtype=torch.double)
    parts = layer.enter(layer.norm(u)).split(layer.parts, -1)
    x, gate, B, C, delta = parts
    x = F.silu(layer.near(x.mT)[..., :7]).mT.unflatten(-1, (2, -1))  # (batch, time, heads, d)
    delta = F.softplus(delta + layer.delta)
    h = torch.zeros(3, 2, 8, 4, dtype=torch.double)  # (batch, heads, d, state)
    rows = []
    for t in range(7):
        kept = torch.exp(-delta[:, t] * layer.rate.exp())[..., None, None]
        new = delta[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, None, None]
        h = kept * h + new
        rows.append((h * C[:, t, None, None]).sum(-1) + layer.skip * x[:, t])
    y = torch.stack(rows, 1).flatten(-2)
    torch.testing.assert_close(layer(u), u + layer.leave(y * F.silu(gate)))


@pytest.mark.parametrize("task", ["lstm", "ssm"])
def test_readers_do_not_see_the_future(task):
    lstm, ssm = architectures.LSTM(8, 8, batch_first=True), architectures.Selective(8, 2, 4)
    model = architectures.Reader(8, lstm if task == "lstm" else ssm)
    tokens = torch.randint(256, (2, 9))
    other = tokens.clone()
    other[:, 5:] = torch.randint(256, (2, 4))
    a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_digits_are_split_by_the_seed():
    c = train_gpt.Config(seed=3, batch_size=64)
    few, many = architectures.Digits(c, True), architectures.Digits(c, False)
    assert few.y[few.train].bincount().tolist() == [10] * 10
    assert len(many.train) == 1200
    for task in (few, many):
        assert sorted([*task.train.tolist(), *task.held_out.tolist()]) == list(range(1797))
    other = architectures.Digits(train_gpt.Config(seed=4, batch_size=64), False)
    assert not torch.equal(many.train, other.train)


def test_the_graph_is_normalised():
    graph = architectures.digits()[2].to_dense()
    assert torch.equal(graph, graph.T)
    assert (graph.diagonal() > 0).all() and ((graph > 0).sum(1) > 10).all()
    assert torch.linalg.eigvalsh(graph)[-1].item() == pytest.approx(1, abs=1e-4)


# --------------------------------------------------------------------------- what is measured
class Bowl(nn.Module):
    """The loss is half of curvature * w^2."""

    def __init__(self, curvature):
        super().__init__()
        self.w = nn.Parameter(torch.ones(len(curvature)))
        self.curvature = curvature

    def forward(self, x, y):
        return (self.curvature * self.w**2).sum() / 2


def test_edges_of_a_quadratic():
    """After one step of Adam, v is the squared gradient, so S H S is lr * curvature / curvature,
    times 1 + kappa where the mask is True. Flat alone: the same without kappa."""
    model = Bowl(torch.tensor([100.0, 10.0, 1.0, 0.1, 0.01]))
    c = train_gpt.Config(lr=0.19, beta1=0.9, beta2=0.98, eps=1e-12, eval_interval=1)
    base = torch.optim.AdamW(model.parameters(), lr=c.lr, betas=(0.9, 0.98), weight_decay=0.0)
    optimizer = architectures.IRE(base, kappa=3.0, gamma=0.6)
    model(None, None).backward()
    with torch.no_grad():
        start = model.w.clone()
    optimizer.step()
    with torch.no_grad():
        model.w.copy_(start)
    found = {}
    architectures.edges(model, optimizer, c, (None, None), found)
    limit = 2 * 1.9 / 0.1
    assert found[1]["flat_edge"] == pytest.approx(0.19 / limit, rel=0.05)
    assert found[1]["edge"] == pytest.approx(4 * 0.19 / limit, rel=0.05)


def test_kappa_follows_the_learning_rate():
    c = train_gpt.Config(lr=0.1, kappa=4.0)
    w = nn.Parameter(torch.ones(3))
    base = torch.optim.AdamW([{"params": [w], "lr_scale": 4.0, "lr": 0.2}])
    optimizer = architectures.IRE(base, kappa=4.0, gamma=0.5)
    architectures.follow(optimizer, c)
    assert optimizer.param_groups[0]["kappa"] == pytest.approx(2.0)


def test_distance_from_the_line():
    base = [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]
    value, error = architectures.above(base, [(0.5, 3.0), (1.5, 5.0)])
    assert value == pytest.approx(1.0) and error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "place, form, kind",
    [
        ("mlp", "SGD-IRE", architectures.IRE),
        ("gcn", "SoftIRE", architectures.SoftIRE),
        ("ssm", "AdmIRE", architectures.IRE),
    ],
)
def test_a_small_run(place, form, kind, tmp_path, monkeypatch):
    made = []
    make = architectures.make_optimizer

    def spied(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(architectures, "make_optimizer", spied)
    own = held()
    own.plan["places"][place] |= {"steps": 3, "settings": {"context": 8}}
    own.plan["fixed"] |= {"eval_sequences": 16, "data_dir": str(tmp_path)}
    (tmp_path / "text.txt").write_text("abcdefgh" * 400)
    own.plan["fixed"]["data"] = str(tmp_path / "text.txt")
    settings = {**own.plan["start"], **own.form(form)["settings"]}
    settings |= {"place": place, "form": form, "seed": 1}
    run = study.recorded(architectures.train, own, settings)
    assert type(made[0]) is kind
    assert 0 < run["val_loss"] < 10 and 0 < run["zero_share"] < 1 and run["spread"] > 0


# --------------------------------------------------------------------------- the references
def reference(place):
    """What the file says that others reach."""
    (value,) = held().plan["references"][place].values()
    return value


def test_the_base_reaches_the_references_on_the_digits():
    own = held()
    for row in study.gains(own):
        place, name = row["place"], row["form"]
        if name == row["base"] and place in ("mlp", "gcn"):
            settings, _ = study.tuned(own, place, name)
            runs = [own.index[study.key({**settings, "seed": seed})] for seed in row["seeds"]]
            assert statistics.mean(run["accuracy"] for run in runs) > reference(place) - 0.5


def test_reference_mlp():
    from sklearn.neural_network import MLPClassifier

    reached = []
    for seed in (1, 2, 3):
        task = architectures.Digits(train_gpt.Config(seed=seed), False)
        x, y = task.x.numpy(), task.y.numpy()
        other = MLPClassifier((128, 128), max_iter=100, random_state=seed, tol=1e-3)
        other.fit(x[task.train], y[task.train])
        reached.append(100 * other.score(x[task.held_out], y[task.held_out]))
    assert statistics.mean(reached) == pytest.approx(reference("mlp"), abs=0.3)


def test_reference_gcn():
    from sklearn.semi_supervised import LabelSpreading

    reached = []
    for seed in (1, 2, 3, 4, 5):
        task = architectures.Digits(train_gpt.Config(seed=seed), True)
        labels = torch.full_like(task.y, -1)
        labels[task.train] = task.y[task.train]
        other = LabelSpreading(kernel="knn", n_neighbors=10).fit(task.x.numpy(), labels.numpy())
        found = torch.from_numpy(other.transduction_[task.held_out])
        reached.append(100 * (found == task.y[task.held_out]).float().mean().item())
    assert statistics.mean(reached) == pytest.approx(reference("gcn"), abs=0.3)


def ngram_loss(seen, rows, order=5):
    """Bytes after contexts of 5 bytes and fewer, mixed as Witten & Bell do."""
    counts = collections.defaultdict(collections.Counter)
    for row in seen:
        for i in range(1, len(row)):
            for n in range(min(order, i) + 1):
                counts[row[i - n : i]][row[i]] += 1
    totals = {context: found.total() for context, found in counts.items()}
    losses = []
    for row in rows:
        for i in range(1, len(row)):
            share = 1 / 256
            for n in range(min(order, i) + 1):
                context = row[i - n : i]
                if context in totals:
                    kinds = len(counts[context])
                    share = (counts[context][row[i]] + kinds * share) / (totals[context] + kinds)
            losses.append(-math.log(share))
    return statistics.mean(losses)


@pytest.mark.parametrize("place", ["lstm", "ssm"])
def test_reference_on_bytes(place):
    """The text is that of the Python that runs, so it differs a little from the file's."""
    shape = held().plan["places"][place]
    size = {"batch_size": shape["batch"], "micro_batch": shape["batch"], **shape["settings"]}
    c = train_gpt.Config(**size, seed=1, device="cpu", eval_sequences=64, out="runs/reference")
    data = text.Data(c)

    def rows(pairs):
        lists = [(x.tolist(), y.tolist()) for x, y in pairs]
        return [bytes([*x[:1], *y]) for xs, ys in lists for x, y in zip(xs, ys)]

    seen = [pair for step in range(shape["steps"]) for pair in data.batch(step)]
    loss = ngram_loss(rows(seen), rows(data.validation()))
    assert loss == pytest.approx(reference(place), abs=0.1)
