"""Noticing that the cores are busy, from the scheduler's own counts."""

import pytest

from portmoe.record.busy_cores import BusyCores


def counted(folder, *threads):
    for number, (ran, waited) in enumerate(threads):
        (folder / str(number)).mkdir(exist_ok=True)
        (folder / str(number) / "schedstat").write_text(f"{ran} {waited} 7\n")


@pytest.mark.parametrize(("waited", "said"), [(2_900, None), (3_100, "51%")])
def test_it_is_said_once_that_others_keep_the_cores_busy(tmp_path, waited, said):
    now = [0.0]
    counted(tmp_path, (10_000, 90_000), (0, 0))  # before the run, which counts for nothing
    cores = BusyCores(tmp_path, lambda: now[0])
    counted(tmp_path, (12_000, 90_000 + waited - 100), (1_000, 100))
    now[0] = 9.0
    assert cores.look() is None  # too early to tell
    now[0] = 11.0
    told = cores.look()
    assert told is None if said is None else said in told
    counted(tmp_path, (12_000, 990_000), (1_000, 100))
    now[0] = 22.0
    assert (cores.look() is None) == (said is not None)


def test_where_the_kernel_does_not_count_nothing_is_said(tmp_path):
    now = [0.0]
    cores = BusyCores(tmp_path / "nothing", lambda: now[0])
    now[0] = 60.0
    assert cores.look() is None
