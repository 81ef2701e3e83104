import pytest
import torch

from canter.errors import BudgetError
from canter.runtime import LiveBytes
from canter.training.distributed import ranks
from canter.tuning.fit import measure_budget
from canter.tuning.sharding import IN_FLIGHT_BYTES, Sharding, largest_unit, with_sharding
from canter.tuning.simulate import Simulator, parse_bytes

from .conftest import small_step


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80 GB", 80e9), ("512M", 512 * 2**20), ("1.5g", 1.5 * 2**30), ("1000", 1000)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "80 bananas", "-1GB", "0", "GiB"])
def test_what_is_no_amount(text):
    with pytest.raises(BudgetError, match="no amount of memory"):
        parse_bytes(text)


def test_a_simulated_step_takes_what_a_real_ones_tensors_take(model):
    real = small_step(model)
    simulator = Simulator(model, lambda m: small_step(m, copied=False), 80e9)
    for shape in ((2, 50, 10), (8, 60, 30), (3, 100, 20)):
        real(*shape)
        with LiveBytes() as count:
            real(*shape)
        assert abs(simulator(*shape).bytes / (real.state_bytes + count.peak) - 1) < 0.05
    assert simulator.step.state_bytes == real.state_bytes


def test_simulated_time_follows_the_operations(model):
    make = lambda m: small_step(m, copied=False)  # noqa: E731
    slow = Simulator(model, make, 80e9, flops=1e9)(4, 50, 10)
    fast = Simulator(model, make, 80e9, flops=2e9)(4, 50, 10)
    assert slow.seconds == pytest.approx(2 * fast.seconds)
    assert Simulator(model, make, 80e9, flops=1e9)(8, 50, 10).seconds > 1.9 * slow.seconds


def test_a_budget_for_a_device_that_is_not_here(model, index):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    prober = Simulator(model, lambda m: small_step(m, copied=False), 1e9, {"device": "simulated 1GB"})
    budget = measure_budget(prober, index, 0.08, most_probes=8)
    assert budget.measured_on["simulated"]
    assert budget.measured_on["memory_error"] < 0.05
    assert budget.bytes(budget.max_batch(60, 20), 60, 20) > 0.9 * budget.limit_bytes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    more = with_sharding(budget, Sharding("ddp", 4), model, prober.step.state_bytes)
    assert more.fixed_bytes - budget.fixed_bytes == sum(p.nbytes for p in model.parameters())
    assert more.measured_on["ranks"] == 4
    assert with_sharding(budget, Sharding(), model, 0.0) is budget


def test_what_ranks_add(model):
    weights = sum(p.nbytes for p in model.parameters())
    state = 3 * weights
    assert Sharding().extra_bytes(model, state) == 0
    assert Sharding("ddp", 8).extra_bytes(model, state) == weights
    assert Sharding("ddp", 8, bucket_views=True).extra_bytes(model, state) == 0
    saved = [Sharding("fsdp", ranks).extra_bytes(model, state) for ranks in (2, 8, 1024)]
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] == pytest.approx(3 * largest_unit(model) - 4 * weights * (1 - 1 / 1024), rel=1e-6)
    state += sum(b.nbytes for b in model.buffers())
    assert Sharding("replicate", 8).extra_bytes(model, state) == weights < IN_FLIGHT_BYTES
    own = weights / 4 + largest_unit(model)
    assert Sharding("shard", 4).extra_bytes(model, state) == pytest.approx(own - 2 * weights * 3 / 4)
    for kind in ("shard", "fsdp"):
        with pytest.raises(BudgetError, match="--ranks is 1; sharding needs 2"):
            Sharding(kind, 1)


def test_flat_copies_are_those_of_training():
    assert IN_FLIGHT_BYTES == ranks.IN_FLIGHT * ranks.BUCKET_BYTES
