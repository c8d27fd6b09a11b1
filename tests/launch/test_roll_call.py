"""What a rank says of the others when the store of the roll call is gone too."""

import pytest

from portmoe.launch.ranks import detect
from portmoe.launch.roll_call import RollCall


class LostStore:
    """A store whose holder is gone; ``told``: what the answering thread learns just before."""

    def __init__(self, told=None):
        self.told = told
        self.roll_call = None

    def set(self, key, value):
        self.roll_call._gone = self.told
        raise RuntimeError("Broken pipe")

    def check(self, keys):
        return False


@pytest.mark.parametrize(("told", "gone"), [(None, [0]), ("2", [2]), ("1,3", [1, 3])])
def test_without_a_store_it_is_rank_0_that_held_it_unless_more_is_known(told, gone, monkeypatch):
    store = LostStore(told)
    monkeypatch.setattr("portmoe.launch.roll_call._get_default_store", lambda: store)
    store.roll_call = roll_call = RollCall(detect("local"))
    assert roll_call.gone() == gone
    roll_call.close()
