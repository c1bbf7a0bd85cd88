"""ASGD over tensors of every kind: layouts, views, devices, subclasses, and autograd beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import NAMES, Twins, bits, parameters, same, sealed_or_open

from asgd_fast import ASGD
from asgd_fast._torch import fallback

OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": 2, "weight_decay": 0.01}
STEPS = 7


@pytest.fixture
def by_torch(monkeypatch):
    """How many params have gone to torch's own function."""
    counts = []
    original = fallback.torch_asgd

    def counting(params, *arguments, **options):
        counts.append(len(params))
        return original(params, *arguments, **options)

    monkeypatch.setattr(fallback, "torch_asgd", counting)
    return counts


def permuted(shape, order, dtype=torch.float32):
    """A dense tensor whose axes lie in memory in another order."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return torch.randn([shape[axis] for axis in order], dtype=dtype).permute(inverse)


DENSE = {
    "contiguous": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(5, 7).t(),
    "permuted": lambda: permuted((2, 3, 4, 5), (2, 0, 3, 1)),
    "axes of 1": lambda: torch.randn(3, 4).as_strided((3, 1, 4), (4, 99, 1)),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2),
}
SPARSELY_LAID = {
    "every other": lambda: torch.randn(20)[::2],
    "columns": lambda: torch.randn(6, 8)[:, 2:5],
    "rows of rows": lambda: torch.randn(6, 8)[::2, ::3].t(),
}


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
def test_dense_layouts_are_updated_in_place(make, dtype, by_torch):
    tensor = make().to(dtype)
    twins = Twins([nn.Parameter(tensor)], **OPTIONS)
    address = twins.params[0].data_ptr()
    assert twins.params[0].stride() == tensor.stride()
    twins.run(STEPS)
    assert twins.params[0].data_ptr() == address
    assert by_torch == []


@pytest.mark.parametrize(
    "make", [*DENSE.values(), *SPARSELY_LAID.values()], ids=[*DENSE, *SPARSELY_LAID]
)
def test_gradients_in_another_layout(make, by_torch):
    param = nn.Parameter(make())
    twins = Twins([param], **OPTIONS)
    shape = param.shape
    for grad in (
        permuted(shape, tuple(reversed(range(len(shape))))),
        torch.randn(shape).contiguous(),
        torch.randn(*shape, 2)[..., 1],
    ):
        twins.set_grads([grad])
        twins.theirs_params[0].grad = grad
        twins.ours.step()
        twins.theirs.step()
        twins.check()
    assert bool(by_torch) == (make in SPARSELY_LAID.values())


@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "expand",
    [
        lambda: torch.randn(()).expand(40, 30),
        lambda: torch.randn(40, 1).expand(40, 30),
        lambda: torch.randn(1, 30).expand(40, 30),
        lambda: torch.randn(30, 1).expand(30, 40).t(),
        lambda: torch.randn(40, 1, 2)[..., 1].expand(40, 30),
    ],
    ids=["scalar", "column", "row", "turned", "strided"],
)
def test_expanded_gradients(expand, dtype, weight_decay):
    twins = Twins(parameters((40, 30), dtype=dtype), lr=0.3, lambd=0.01, weight_decay=weight_decay)
    for _ in range(4):
        grad = expand().to(dtype)
        grad = grad if 0 in grad.stride() else grad[..., :1].expand(40, 30)
        twins.params[0].grad = twins.theirs_params[0].grad = grad
        twins.ours.step()
        twins.theirs.step()
        twins.check()


@pytest.mark.parametrize("make", SPARSELY_LAID.values(), ids=SPARSELY_LAID)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_strided_views_have_torchs_result(make, dtype, by_torch):
    twins = Twins([nn.Parameter(make().to(dtype))], **OPTIONS)
    strided = torch.zeros(*twins.params[0].shape, 2, dtype=dtype)
    for own, buffer in ((twins.params, strided), (twins.theirs_params, strided.clone())):
        own[0].data = buffer[..., 1].copy_(own[0].data)
    assert not twins.params[0].is_contiguous()
    twins.run(STEPS)
    assert by_torch == [1] * STEPS
    assert torch.equal(strided[..., 0], torch.zeros_like(strided[..., 0]))


def test_a_view_into_a_larger_buffer_updates_that_alone(by_torch):
    buffer = torch.randn(100)
    before = buffer.clone()
    twins = Twins([nn.Parameter(buffer[10:40].view(5, 6)), nn.Parameter(buffer[40:41])], **OPTIONS)
    assert twins.params[0].data_ptr() == buffer[10:].data_ptr()
    twins.run(STEPS)
    assert torch.equal(buffer[:10], before[:10])
    assert torch.equal(buffer[41:], before[41:])
    assert not torch.equal(buffer[10:41], before[10:41])
    assert by_torch == []


def test_a_param_that_repeats_its_memory_is_refused_as_by_torch():
    for optimizer_type in (ASGD, torch.optim.ASGD):
        p = nn.Parameter(torch.randn(1))
        p.data = torch.randn(1).expand(4)
        optimizer = optimizer_type([p])
        p.grad = torch.ones(4)
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            optimizer.step()


def test_the_layout_may_change_between_steps(by_torch):
    twins = Twins([nn.Parameter(torch.randn(2, 3, 4, 5))], lazy_average=False, **OPTIONS)
    twins.run(4)
    for own in (twins.params, twins.theirs_params):
        own[0].data = own[0].data.to(memory_format=torch.channels_last)
    ax = twins.ours.state[twins.params[0]]["ax"]
    for _ in range(4):
        twins.step()
        assert torch.equal(twins.params[0], twins.theirs_params[0])
        assert torch.equal(ax, twins.theirs.state[twins.theirs_params[0]]["ax"])
    assert ax is twins.ours.state[twins.params[0]]["ax"]
    assert by_torch == []


def test_data_replaced_between_steps():
    """As AWD-LSTM evaluates its averages, each epoch."""
    twins = Twins(parameters((30,), (4, 5)), **OPTIONS)
    for _ in range(4):
        twins.run(3)
        for optimizer, own in twins.sides:
            kept = [p.data.clone() for p in own]
            for p in own:
                p.data = optimizer.state[p]["ax"].clone()
            for p, data in zip(own, kept, strict=True):
                p.data = data.clone()
        twins.check()


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_of_a_model_changed_after_construction(target, steps_before):
    def train(optimizer_type, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = optimizer_type(model.parameters(), **OPTIONS, **options)
        for k in range(steps_before + 4):
            if k == steps_before:
                model.to(target)
            x = torch.randn(8, 4).to(next(model.parameters()).dtype)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return [*model.parameters(), *(optimizer.state[p]["ax"] for p in model.parameters())]

    ours, theirs = train(ASGD), train(torch.optim.ASGD, foreach=False)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        # Half types have no bits in common by contract, where the engine takes them.
        assert target == torch.bfloat16 or torch.equal(bits(one.detach()), bits(other.detach()))


def test_parameters_shared_between_modules():
    def train(optimizer_type, **options):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        head.weight = embedding.weight
        model = nn.ModuleList([embedding, head])
        optimizer = optimizer_type(model.parameters(), **OPTIONS, **options)
        for _ in range(6):
            optimizer.zero_grad()
            head(embedding(torch.randint(10, (8,)))).logsumexp(-1).sum().backward()
            optimizer.step()
        return [head.weight.detach(), optimizer.state[head.weight]["ax"]]

    for one, other in zip(train(ASGD), train(torch.optim.ASGD, foreach=False), strict=True):
        same(one, other)


def test_a_param_listed_twice_is_stepped_twice_as_in_torch(by_torch):
    def train(optimizer_type, **options):
        (p,) = parameters((5,))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = optimizer_type([p, p], **OPTIONS, **options)
        for k in range(5):
            p.grad = torch.full((5,), 0.1 * k)
            optimizer.step()
        return [p.detach(), *(optimizer.state[p][name] for name in NAMES)]

    for one, other in zip(train(ASGD), train(torch.optim.ASGD, foreach=False), strict=True):
        same(one, other)
    assert by_torch


def test_gradients_that_share_memory_with_params(by_torch):
    """p.grad = p: torch's own order of operations then shows in the result."""
    twins = Twins(parameters((5,), (6,)), **OPTIONS)
    for own in (twins.params, twins.theirs_params):
        own[0].grad = own[0].detach()
        own[1].grad = torch.ones(6)
    for _ in range(STEPS):
        twins.ours.step()
        twins.theirs.step()
        twins.check()
    assert by_torch == [2] * STEPS


def test_params_that_share_memory_with_strided_ones():
    """What torch's function steps reads and writes memory that the engine does too."""
    for weight_decay in (0, 0.1):
        ours, theirs = (torch.arange(6.0) for _ in range(2))
        both = []
        for optimizer_type, buffer in ((ASGD, ours), (torch.optim.ASGD, theirs)):
            params = [nn.Parameter(buffer), nn.Parameter(buffer[::2])]
            both.append((params, optimizer_type(params, lr=0.3, weight_decay=weight_decay)))
        for _ in range(4):
            grads = [torch.randn(6), torch.randn(3)]
            for params, optimizer in both:
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad.clone()
                optimizer.step()
            assert torch.equal(ours, theirs)


def test_a_gradient_to_be_converted_that_shares_memory_with_another_param():
    twins = Twins(parameters((5, 4), (4, 5)), lr=0.3)
    for _ in range(4):
        for own in (twins.params, twins.theirs_params):
            own[0].grad = torch.ones(5, 4)
            own[1].grad = own[0].detach().t()
        twins.ours.step()
        twins.theirs.step()
        twins.check()


def test_overlap_is_seen_where_only_the_gradients_or_the_sizes_change():
    """At the same addresses of params and averages that were free of overlap the step before."""
    twins = Twins(parameters((8,), (8,)), lr=0.3)
    twins.run(3)
    for own in (twins.params, twins.theirs_params):
        own[0].grad = own[1].detach()
        own[1].grad = torch.ones(8)
    for _ in range(3):
        twins.ours.step()
        twins.theirs.step()
        twins.check()
    buffer, other = torch.arange(20.0), torch.arange(20.0)
    both = []
    for optimizer_type, memory in ((ASGD, buffer), (torch.optim.ASGD, other)):
        params = [nn.Parameter(memory[:4]), nn.Parameter(memory[8:12])]
        both.append((params, optimizer_type(params, lr=0.3), memory))
    for size in (4, 4, 12):
        grads = [torch.randn(size), torch.randn(4)]
        for params, optimizer, memory in both:
            params[0].data = memory[:size]
            optimizer.state.clear()
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        assert torch.equal(buffer, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4)], ids=str)
def test_gradients_with_a_negative_bit(shape, dtype):
    twins = Twins(parameters(shape, dtype=dtype), **OPTIONS)
    for _ in range(STEPS):
        grad = torch._neg_view(torch.randn(shape, dtype=dtype))
        assert grad.is_neg()
        twins.step([grad])
        twins.check()


def test_a_negative_bit_in_a_grad_that_comes_after_one_that_stayed():
    twins = Twins(parameters((5,)), **OPTIONS)
    grad = torch.randn(5)
    for _ in range(4):
        twins.step([grad])
    twins.step([torch._neg_view(grad)])
    twins.check()
    for k in range(8):  # again and again at the same place in memory
        twins.step([torch._neg_view(torch.ones(5)) if k % 2 else torch.ones(5)])
        twins.check()


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4)], ids=str)
def test_gradients_with_a_conjugate_bit(shape):
    twins = Twins(parameters(shape, dtype=torch.complex64), **OPTIONS)
    for _ in range(STEPS):
        grad = torch.randn(shape, dtype=torch.complex64).conj()
        assert grad.is_conj()
        twins.set_grads([grad])
        twins.theirs_params[0].grad = grad.resolve_conj()
        twins.ours.step()
        twins.theirs.step()
        twins.check()


def negate_param(_, p):
    p.data = torch._neg_view(p.data)


def negate_grad(_, p):
    p.grad.data = torch._neg_view(p.grad.data)


def negate_average(optimizer, p):
    ax = optimizer.state[p]["ax"]
    ax.data = torch._neg_view(ax.data)


def negate_saved_average(optimizer, p):
    """The one that a checkpoint holds is the state's, which nobody has looked into."""
    (i,) = (i for i, q in enumerate(optimizer.param_groups[0]["params"]) if q is p)
    ax = optimizer.state_dict()["state"][i]["ax"]
    ax.data = torch._neg_view(ax.data)


@sealed_or_open
@pytest.mark.parametrize("place", [0, 100, 199])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize(
    "negate", [negate_param, negate_grad, negate_average, negate_saved_average]
)
def test_a_negative_bit_at_the_same_address_acts_in_the_very_next_step(negate, steps, place, looks):
    begun = steps > OPTIONS["t0"] + 2
    twins = Twins(parameters(*[(3,)] * 200), lazy_average=begun, looks=looks, **OPTIONS)
    twins.run(steps)
    twins.set_grads(twins.random_grads())
    for optimizer, own in twins.sides:
        address = own[place].data_ptr()
        negate(optimizer, own[place])
        assert own[place].data_ptr() == address
    for _ in range(3):
        twins.ours.step()
        twins.theirs.step()
        for p, q in zip(twins.params, twins.theirs_params, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(twins.ours.state[p]["ax"], twins.theirs.state[q]["ax"])


def test_params_with_a_lazy_sign_are_left_to_torch():
    for make in (
        lambda: torch._neg_view(torch.ones(4)),
        lambda: torch.ones(1, dtype=torch.complex64).conj().imag,
    ):
        twins = Twins([nn.Parameter(make())], **OPTIONS)
        assert twins.params[0].is_neg()
        for grad in (torch.ones_like(twins.params[0]), torch.full_like(twins.params[0], 2.0)):
            twins.set_grads([grad])
            twins.ours.step()
            twins.theirs.step()
            assert torch.equal(twins.params[0], twins.theirs_params[0])


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="new in torch 2.10")
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "ours"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float16, True),
        (torch.float64, torch.float32, True),
        (torch.float32, torch.float64, False),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.float16, False),
    ],
    ids=str,
)
def test_gradients_of_another_dtype(dtype, grad_dtype, ours, by_torch):
    twins = Twins(parameters((5,), (3, 4), dtype=dtype), **OPTIONS)
    for p in (*twins.params, *twins.theirs_params):
        p.grad_dtype = grad_dtype
    for _ in range(STEPS):
        twins.step([torch.randn_like(p, dtype=grad_dtype) for p in twins.params])
        twins.check()
    assert bool(by_torch) != ours


def test_sparse_gradients_are_refused_before_anything_is_written():
    dense, sparse = parameters((4,), (5, 2))
    optimizer = ASGD([dense, sparse])
    dense.grad = torch.ones(4)
    sparse.grad = torch.ones(5, 2).to_sparse()
    before = dense.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^ASGD does not support sparse gradients$"):
            optimizer.step()
        assert not optimizer.state
    sparse.grad = torch.ones(5, 2)
    optimizer.step()
    sparse.grad = torch.ones(5, 2).to_sparse()
    before = [x.clone() for x in (dense, sparse, *optimizer.state[dense].values())]
    version = dense._version
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    for x, y in zip((dense, sparse, *optimizer.state[dense].values()), before, strict=True):
        same(x, y)
    assert dense._version == version


def test_params_on_the_meta_device_fail_as_in_torch_and_change_nothing(by_torch):
    meta = nn.Parameter(torch.empty(3, device="meta"))
    meta.grad = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError) as theirs:
        torch.optim.ASGD([meta]).step()
    twins = Twins(parameters((4,)), **OPTIONS)
    twins.run(2)
    twins.ours.add_param_group({"params": [meta]})
    twins.set_grads(twins.random_grads())
    with pytest.raises(RuntimeError) as ours:
        twins.ours.step()
    assert str(ours.value) == str(theirs.value)
    assert by_torch == [1]
    twins.check()


class Tagged(torch.Tensor):
    """A subclass that counts the operations it sees."""

    seen = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(function, types, args, kwargs or {})


class Growing(torch.Tensor):
    """A subclass that puts params into the group whose gradients are being asked for."""

    others = None

    @property
    def grad(self):
        if self.others is not None:
            self.others += parameters(*[(3,)] * 5000)
            for other in self.others[1:]:
                other.grad = torch.ones(3)
        return None


def test_params_that_come_while_a_step_is_gathered_wait_for_the_next():
    first = torch.zeros(3).as_subclass(Growing)
    optimizer = ASGD([first])
    first.others = optimizer.param_groups[0]["params"]
    optimizer.step()
    assert not optimizer.state
    first.others = None
    optimizer.step()
    assert len(optimizer.state) == 5000


def test_tensor_subclasses_see_torchs_operations(by_torch):
    ours, theirs = (torch.arange(5.0).as_subclass(Tagged).requires_grad_() for _ in range(2))
    optimizer, reference = ASGD([ours], **OPTIONS), torch.optim.ASGD([theirs], **OPTIONS)
    for _ in range(STEPS):
        ours.grad = torch.randn(5)
        theirs.grad = ours.grad.clone()
        Tagged.seen = 0
        optimizer.step()
        assert Tagged.seen > 0
        reference.step()
        assert torch.equal(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))
    assert by_torch == [1] * STEPS


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_that_watch_operations_see_them():
    twins = Twins(parameters((5,), (3, 4)), **OPTIONS)
    twins.run(2)
    twins.set_grads(twins.random_grads())
    with Recorded() as recorded:
        twins.ours.step()
    twins.theirs.step()
    assert recorded.names.count("aten.mul_.Tensor") == 2
    twins.check()
    twins.run(2)


def test_memory_shared_lazily_is_not_written_through():
    (p,) = parameters((5,))
    before = p.detach().clone()
    copy = torch._lazy_clone(p.detach())
    optimizer = ASGD([p], lr=1.0)
    p.grad = torch.ones(5)
    optimizer.step()
    same(copy, before)
    assert not torch.equal(p, before)


def test_params_of_inference_mode():
    with torch.inference_mode():
        twins = Twins([torch.randn(5)], **OPTIONS)
        twins.run(4)
    assert twins.params[0].is_inference()


def test_steps_in_inference_mode_and_out_of_it():
    """Where torch makes state that it cannot update afterwards."""
    twins = Twins(parameters((5,)), **OPTIONS)
    for inside in (True, True, False, True, False):
        twins.set_grads(twins.random_grads())
        with torch.inference_mode(inside):
            twins.ours.step()
        twins.theirs.step()
        twins.check()
    assert twins.params[0]._version >= 5


def swap_param_with_a_new_one(_, p, __):
    torch.utils.swap_tensors(p, nn.Parameter(torch.full((5,), 3.0)))


def swap_params(_, p, q):
    torch.utils.swap_tensors(p, q)


def swap_averages(optimizer, p, q):
    torch.utils.swap_tensors(optimizer.state[p]["ax"], optimizer.state[q]["ax"])


@sealed_or_open
@pytest.mark.parametrize("swap", [swap_param_with_a_new_one, swap_params, swap_averages])
def test_swapped_params_and_averages(swap, looks):
    lazy = swap is not swap_averages
    twins = Twins(parameters((5,), (5,), (6,)), lazy_average=lazy, looks=looks, **OPTIONS)
    for _ in range(STEPS):
        twins.run(1)
        for optimizer, (p, q, _) in twins.sides:
            swap(optimizer, p, q)
        before = twins.params[0]._version
        twins.run(2)
        assert twins.params[0]._version >= before + 2


@sealed_or_open
def test_swapped_gradients(looks):
    twins = Twins(parameters((5,), (5,), (6,)), looks=looks, **OPTIONS)
    for _ in range(STEPS):
        twins.run(1)
        for _, (p, q, _) in twins.sides:
            first, second = p.grad, q.grad
            p.grad = q.grad = None  # torch swaps no tensor that autograd holds
            torch.utils.swap_tensors(first, second)
            p.grad, q.grad = first, second
        twins.ours.step()
        twins.theirs.step()
        twins.check()


def test_a_backward_through_stale_values_is_caught():
    p, q = parameters((5,), (5,))
    optimizer = ASGD([p, q], t0=0)
    for _ in range(3):
        p.grad, q.grad = torch.ones(5), torch.ones(5)
        optimizer.step()
    ax = optimizer.state[p]["ax"]
    product = p * q
    distance = (p * ax).sum()
    with torch.no_grad():
        factor = torch.ones(5)
    leaf = torch.ones(5, requires_grad=True)
    through_average = (leaf * ax).sum()
    through_eta = leaf.sum() * optimizer.state[p]["eta"]
    harmless = (leaf * factor).sum()
    optimizer.step()
    for loss in (product.sum(), distance, through_average, through_eta):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    harmless.backward()


def test_versions_grow_for_each_param_that_was_stepped_and_no_other():
    params = parameters((5,), (0,), (2, 3), (4,))
    optimizer = ASGD(params)
    params[3].data = torch.zeros(4)
    for step in range(4):
        before = [p._version for p in params]
        for i, p in enumerate(params):
            p.grad = None if i == 2 and step % 2 else torch.ones_like(p)
        optimizer.step()
        grown = [p._version > v for p, v in zip(params, before, strict=True)]
        assert grown == [True, True, step % 2 == 0, True]
        params[3].data = torch.zeros(4)


def test_gradients_are_only_read():
    (p,) = parameters((5,))
    optimizer = ASGD([p], weight_decay=0.1, maximize=True)
    p.grad = torch.randn(5)
    before, version = p.grad.clone(), p.grad._version
    optimizer.step()
    same(p.grad, before)
    assert p.grad._version == version


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_with_a_graph_of_their_own():
    """As create_graph=True leaves them."""
    twins = Twins(parameters((5,), (4, 3)), **OPTIONS)
    for _ in range(STEPS):
        for own in (twins.params, twins.theirs_params):
            for p in own:
                p.grad = None
            sum(p.pow(3).sum() for p in own).backward(create_graph=True)
            own[1].grad = own[1].grad.t().contiguous().t()  # another layout, for a copy
        twins.ours.step()
        twins.theirs.step()
        for p, q in zip(twins.params, twins.theirs_params, strict=True):
            same(p, q)
            assert p.requires_grad
            assert p.is_leaf


def test_a_shape_that_changes_so_that_the_average_still_fits():
    twins = Twins(parameters((1, 3)), lazy_average=False, **OPTIONS)
    twins.run(4)
    for own in (twins.params, twins.theirs_params):
        own[0].grad = None
        own[0].data = own[0].data[0]
    for _ in range(4):
        twins.step()
        assert torch.equal(twins.params[0], twins.theirs_params[0])
        ours = twins.ours.state[twins.params[0]]["ax"]
        assert torch.equal(ours, twins.theirs.state[twins.theirs_params[0]]["ax"])


def test_overlap_with_a_subclass():
    class Special(nn.Parameter):
        pass

    def pair():
        memory = torch.arange(6.0)
        return memory, [nn.Parameter(memory), Special(memory[1:4])]

    (ours, params), (theirs, others) = pair(), pair()
    optimizer, torchs = ASGD(params, **OPTIONS), torch.optim.ASGD(others, foreach=False, **OPTIONS)
    for _ in range(6):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        optimizer.step()
        torchs.step()
        assert torch.equal(ours, theirs)
