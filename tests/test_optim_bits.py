"""ASGD over whole runs: the bits of torch.optim.ASGD, and of float32 for the half types."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim import optimizer as torch_optimizer
from torch.testing._internal.common_optimizers import optim_db
from twins import NAMES, Twins, entries_of, parameters, same, sealed_or_open

from asgd_fast import ASGD

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
HALVES = [torch.float16, torch.bfloat16]
# In which random numbers can be made.
WIDER = {dtype: dtype for dtype in DTYPES} | {torch.complex32: torch.complex64}
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 3), (1000,)]

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.ASGD)
INPUTS = INFO.optim_inputs_func(device="cpu")
# Those of all optimizers: torch's ASGD entry has one only.
SCHEDULERS = [
    makers
    for info in optim_db
    for makers in info.scheduler_inputs
    if info.optim_cls in (torch.optim.ASGD, torch.optim.SGD, torch.optim.Adam)
]
# Before torch 2.8, eta took the shape of an lr of shape (1,).
LRS = [0.3, torch.tensor(0.3), torch.tensor([0.3]).double()][
    : 2 + hasattr(torch_optimizer, "_to_scalar")
]


own_inputs = pytest.mark.parametrize(
    "options", [i.kwargs for i in INPUTS], ids=[i.desc for i in INPUTS]
)
# None of torch's inputs gets as far as averaging in so few steps.
begins = pytest.mark.parametrize("own", [{}, {"t0": 3}], ids=["as it is", "averaging"])


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@sealed_or_open
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex32], ids=str)
@own_inputs
@begins
def test_torchs_own_inputs(own, options, dtype, looks):
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters(*SHAPES, dtype=WIDER[dtype])]
    twins = Twins(params, looks=looks, **{**options, **own})
    twins.run(20)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@own_inputs
@begins
def test_torchs_own_inputs_in_half_types(own, options, dtype):
    """Each step is torch's of float32 over the same numbers, its results rounded once."""
    halves = [nn.Parameter(p.detach().to(dtype)) for p in parameters(*SHAPES)]
    ours = ASGD(halves, **{**options, **own})
    precise = [nn.Parameter(p.detach().float()) for p in halves]
    theirs = torch.optim.ASGD(precise, foreach=False, **{**options, **own})
    for _ in range(20):
        for p, q in zip(halves, precise, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        entries = entries_of(ours)
        for p, q in zip(halves, precise, strict=True):
            entry, wanted = entries[p], theirs.state[q]
            for name in ("step", "eta", "mu"):
                same(entry[name], wanted[name])
            same(p.detach(), q.detach().to(dtype))
            same(entry["ax"], wanted["ax"].to(dtype))
            q.data = p.detach().float()
            wanted["ax"].copy_(entry["ax"])


@sealed_or_open
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("t0", [0, 5, 12.5, -3])
@pytest.mark.parametrize("lr", LRS, ids=str)
def test_params_that_skip_steps(simd_level, lr, t0, weight_decay, dtype, looks):
    options = {"lr": lr, "lambd": 1e-2, "t0": t0, "weight_decay": weight_decay}
    twins = Twins(parameters(*SHAPES, dtype=dtype), looks=looks, **options)
    twins.run(30, skip=lambda k, i: k % (i + 2) == 0)


@sealed_or_open
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_by_default(double_scalars, dtype, looks):
    twins = Twins(parameters(*SHAPES, dtype=dtype), looks=looks, lr=0.1, lambd=1e-2, t0=10)
    twins.run(30)
    assert twins.ours.state[twins.params[0]]["eta"].dtype == torch.float64


@sealed_or_open
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=str)
def test_a_first_step_with_lr_and_gradients_of_0_counts(lr, looks):
    """As a warm-up has it; torch's checkpoints have states made by such a step of their own."""
    twins = Twins(parameters((3,), (2, 2)), looks=looks, lr=lr, lambd=1e-2, t0=2)
    twins.step([torch.zeros_like(p) for p in twins.params])
    for optimizer, _ in twins.sides:
        optimizer.param_groups[0]["lr"] = 0.3
    twins.run(6)


@sealed_or_open
def test_200_params(looks):
    twins = Twins(parameters(*[(3,)] * 200), looks=looks, lr=0.1, lambd=1e-2, t0=5)
    twins.run(12, skip=lambda k, i: (i * 7 + k) % 5 == 0)


@sealed_or_open
def test_groups_with_hyperparameters_of_their_own(looks):
    def groups(own):
        return [
            {"params": own[:2], "lr": 0.5},
            {"params": own[2:4], "lambd": 0.1, "alpha": 0.5, "t0": 3},
            {"params": own[4], "weight_decay": 0.2, "maximize": True},
            {"params": own[5:], "lr": torch.tensor(0.2), "weight_decay": 0.2},
        ]

    twins = Twins(parameters(*SHAPES), groups, looks=looks, lr=0.1)
    twins.run(20)


@sealed_or_open
def test_groups_that_come_later(looks):
    twins = Twins(parameters((3,), (4,)), looks=looks)
    twins.run(3)
    for optimizer, own in twins.sides:
        extra = parameters((5,), (6,), seed=1)
        optimizer.add_param_group({"params": extra, "lr": 0.7, "t0": 0})
        own += extra
    twins.run(5)


@pytest.mark.skipif("named_param" not in torch.optim.SGD.__doc__, reason="new in torch 2.6")
def test_named_params():
    params = parameters((3,), (4,))
    named = ASGD([("weight", params[0]), ("bias", params[1])])
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]
    assert named.param_groups[0]["params"] == params


@sealed_or_open
@pytest.mark.parametrize("makers", SCHEDULERS, ids=lambda makers: f"{len(makers)} at once")
def test_torchs_schedulers(makers, looks):
    twins = Twins(parameters((5,), (2, 3)), looks=looks, lr=0.5, lambd=1e-3, t0=4)
    both = [[make(optimizer) for make in makers] for optimizer in (twins.ours, twins.theirs)]
    for _ in range(15):
        twins.step()
        twins.check()
        for schedulers in both:
            for scheduler in schedulers:
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([torch.tensor(1.0)] if plateau else []))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=20, cycle_momentum=False),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=3, cycle_momentum=False),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.5 / (k + 1)),
        lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
        lambda o: lr_scheduler.MultiStepLR(o, [3, 6]),
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=6),
        lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=4),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
        ),
    ],
    ids=[
        "1cycle",
        "cyclic",
        "restarts",
        "cosine",
        "lambda",
        "mult",
        "multi",
        "poly",
        "swa",
        "seq",
        "chain",
    ],
)
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
@sealed_or_open
def test_other_schedulers(looks, make, lr):
    own = lr.clone() if isinstance(lr, torch.Tensor) else lr
    twins = Twins(parameters((5,), (2, 3)), looks=looks, lr=own, t0=4)
    if isinstance(lr, torch.Tensor):  # each its own, as schedulers fill it
        twins.theirs.param_groups[0]["lr"] = lr.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of torch's schedulers warn of themselves
        schedulers = [make(optimizer) for optimizer in (twins.ours, twins.theirs)]
        for _ in range(12):
            twins.step()
            twins.check()
            for scheduler in schedulers:
                scheduler.step()


@sealed_or_open
def test_hyperparameters_changed_between_steps(looks):
    twins = Twins(parameters((5,), (2, 3)), looks=looks, lr=0.5)
    changes = [
        {"lr": 0.1},
        {"lambd": 0.05},
        {"alpha": 1.0},
        {"t0": 0},
        {"weight_decay": 0.3},
        {"maximize": True},
        {"lr": torch.tensor(0.2)},
        {"lr": -0.01},  # what a scheduler may well overshoot to
    ]
    for change in changes:
        for optimizer in (twins.ours, twins.theirs):
            optimizer.param_groups[0].update(change)
        twins.run(4)


def small_convolutional_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolutional_network_for_100_steps(memory_format):
    outcomes = []
    for optimizer_type, options in ((ASGD, {}), (torch.optim.ASGD, {"foreach": False})):
        model = small_convolutional_network().to(memory_format=memory_format)
        optimizer = optimizer_type(
            model.parameters(), lr=0.05, lambd=1e-3, t0=60, weight_decay=1e-4, **options
        )
        torch.manual_seed(1)
        losses = []
        for _ in range(100):
            images = torch.randn(8, 3, 12, 12).to(memory_format=memory_format)
            loss = nn.functional.cross_entropy(model(images), torch.randint(10, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        state = [optimizer.state[p][name] for p in model.parameters() for name in NAMES]
        outcomes.append((losses, [*model.state_dict().values(), *state]))
    (our_losses, ours), (their_losses, theirs) = outcomes
    assert our_losses == their_losses
    for one, other in zip(ours, theirs, strict=True):
        same(one, other)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("mu", [1.0, 0.3])
@pytest.mark.parametrize("n", [1, 255, 256, 257, pytest.param(20_000, marks=pytest.mark.heavy)])
def test_one_step_of_half_types_is_as_near_to_float32_as_can_be(
    simd_level, n, mu, weight_decay, dtype
):
    """Element by element: ours is float32's result rounded once, and torch's is no nearer."""
    torch.manual_seed(n)
    twins = Twins(
        [nn.Parameter(torch.randn(n).to(dtype))],
        lr=0.3,
        lambd=0.1,
        weight_decay=weight_decay,
        lazy_average=False,
    )
    precise = Twins(
        [p.detach().float().requires_grad_() for p in twins.params],
        lr=0.3,
        lambd=0.1,
        weight_decay=weight_decay,
        lazy_average=False,
    )
    ax = torch.randn(n).to(dtype)
    for pair in (twins, precise):
        pair.step([torch.zeros_like(p) for p in pair.params])
        with torch.no_grad():
            for optimizer, own in ((pair.ours, pair.params), (pair.theirs, pair.theirs_params)):
                own[0].copy_(twins.params[0].float())
                optimizer.state[own[0]]["mu"].fill_(mu)
                optimizer.state[own[0]]["ax"].copy_(ax)
    grad = torch.randn(n).to(dtype)
    twins.step([grad])
    precise.step([grad.float()])
    precise.check()
    for pick in (lambda o, p: p.detach(), lambda o, p: o.state[p]["ax"]):
        right = pick(precise.theirs, precise.theirs_params[0])
        ours = pick(twins.ours, twins.params[0])
        theirs = pick(twins.theirs, twins.theirs_params[0])
        assert torch.equal(ours, right.to(dtype))
        assert ((ours - right).abs() <= (theirs - right).abs()).all()


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_a_run_of_half_types_is_nearer_to_float32_than_torchs(seed, dtype):
    torch.manual_seed(seed)
    start = torch.randn(2000).to(dtype)
    twins = Twins([nn.Parameter(start.clone())], lr=0.05, lambd=1e-2, t0=50)
    precise = Twins([nn.Parameter(start.float())], lr=0.05, lambd=1e-2, t0=50)
    for _ in range(150):
        grad = torch.randn(2000).to(dtype)
        twins.step([grad])
        precise.step([grad.float()])
    precise.check()
    for pick in (lambda o, p: p.detach(), lambda o, p: o.state[p]["ax"]):
        right = pick(precise.theirs, precise.theirs_params[0])
        ours = (pick(twins.ours, twins.params[0]) - right).norm()
        theirs = (pick(twins.theirs, twins.theirs_params[0]) - right).norm()
        assert ours <= theirs


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_number_is_read_and_written_exactly(simd_level, dtype):
    """A step of 0 leaves all 65,536 bit patterns as they are, but for the payload of nans."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    param = nn.Parameter(every.clone())
    optimizer = ASGD([param], lr=0.0, lambd=0.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    for result in (param.detach(), optimizer.state[param]["ax"]):
        nan = every.isnan()
        assert torch.equal(result[~nan].view(torch.int16), every[~nan].view(torch.int16))
        assert result[nan].isnan().all()
        # The quiet bit is set, and the digits of the payload stay.
        quiet = 0x200 if dtype == torch.float16 else 0x40
        assert torch.equal(result[nan].view(torch.int16), every[nan].view(torch.int16) | quiet)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_round_as_torch_rounds(simd_level, dtype):
    """p - g is exact in float32 for most of these; ties, subnormals and overflow included."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-(2**15), 2**15, (2, 200_000), generator=generator)
    p, g = integers.to(torch.int16).view(dtype)
    g = torch.where(torch.arange(len(g)) % 2 == 0, g, p * 0.0017)  # near, so that digits are lost
    param = nn.Parameter(p.clone())
    optimizer = ASGD([param], lr=1.0, lambd=0.0)
    param.grad = g
    optimizer.step()
    expected = (p.float() - g.float()).to(dtype)
    number = ~expected.isnan()
    assert torch.equal(param.detach()[number].view(torch.int16), expected[number].view(torch.int16))
    assert param.detach()[~number].isnan().all()


@pytest.mark.parametrize("name", ["eta", "mu", "weight_decay"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scalars_that_are_nan_make_nans_of_half_types(simd_level, dtype, name):
    """With any payload: the largest ones would carry into the sign if they were rounded."""
    generator = torch.Generator().manual_seed(0)
    payloads = torch.randint(2**51, 2**52, (20,), generator=generator)
    largest = torch.randint(2**52 - 2**44, 2**52, (20,), generator=generator)
    bits = torch.cat([payloads, largest, torch.tensor([2**52 - 1])]) + (0x7FF << 52)
    nans = bits.view(torch.float64)
    nans = torch.cat([nans, -nans])
    start, grad = torch.randn(2, 70, generator=generator).to(dtype)
    for nan in nans.tolist():
        half, precise = nn.Parameter(start.clone()), nn.Parameter(start.float())
        ours = ASGD([half], lazy_average=False)
        theirs = torch.optim.ASGD([precise], foreach=False)
        for optimizer, param in ((ours, half), (theirs, precise)):
            param.grad = grad.to(param.dtype)
            optimizer.step()
            if name == "weight_decay":
                optimizer.param_groups[0][name] = nan
            else:
                optimizer.state[param][name].fill_(nan)
            optimizer.step()
        for one, other in ((half, precise), (ours.state[half]["ax"], theirs.state[precise]["ax"])):
            assert torch.equal(one.isnan(), other.to(dtype).isnan())


@pytest.mark.parametrize(
    "lrs",
    [
        (torch.tensor(0.1), float(torch.tensor(0.1))),
        (float(torch.tensor(0.1)), torch.tensor(0.1)),
        (torch.tensor(0.1), torch.tensor(float(torch.tensor(0.1)), dtype=torch.float64)),
        (0.0, -0.0),
    ],
    ids=["tensor, number", "number, tensor", "two dtypes", "two zeros"],
)
def test_groups_whose_lr_differs_in_kind_alone(lrs):
    params = [nn.Parameter(torch.full((3,), -0.0)) for _ in lrs]

    def groups(own):
        return [{"params": [p], "lr": lr} for p, lr in zip(own, lrs, strict=True)]

    twins = Twins(params, groups, lambd=0.3, alpha=0.7, t0=3)
    for p, q in zip(twins.params, twins.theirs_params, strict=True):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
    for _ in range(20):
        twins.ours.step()
        twins.theirs.step()
        twins.check()


def test_a_tensor_as_lr_where_torchs_function_steps_for_own_keywords():
    """Each second iterate only: eta is still torch's."""
    lr = torch.tensor(0.1)
    twins = Twins([nn.Parameter(torch.ones(6)[::2])], lr=lr, lambd=0.3, alpha=0.7, t0=3)
    every = ASGD([nn.Parameter(torch.ones(6)[::2])], lr=lr, lambd=0.3, alpha=0.7, average_every=2)
    (p,) = every.param_groups[0]["params"]
    for _ in range(20):
        p.grad = torch.ones(3)
        every.step()
        twins.step([torch.ones(3)])
        same(every.state[p]["eta"], twins.theirs.state[twins.theirs_params[0]]["eta"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("looks", [False, True])
def test_params_of_no_dimension_with_double_scalars(looks, dtype, double_scalars):
    """Torch promotes such a param to the dtype of mu while it averages."""
    twins = Twins(parameters((), (3,), dtype=dtype), looks=looks, lr=0.3, lambd=0.1, t0=0)
    twins.run(12)
