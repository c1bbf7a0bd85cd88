"""Changed checkpoints and damaged files, loaded by `ArrayASGD` and `ASGD`.

A refused one changes nothing; an accepted one has the values that it was given, and the next step
works. Runs without torch too, on the array face alone.
"""

from __future__ import annotations

import copy
import io
import warnings
from contextlib import contextmanager

import numpy as np

import asgd_fast
from reliability.array_lives import same_entry

try:
    import torch

    from asgd_fast.integrations.train_eval import TrainEvalASGD
except ImportError:
    torch = None

HYPERPARAMETERS = {"lr": 0.1, "lambd": 0.01, "t0": 1.0, "weight_decay": 0.1}
WEIGHTS = [
    *[{}] * 3,
    {"averaging": ("ema", 0.9)},
    {"averaging": ("polynomial", 2.0), "average_every": 2},
]


def array_optimizer(seed=0, steps=5, **options):
    random = np.random.default_rng(seed)
    params = [random.standard_normal((2, 3)), random.standard_normal(5).astype(np.float32)]
    more = [(random.standard_normal(4) + 1j).astype(np.complex64)]
    optimizer = asgd_fast.ArrayASGD(
        [{"params": params}, {"params": more, "lr": 0.2}], **{**HYPERPARAMETERS, **options}
    )
    for _ in range(steps):
        optimizer.step([random.standard_normal(x.shape).astype(x.dtype) for x in params + more])
    return optimizer, params + more


def array_facts(optimizer, params):
    state = optimizer.state_dict()
    return [(x.dtype, x.shape, x.tobytes()) for x in (*params, *state.values())]


def changed_value(random, value):
    """Something else in the place of an entry of a NumPy checkpoint."""
    other = np.array(value)
    kind = random.randrange(12)
    if kind < 3 and other.size:
        number = random.choice([np.nan, np.inf, -1.0, 0.0, 0.5, 2.0**63, -(2.0**63), 1e300, 1e-320])
        with np.errstate(all="ignore"):
            if other.dtype.kind in "iu":
                other = other.astype(np.float64)
            other.flat[random.randrange(other.size)] = number if other.dtype.kind in "fc" else 0
        return other
    return [
        None,
        "text",
        [],
        other.astype(random.choice(["f2", "f4", "f8", "i1", "i8", "u8", "c16", "U9", "O", "?"]))
        if other.dtype.kind in "fiub"
        else np.full(other.shape, "text"),
        other[..., None],
        other[:0] if other.ndim else np.zeros(3),
        np.asfortranarray(other),
        other.astype(other.dtype.newbyteorder()),
        object(),
    ][kind - 3]


def check_array_load(optimizer, params, state, errors):
    """Load a state, and return whether it was accepted."""
    before = array_facts(optimizer, params)
    try:
        optimizer.load_state_dict(state)
    except errors:
        assert array_facts(optimizer, params) == before, "a refused state changed something"
        return False
    loaded = optimizer.state_dict()
    for name, value in loaded.items():
        given = np.asarray(state[name]).astype(value.dtype)
        if name.startswith("ax.") and not (loaded["mu"] != 1)[int(name[3:])]:
            continue  # given up: averaging has not begun
        assert given.tobytes() == value.tobytes(), f"{name}: {value} instead of {given}"
    optimizer.step([np.zeros_like(x) for x in params])
    optimizer.state_dict()
    return True


def change_array_state(random):
    weights = random.choice(WEIGHTS)
    source, _ = array_optimizer(random.randrange(99), random.randrange(7), **weights)
    state = source.state_dict()
    n_changes = random.choice([0, 1, 1, 1, 1, 2])
    for _ in range(n_changes):
        name = random.choice(sorted(state))
        what = random.randrange(10)
        if what == 0:
            del state[name]
        elif what == 1:
            state[random.choice(["ax.9", "", "Step", 3, None])] = state[name]
        elif what == 2:
            state[name] = state[random.choice(sorted(map(str, state)))] if name else None
        else:
            state[name] = changed_value(random, state[name])
        if not all(isinstance(x, str) for x in state):
            break
    wide = random.choice([None, None, "float64"])
    optimizer, params = array_optimizer(1, random.randrange(7), average_dtype=wide)
    with np.errstate(all="ignore"):
        accepted = check_array_load(optimizer, params, state, (TypeError, ValueError))
    assert accepted or n_changes, "a checkpoint without a fault was refused"
    return accepted


def damaged(random, data):
    """A file of which bits flipped, a part is missing, doubled or zero."""
    data = bytearray(data)
    kind = random.randrange(5)
    a, b = sorted(random.randrange(len(data)) for _ in range(2))
    if kind < 2:
        for _ in range(random.choice([1, 1, 5])):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == 2:
        del data[a:]
    elif kind == 3:
        data[a:b] = bytes(b - a)
    else:
        data[a:a] = data[a : min(b, a + 100)]
    return bytes(data)


def damage_npz(random):
    source, _ = array_optimizer(random.randrange(99))
    true = source.state_dict()
    file = io.BytesIO()
    np.savez(file, **true)
    data = damaged(random, file.getvalue())
    optimizer, params = array_optimizer(1)
    before = array_facts(optimizer, params)
    try:
        optimizer.load_state_dict(np.load(io.BytesIO(data), allow_pickle=False))
    except Exception:  # NumPy's and zipfile's own are of many kinds
        assert array_facts(optimizer, params) == before, "a refused file changed something"
        assert not holds(data, true), "a file that has all its values was refused"
        return False
    loaded = optimizer.state_dict()
    assert {k: x.tobytes() for k, x in loaded.items()} == {k: x.tobytes() for k, x in true.items()}
    return True


def holds(data, true):
    """Whether NumPy finds a whole state in a file."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            state = dict(file)
    except Exception:  # as above
        return False
    return state.keys() == true.keys() and all(
        same_entry(x, true[name]) for name, x in state.items()
    )


def torch_optimizer(seed=0, steps=5, **options):
    generator = torch.Generator().manual_seed(seed)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for shape, dtype in (((2, 3), torch.float64), ((5,), torch.float32))
    ]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.2}]
    kind = options.pop("kind", asgd_fast.ASGD)
    optimizer = kind(groups, **{**HYPERPARAMETERS, **options})
    for k in range(steps):
        torch_step(optimizer, params, seed + k)
    return optimizer, params


def torch_step(optimizer, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def torch_facts(optimizer, params):
    """The bits of params and of the checkpoint."""
    state = optimizer.state_dict()
    found = [p.detach().numpy().tobytes() for p in params]
    for entry in state["state"].values():
        for name, x in entry.items():
            tensor = isinstance(x, torch.Tensor)
            found.append((name, x.dtype, x.shape, x.numpy().tobytes()) if tensor else (name, x))
    return [*found, [sorted(group.items(), key=str) for group in state["param_groups"]]]


def changed_entry(random, value):
    number = random.choice([0.5, -1.0, np.nan, np.inf, 3.0, 2.0**63, 1e300])
    return random.choice(
        [
            None, "text", number, value.flatten()[:1].tolist(),
            torch.tensor(number), torch.tensor([number, number]), torch.tensor([number]),
            torch.tensor(complex(number, 1)), torch.tensor([]), torch.tensor(True),
            torch.tensor(3, dtype=torch.int64), value[None], value.to(torch.float16),
            value.to(torch.complex64), torch.zeros(7),
            torch.full(value.shape, number, dtype=torch.float64),
            [number], {}, np.float64(number),
        ]
    )  # fmt: skip


def check_loaded(optimizer, state):
    """Assert that the optimizer has the values of a checkpoint, in its own dtypes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loaded = optimizer.state_dict()["state"]
    for i, entry in state["state"].items():
        given = {name: x for name, x in entry.items() if not (isinstance(x, dict) and not x)}
        if not given or i not in range(len(params)):
            continue  # as torch has a param that has made no step, and an entry of no param
        entry = loaded[i]
        for name in ("step", "eta", "mu"):
            ours, wanted = entry[name].reshape(()), torch.as_tensor(given[name]).reshape(())
            if isinstance(given[name], torch.Tensor) and wanted.is_floating_point():
                assert torch.promote_types(wanted.dtype, ours.dtype) == ours.dtype
            torch.testing.assert_close(ours, wanted.to(ours), rtol=0, atol=0, equal_nan=True)
        if entry["mu"] != 1 and "ax" in given:  # else the average is the param
            ax, dtype = entry["ax"], params[i].dtype
            assert ax.dtype == torch.promote_types(dtype, optimizer.average_dtype or dtype)
            pair = torch.broadcast_tensors(ax, given["ax"].to(ax))  # as a step would have it
            torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


def check_torch_load(optimizer, params, state, errors, in_groups):
    """Load a checkpoint, and return whether it was accepted."""
    before = torch_facts(optimizer, params)
    try:
        optimizer.load_state_dict(state)
    except errors as error:
        assert torch_facts(optimizer, params) == before, f"a refused one changed something: {error}"
        torch_step(optimizer, params, 0)
        return False
    check_loaded(optimizer, state)
    if isinstance(optimizer, TrainEvalASGD):
        optimizer.train()
    values = [p.detach().clone() for p in params]
    try:
        torch_step(optimizer, params, 0)
    except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        # Hyperparameters are checked in each step, as they may be changed at any time; torch
        # asserts that capturable is for GPUs.
        assert in_groups, f"accepted, but the next step fails: {error!r}"
        for p, value in zip(params, values, strict=True):
            assert torch.equal(p, value), "a refused step changed something"
        return False
    optimizer.state_dict()
    return True


def change_torch_state(random):
    kind = random.choice([asgd_fast.ASGD, TrainEvalASGD])
    options = {"kind": kind, **random.choice(WEIGHTS)}
    source, _ = torch_optimizer(random.randrange(99), random.randrange(7), **options)
    if kind is TrainEvalASGD and random.randrange(2):
        source.eval()
    state = copy.deepcopy(source.state_dict())
    in_groups = False
    n_changes = random.choice([0, 1, 1, 1, 1, 2])
    for _ in range(n_changes):
        what = random.randrange(12)
        group = random.choice(state["param_groups"] or [{}])
        if what == 0 and group:
            in_groups = True
            del group[random.choice(sorted(group))]
        elif what == 1 and group:
            in_groups = True
            name = random.choice(sorted(group))
            group[name] = random.choice([None, "text", -1.0, float("nan"), [], [0, 1, 2], 1e308, 0])
        elif what == 2:
            state[random.choice(["state", "param_groups"])] = random.choice([{}, [], None, 3])
            break
        elif what == 3:
            state["param_groups"] = state["param_groups"] * random.choice([0, 2])
            break
        elif state["state"]:
            i = random.choice(list(state["state"]))
            entry = state["state"][i]
            if not isinstance(entry, dict) or not entry:
                continue
            name = random.choice(sorted(entry))
            if what == 4:
                del entry[name]
            elif what == 5:
                state["state"][i] = random.choice([None, {}, [], 3, "text"])
            elif what == 6:
                entry["more"] = entry[name]
            elif isinstance(entry[name], torch.Tensor):
                entry[name] = changed_entry(random, entry[name])
    wide = random.choice([None, None, torch.float64])
    optimizer, params = torch_optimizer(1, random.randrange(7), kind=kind, average_dtype=wide)
    errors = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError)
    accepted = check_torch_load(optimizer, params, state, errors, in_groups)
    assert accepted or n_changes, "a checkpoint without a fault was refused"
    return accepted


def damage_torch_file(random):
    source, _ = torch_optimizer(random.randrange(99))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    try:
        state = torch.load(io.BytesIO(damaged(random, file.getvalue())), weights_only=True)
    except Exception:  # torch's own
        return False
    optimizer, params = torch_optimizer(1)
    return check_torch_load(optimizer, params, state, Exception, True)


def run(campaign):
    random = campaign.random()
    tried = {
        "changed states of ArrayASGD": (change_array_state, 4000),
        "damaged .npz files": (damage_npz, 4000),
    }
    if torch is not None:
        tried |= {
            "changed states of ASGD": (change_torch_state, 4000),
            "damaged files of torch.save": (damage_torch_file, 1500),
        }
    for name in tried:  # in this order
        campaign.counts[name] = campaign.counts[f"{name}, accepted"] = 0
    # Mixed, as a control ends where it has found something.
    trials = [name for name, (_, n) in tried.items() for _ in range(campaign.times(n))]
    random.shuffle(trials)
    for name in trials:
        seed = random.randrange(2**32)
        campaign.counts[name] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of casts, as torch and NumPy have them
                campaign.counts[f"{name}, accepted"] += tried[name][0](type(random)(seed))
        except Exception as error:
            # What breaks the campaign itself is not to pass for a planted fault.
            kind = AssertionError if isinstance(error, AssertionError) else RuntimeError
            raise kind(f"{name}, Random({seed}): {error!r}") from error


@contextmanager
def _replaced(owner, name, make):
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _sets_the_rate_first(original):
    """Writes one value before it checks all."""

    def load_state_dict(self, state):
        self.param_groups[0]["lr"] = 0.75
        original(self, state)

    return load_state_dict


def _loses_mu(original):
    def load_state_dict(self, state):
        original(self, state)
        if len(self._scalars):
            self._scalars[0, 2] = 1.0

    return load_state_dict


def _loses_eta(original):
    def load_state_dict(self, state):
        original(self, state)
        for entry in self.state.values():
            entry["eta"].fill_(0.1)

    return load_state_dict


def _empties_the_state_first(original):
    def load_state_dict(self, state):
        self.state.clear()
        original(self, state)

    return load_state_dict


CONTROLS = {
    "a load that writes before it checks": lambda: _replaced(
        asgd_fast.ArrayASGD, "load_state_dict", _sets_the_rate_first
    ),
    "a load that loses a value": lambda: _replaced(
        asgd_fast.ArrayASGD, "load_state_dict", _loses_mu
    ),
}
if torch is not None:
    CONTROLS |= {
        "a load of ASGD that loses a value": lambda: _replaced(
            asgd_fast.ASGD, "load_state_dict", _loses_eta
        ),
        "a refused load that empties the state": lambda: _replaced(
            asgd_fast.ASGD, "load_state_dict", _empties_the_state_first
        ),
    }
