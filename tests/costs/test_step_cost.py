"""The bytes a step cannot do without, worked out by hand for one small rank."""

from agreement import workload

from portmoe.costs.step_cost import step_cost

# T 24, H 16, heads · width 16, F 24, E 4, k 2, V 40, four bytes a number; rows k·T = 48.
ACTIVATION = 24 * 16 * 4
ROWS = 48 * 16 * 4
BY_HAND = {
    "router": 3 * ACTIVATION,
    "dispatch": 2 * (ACTIVATION + ROWS),
    "experts": 3 * (3 * 4 * 24 * 16 * 4) + 4 * ROWS,  # w1, w2, w3 of four experts: twice, and their gradient
    "combine": 2 * (ACTIVATION + ROWS) + ROWS,
    "attention": 2 * 3 * (4 * 16 * 16 * 4 + 2 * ACTIVATION + 4 * 24 * 16 * 4),  # in both layers
    "dense network": 3 * (3 * 24 * 16 * 4) + 4 * ACTIVATION,
    "norms": 5 * 5 * ACTIVATION,  # two a layer and the last
    "loss": 3 * 40 * 16 * 4 + 2 * ACTIVATION,
}


def test_the_bytes_of_every_part():
    costs = step_cost(workload(), moe_layers=1, dense_layers=1, head=True, micro_batches=2, parameters=10)
    assert {part: cost.bytes for part, cost in costs.items()} == {
        part: 2 * size for part, size in BY_HAND.items()
    } | {"optimizer": 8 * 4 * 10}
