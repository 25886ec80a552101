"""IRE on top of every optimizer that torch has, in mixed precision, in compiled steps and in the
trainers of other libraries."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.testing._internal.common_optimizers import optim_db
from training import CURVATURES, batch, equal, make_model, train, values

from ire import IRE, AdmIRE

# That import forbids all after it to set the backends' flags, also the scripts in their tests.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

REFUSED = {"LBFGS": "line search", "SparseAdam": "sparse gradients"}
CASES = [
    pytest.param(info.optim_cls, case.kwargs, id=f"{info.optim_cls.__name__}-{case.desc}-{i}")
    for info in optim_db
    if info.optim_cls.__name__ not in REFUSED
    for i, case in enumerate(info.optim_inputs_func(device="cpu"))
    if not case.kwargs.get("differentiable")
]  # needs a graph through the step, which no training step has


def weights(cls):
    torch.manual_seed(0)
    shapes = [(4, 5), (5, 3)] if cls.__name__ == "Muon" else [(4, 5), (5,), (5, 3), ()]
    return [nn.Parameter(torch.randn(s, dtype=torch.float32)) for s in shapes]


def gradients(params, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    for p in params:
        p.grad = None
    matrices = [p for p in params if p.dim() == 2]
    rest = [p for p in params if p.dim() < 2] or [0, 1]
    ((torch.tanh(x @ matrices[0] + rest[0]) @ matrices[1] * rest[1]) - 1).square().mean().backward()


def run(params, opt, steps):
    for step in steps:
        gradients(params, step)
        opt.step()
    return [p.detach().clone() for p in params]


@pytest.mark.filterwarnings("ignore")  # of capturable on a CPU and the like: the base's own
@pytest.mark.parametrize("cls, kwargs", CASES)
def test_torchs_own_optimizers(cls, kwargs):
    """kappa 0 follows bit for bit through scheduling, editing and saving; kappa 1 doubles the step
    of the flat coordinates."""

    def start(kappa):
        params = weights(cls)
        base = cls(params, **copy.deepcopy(kwargs))
        return params, base if kappa is None else IRE(base, kappa=kappa, gamma=0.5, interval=2)

    one, base = start(None)
    two, opt = start(0)
    schedules = [StepLR(o, 2, 0.5) for o in (base, opt)]
    for step in range(6):
        assert equal(run(one, base, [step]), run(two, opt, [step]))
        for s in schedules:
            s.step()
        if step == 3:
            for o in (base, opt):
                o.param_groups[0]["weight_decay"] = 0.25
            state = opt.state_dict()
            opt = IRE(cls(two, **copy.deepcopy(kwargs)), kappa=0, gamma=0.5, interval=2)
            opt.load_state_dict(state)
            schedules[1].optimizer = opt
    opt.param_groups[0]["kappa"] = 1
    opt.interval = 1
    before = [p.detach().clone() for p in two]
    for s, t, b, p in zip(before, run(two, opt, [6]), run(one, base, [6]), two):
        flat = opt.masks[p]
        assert torch.equal(t[~flat], b[~flat])
        torch.testing.assert_close(t[flat] - s[flat], 2 * (b[flat] - s[flat]), rtol=1e-3, atol=1e-5)
    assert opt.flat_share()["flat"] >= 0.48


def test_names_in_torchs_list():
    """The list above would shrink silently if torch renamed it."""
    names = {case.id.split("-")[0] for case in CASES}
    assert names >= {"SGD", "RMSprop", "Adam", "AdamW", "NAdam", "Adagrad", "Adafactor"}
    assert ("Muon" in names) == hasattr(torch.optim, "Muon")


# ---------------------------------------------------------------- mixed precision
def scaled_backward(model, scaler, step):
    x, y = batch(step)
    scaler.scale(F.cross_entropy(model(x), y)).backward()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_grad_scaler_skips_as_for_the_base(fused, curvature):
    model = make_model()
    settings = dict(kappa=2, gamma=0.5, interval=2, curvature=curvature)
    opt = AdmIRE(model.parameters(), 0.01, fused=fused, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        if opt.probe_due:
            with opt.probe(model):
                scaled_backward(model, scaler, step)
        before = copy.deepcopy((model.state_dict(), opt.state_dict()))
        opt.zero_grad()
        scaled_backward(model, scaler, step)
        if step == 2:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(opt)
        scaler.update()
        same = equal(before[0].values(), model.state_dict().values())
        assert same == (step == 2) == (str(before[1]) == str(opt.state_dict()))
    assert all(p.isfinite().all() for p in model.parameters())


def test_grad_scaler_does_not_change_the_mask():
    """Squares are of the gradients without the scale, also where the base unscales them itself."""
    found = []
    for fused in (None, False, True):
        model = make_model()
        base = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        opt = IRE(base, kappa=1, gamma=0.5, interval=2)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**10, growth_interval=1, enabled=fused is not None
        )
        for step in range(5):
            opt.zero_grad()
            scaled_backward(model, scaler, step)
            scaler.step(opt)
            scaler.update()
        found.append([*opt.masks.values()])
    assert equal(found[0], found[1]) and equal(found[0], found[2])


# ---------------------------------------------------------------- compiled
@pytest.mark.parametrize("curvature", CURVATURES)
def test_compiled_model_and_compiled_step(curvature):
    """The model's graph serves training and probe; a step inside the compiled function breaks the
    graph, no more."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make_model()
        settings = dict(kappa=2, gamma=0.5, interval=2, warmup=1, curvature=curvature)
        opt = AdmIRE(model.parameters(), 0.01, **settings)
        forward = torch.compile(model, backend="aot_eager") if compiled else model

        def step(x, y):
            opt.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            opt.step()

        run_step = torch.compile(step, backend="aot_eager") if compiled else step
        for t in range(5):
            x, y = batch(t)
            if opt.probe_due:
                with opt.probe():
                    F.cross_entropy(forward(x), y.flip(0)).backward()
            run_step(x, y)
        results.append(values(model))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- trainers of other libraries
STEPS = 6


@pytest.mark.slow
def test_lightning():
    lightning = pytest.importorskip("lightning")
    model, twin = make_model(), make_model()
    by_hand = IRE(AdamW(twin.parameters(), 0.01), kappa=1, gamma=0.6, interval=2)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, xy):
            return F.cross_entropy(self.model(xy[0]), xy[1])

        def configure_optimizers(self):
            return IRE(AdamW(self.parameters(), 0.01), kappa=1, gamma=0.6, interval=2)

    settings = dict(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    data = torch.utils.data.DataLoader([batch(step) for step in range(STEPS)], batch_size=None)
    lightning.Trainer(**settings, enable_progress_bar=False).fit(Module(), data)
    assert equal(train(twin, by_hand, range(STEPS)), values(model))


@pytest.mark.slow
def test_hugging_face_trainer_with_peft_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, x, labels):
            return {"loss": F.cross_entropy(self.body(x), labels)}

    examples = [
        {"x": x, "labels": y} for step in range(STEPS) for x, y in zip(*batch(step), strict=True)
    ]

    def run(cls, **resume):
        lora = peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
        model = peft.inject_adapter_in_model(lora, Net())
        adapters = [p for p in model.parameters() if p.requires_grad]
        base = AdamW(adapters, 0.01)
        opt = base if cls is None else cls(base, kappa=1, gamma=0.6, interval=2)
        settings = dict(max_steps=STEPS, save_steps=3, per_device_train_batch_size=16)
        settings |= dict(lr_scheduler_type="constant", report_to=[], use_cpu=True)
        args = transformers.TrainingArguments(tmp_path, disable_tqdm=True, **settings)
        trainer = transformers.Trainer(model, args, train_dataset=examples, optimizers=(opt, None))
        trainer.train(**resume)
        return [p.detach().clone() for p in adapters]

    whole = run(IRE)
    resumed = run(IRE, resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert equal(whole, resumed) and not equal(whole, run(None))
