"""ASGDWeightAveraging in Lightning, beside the same training with torch's ASGD."""

from __future__ import annotations

import os

import pytest
import torch
from averaging import InsideError
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, DistributedSampler
from twins import same

lightning = pytest.importorskip("lightning")

from integrations.lightning_runs import (  # noqa: E402
    BATCHES,
    Leave,
    Losses,
    Regression,
    copied,
    data,
    fit,
    training_loader,
    validation_loader,
)
from lightning.pytorch import Callback  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402

from asgd_fast import AveragingNotBegunWarning  # noqa: E402
from asgd_fast.integrations.lightning import ASGDWeightAveraging  # noqa: E402

pytestmark = [
    # Lightning's, of what it uses itself and of loaders without workers.
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]

T0 = (("t0", 3),)
BEGUN = 5  # the first step after which an average has begun


def same_weights(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        same(ours[name].detach(), value)


def differ(one, other):
    return any(not torch.equal(x, other[name]) for name, x in one.items())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What torch's ASGD does in the same training, validated in the middle of epochs."""
    folder = tmp_path_factory.mktemp("theirs")
    return fit(Regression("theirs", options=T0), folder=folder, val_check_interval=4)[1]


def ours(folder, *callbacks, options=T0, averaging=None, **arguments):
    averaging = averaging or ASGDWeightAveraging()
    module = Regression(options=options)
    return (
        *fit(module, averaging, *callbacks, folder=folder, val_check_interval=4, **arguments),
        module,
    )


def loss_of(weights, normalizes=False):
    module = Regression(normalizes=normalizes)
    module.load_state_dict(weights)
    module.eval()
    with torch.no_grad():
        losses = [module.loss(batch) for batch in validation_loader()]
    return torch.stack(losses).mean().item()


def test_validations_are_of_averages_and_training_has_the_bits_of_torch(theirs, tmp_path):
    _, watch, module = ours(tmp_path)
    assert list(watch.iterates) == list(range(1, 3 * BATCHES + 1))
    for step, weights in theirs.iterates.items():
        same_weights(watch.iterates[step], weights)
    assert list(watch.validated) == list(range(4, 3 * BATCHES + 1, 4))  # within epochs, too
    assert "RunningStage.SANITY_CHECKING" in watch.stages
    for step, weights in watch.validated.items():
        same_weights(weights, theirs.averages[step])
        same_weights(watch.after[step], theirs.iterates[step])
        assert watch.losses[step] == pytest.approx(loss_of(theirs.averages[step]), rel=1e-6)
        assert step < BEGUN or differ(theirs.averages[step], theirs.iterates[step])
    same_weights(module.state_dict(), theirs.averages[3 * BATCHES])


def test_what_comes_after_training_is_of_the_averages(theirs, tmp_path):
    trainer, _, module = ours(tmp_path)
    last = 3 * BATCHES
    (tested,) = trainer.test(module, validation_loader(), verbose=False)
    (validated,) = trainer.validate(module, validation_loader(), verbose=False)
    assert tested["test"] == validated["loss"] == pytest.approx(loss_of(theirs.averages[last]))
    averaged = Regression()
    averaged.load_state_dict(theirs.averages[last])
    with torch.no_grad():
        wanted = [averaged(x) for x, _ in validation_loader()]
    for prediction, value in zip(trainer.predict(module, validation_loader()), wanted, strict=True):
        torch.testing.assert_close(prediction, value)
    same_weights(module.state_dict(), theirs.averages[last])


class Fails(Callback):
    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.fail)

    def fail(self, trainer, *_):
        if trainer.global_step == self.step:
            raise InsideError


@pytest.mark.parametrize(
    "hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"]
)
def test_after_a_validation_that_raises_the_iterate_is_back(theirs, tmp_path, hook):
    module = Regression(options=T0)
    with pytest.raises(InsideError):
        fit(module, ASGDWeightAveraging(), Fails(hook, 12), folder=tmp_path, val_check_interval=4)
    same_weights(module.state_dict(), theirs.iterates[12])


class Saves(Callback):
    """Saves from within a hook of a validation, as people do besides ModelCheckpoint."""

    def __init__(self, hook, path):
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        if trainer.global_step == 12:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("hook", "wide"),
    [
        ("on_validation_epoch_end", None),
        ("on_validation_epoch_end", "float64"),
        ("on_train_batch_start", None),
        ("ModelCheckpoint", None),
        ("ModelCheckpoint", "float64"),
    ],
)
def test_a_checkpoint_holds_the_averages_and_resumes_from_the_iterate(theirs, tmp_path, hook, wide):
    options = T0 if wide is None else (*T0, ("average_dtype", wide))
    path = tmp_path / "12.ckpt"
    if hook == "ModelCheckpoint":
        saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
        path = tmp_path / "step=12.ckpt"
        _, watch, _ = ours(tmp_path, saves, options=options, enable_checkpointing=True)
    else:
        _, watch, _ = ours(tmp_path, Saves(hook, path), options=options)
    averages = theirs.averages if wide is None else watch.validated
    for step, weights in theirs.iterates.items():
        same_weights(watch.iterates[step], weights)
    checkpoint = torch.load(path, weights_only=False)
    same_weights(checkpoint["state_dict"], averages[12])
    same_weights(checkpoint["current_model_state"], theirs.iterates[12])
    same_weights(Regression.load_from_checkpoint(path).state_dict(), averages[12])
    module = Regression(options=options)
    _, resumed = fit(
        module, ASGDWeightAveraging(), folder=tmp_path, resume=path, val_check_interval=4
    )
    assert list(resumed.iterates) == list(range(13, 3 * BATCHES + 1))
    for step, weights in resumed.iterates.items():
        same_weights(weights, theirs.iterates[step])
        same_weights(resumed.averages[step], watch.averages[step])
    same_weights(module.state_dict(), averages[3 * BATCHES])


def test_a_checkpoint_saved_after_training_resumes_from_the_iterate(tmp_path):
    longer = fit(Regression("theirs", options=T0), folder=tmp_path, epochs=4)[1]
    trainer, *_ = ours(tmp_path)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    same_weights(torch.load(path)["state_dict"], longer.averages[3 * BATCHES])
    _, resumed = fit(
        Regression(options=T0), ASGDWeightAveraging(), folder=tmp_path, resume=path, epochs=4
    )
    assert list(resumed.iterates) == list(range(3 * BATCHES + 1, 4 * BATCHES + 1))
    for step, weights in resumed.iterates.items():
        same_weights(weights, longer.iterates[step])
        same_weights(resumed.averages[step], longer.averages[step])


def test_the_best_checkpoint_tests_as_it_was_validated(theirs, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="loss", mode="max")
    trainer, watch, module = ours(tmp_path, best, enable_checkpointing=True)
    step = max(watch.losses, key=watch.losses.get)
    (tested,) = trainer.test(module, validation_loader(), ckpt_path="best", verbose=False)
    assert tested["test"] == watch.losses[step]
    same_weights(module.state_dict(), theirs.averages[step])


def test_a_module_fitted_again_begins_anew(tmp_path):
    trainer, _, module = ours(tmp_path)
    averaging = trainer.callbacks[0]
    left = copied(module)
    _, watch, _ = ours(tmp_path, averaging=averaging)  # of another trainer and module
    again = fit(module, averaging, folder=tmp_path, epochs=1)[1]
    assert differ(again.iterates[1], left)
    same_weights(watch.averages[3 * BATCHES], left)
    path = tmp_path / "again.ckpt"
    trainer.save_checkpoint(path)
    same_weights(torch.load(path)["current_model_state"], again.iterates[BATCHES])


def test_a_training_that_never_averages_says_so(tmp_path):
    with pytest.warns(AveragingNotBegunWarning, match="t0 is 1e"):
        _, watch, module = ours(tmp_path, options=(("t0", 1e6),), epochs=1)
    same_weights(module.state_dict(), watch.iterates[BATCHES])


def test_weights_alone_are_warned_of(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(UserWarning, match="saves the iterates and not the averages"):
        ours(tmp_path, saves, enable_checkpointing=True, epochs=1)


def test_a_module_without_the_optimizer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^optimizers: .* asgd_fast.ASGD among them, got \['ASGD'"):
        fit(Regression("theirs"), ASGDWeightAveraging(), folder=tmp_path)


class Configured(Regression):
    """A module that a strategy may shard where it is configured."""

    def configure_model(self):
        pass


@pytest.fixture
def no_process_group():
    """None is left behind, nor the variables by which other frameworks would make one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_process_group")
def test_a_strategy_that_shards_is_refused(tmp_path):
    """Those of FSDP and DeepSpeed are refused with it; they need a GPU to come so far."""
    module = Configured(options=T0)
    before = copied(module)
    with pytest.raises(RuntimeError, match=r"^strategy: .* ddp, got ModelParallelStrategy$"):
        fit(module, ASGDWeightAveraging(), folder=tmp_path, strategy=ModelParallelStrategy())
    same_weights(module.state_dict(), before)


def check_begun_after(step, watch):
    """Assert that averages are the means of the iterates after a step."""
    for name, average in watch.averages[max(watch.averages)].items():
        made = [weights[name].double() for k, weights in watch.iterates.items() if k > step]
        mean = torch.stack(made).mean(0)
        torch.testing.assert_close(average.double(), mean, rtol=1e-5, atol=1e-6)


def test_averaging_begins_when_the_monitored_metric_stalls(tmp_path):
    """At the fourth validation: 3.5 is more than the least of those before the last one."""
    chosen = Losses([5.0, 3.0, 4.0, 3.5, 9.0, 9.0])
    averaging = ASGDWeightAveraging("chosen", patience=1)
    _, watch, module = ours(tmp_path, chosen, options=(), averaging=averaging)
    assert [k for k, begun in chosen.is_averaging.items() if not begun] == list(range(1, 17))
    check_begun_after(16, watch)
    same_weights(module.state_dict(), watch.averages[3 * BATCHES])


def test_the_trigger_goes_on_from_a_checkpoint(tmp_path):
    losses = [5.0, 3.0, 4.0, 3.5, 9.0, 9.0]
    saves = Saves("on_train_batch_start", tmp_path / "12.ckpt")
    whole = ours(
        tmp_path,
        Losses([*losses]),
        saves,
        options=(),
        averaging=ASGDWeightAveraging("chosen", patience=1),
    )[1]
    averaging = ASGDWeightAveraging("chosen", patience=1)
    _, resumed, _ = ours(
        tmp_path, Losses(losses[3:]), options=(), averaging=averaging, resume=saves.path
    )
    for step, weights in resumed.averages.items():
        same_weights(weights, whole.averages[step])
    assert averaging.trigger.losses == losses[:4]


def test_a_metric_that_is_not_logged_is_refused(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"^monitor: 'accuracy' is not logged; there are .'loss'"
    ):
        ours(tmp_path, averaging=ASGDWeightAveraging("accuracy"))


def with_statistics(weights):
    """The oracle: torch's pass over the training data, with the averages in a module."""
    module = Regression(normalizes=True)
    module.load_state_dict(weights)
    update_bn(training_loader(), module)
    return module.state_dict()


def test_batch_normalization_is_updated_for_the_averages(tmp_path):
    """Training is not touched by it, nor are its random numbers, of dropout here."""
    module = Regression("theirs", normalizes=True, options=T0)
    theirs = fit(module, folder=tmp_path, val_check_interval=4)[1]
    module = Regression(normalizes=True, options=T0)
    best = ModelCheckpoint(tmp_path, monitor="loss", mode="min")
    trainer, watch = fit(
        module,
        ASGDWeightAveraging(update_bn=True),
        best,
        folder=tmp_path,
        val_check_interval=4,
        enable_checkpointing=True,
    )
    for step, weights in theirs.iterates.items():
        same_weights(watch.iterates[step], weights)
    for step, weights in watch.validated.items():
        if step >= BEGUN:
            same_weights(weights, with_statistics(theirs.averages[step]))
            assert differ(weights, theirs.averages[step])
            assert watch.losses[step] == pytest.approx(loss_of(weights, normalizes=True))
        else:
            same_weights(weights, theirs.iterates[step])
        same_weights(watch.after[step], theirs.iterates[step])
    same_weights(module.state_dict(), watch.validated[3 * BATCHES])
    step = min(watch.losses, key=watch.losses.get)
    assert step >= BEGUN
    (tested,) = trainer.test(module, validation_loader(), ckpt_path="best", verbose=False)
    assert tested["test"] == watch.losses[step]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            training_loader(num_workers=1, persistent_workers=True),
            "expected a training data loader without persistent_workers",
        ),
        ([training_loader(), training_loader()], "expected one training data loader, got a list"),
    ],
)
def test_loaders_of_which_there_is_no_second_pass_are_refused(tmp_path, loader, message):
    averaging = ASGDWeightAveraging(update_bn=True)
    with pytest.raises(RuntimeError, match=f"^update_bn: {message}"):
        ours(tmp_path, averaging=averaging, loader=loader)


def on_two_ranks(folder, optimizer, *callbacks, options=()):
    """What each of two ranks has seen in a training with either optimizer."""
    folder.mkdir()
    fit(
        Regression(optimizer, normalizes=True, dropout=0.0, options=options),
        *callbacks,
        Leave(folder),
        folder=folder,
        epochs=6,
        strategy="ddp_spawn",
        devices=2,
    )
    return [torch.load(folder / str(rank)) for rank in range(2)]


def batches_of_all_ranks(epoch):
    """Those of the sampler that Lightning puts in for each rank."""
    dataset = data(4 * BATCHES, 1)
    for rank in range(2):
        sampler = DistributedSampler(dataset, 2, rank, seed=1)
        sampler.set_epoch(epoch)
        yield from DataLoader(dataset, batch_size=4, sampler=sampler)


@pytest.mark.heavy
def test_two_ranks_average_alike(tmp_path):
    """They begin together, by the mean of their metrics, and with the statistics of all batches."""
    ours = on_two_ranks(
        tmp_path / "ours",
        "ours",
        ASGDWeightAveraging("chosen", patience=1, update_bn=True),
        Losses([1.0] * 6, [9.0, 5.0, 7.0, 6.0, 1.0, 1.0]),  # the first one alone never stalls
    )
    n = BATCHES // 2  # an epoch of each rank
    start = 4 * n
    theirs = on_two_ranks(tmp_path / "theirs", "theirs", options=(("t0", t0_of(start)),))
    iterates, averages = theirs[0]["iterates"], theirs[0]["averages"]
    assert len(iterates) == 6 * n
    parameters = [name for name, _ in Regression(normalizes=True).named_parameters()]
    for seen in ours:
        assert list(seen["iterates"]) == list(iterates)
        for step, weights in iterates.items():
            for name in parameters:
                same(seen["iterates"][step][name], weights[name])
        for step, weights in seen["validated"].items():
            wanted = averages if step > start else iterates
            for name in parameters:
                same(weights[name], wanted[step][name])
        last = Regression(normalizes=True, dropout=0.0)
        last.load_state_dict(averages[6 * n])
        update_bn(batches_of_all_ranks(epoch=5), last)
        for name, value in last.state_dict().items():
            if "num_batches" not in name:
                torch.testing.assert_close(seen["left"][name], value, rtol=1e-5, atol=1e-6)
    one, other = (seen["left"] for seen in ours)
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def t0_of(step):
    """Return the t0 with which torch averages the iterates after a step."""
    return step - 1
