import pytest

from portmoe.launch.placement import placement


@pytest.mark.parametrize(
    ("places", "shown"),
    [
        ([("node1", "cpu")], "0 on node1: cpu"),
        ([("node1", "cpu")] * 4, "0-3 on node1: cpu each"),
        (
            [("node1", "npu:0"), ("node1", "npu:1"), ("node2", "npu:0")],
            "0-1 on node1: npu:0-1\n2 on node2: npu:0",
        ),
        ([("node1", "xpu:2"), ("node1", "xpu:3")], "0-1 on node1: xpu:2-3"),
        ([("node1", "cuda:1"), ("node1", "cuda:0")], "0-1 on node1: cuda:1 cuda:0"),
        ([("node1", "cuda:0"), ("node1", "cuda:0")], "0-1 on node1: cuda:0 each"),
        # Ranks dealt out cyclically: a host has several lines, in the order of the ranks.
        ([("a", "cpu"), ("b", "cpu"), ("a", "cpu")], "0 on a: cpu\n1 on b: cpu\n2 on a: cpu"),
    ],
)
def test_a_line_for_each_run_of_ranks_on_a_host(places, shown):
    assert placement(places) == shown
