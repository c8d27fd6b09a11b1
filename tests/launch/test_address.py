"""A host without an address is named in seconds, unless SLURM knows where it is."""

import os
import time
from dataclasses import replace

import pytest

from portmoe.errors import BackendError
from portmoe.launch.address import with_known_address
from portmoe.launch.ranks import Ranks

UNKNOWN = "node17.invalid"
RANKS = Ranks(1, 0, 4, 1, "node18", UNKNOWN, 20000, "srun")


def test_an_unknown_host_is_named_with_what_to_set():
    began = time.monotonic()
    with pytest.raises(BackendError, match=rf"rank 1 \(node18\).*'{UNKNOWN}'.*MASTER_ADDR"):
        with_known_address(RANKS, {"PATH": ""}, patience=2.0)
    assert time.monotonic() - began < 6
    assert BackendError.exit_code == 3


@pytest.mark.parametrize(
    "aliases", [f"a:10.0.0.1:a,{UNKNOWN}:127.0.0.9:x", f"{UNKNOWN}:[127.0.0.9]:x", f"{UNKNOWN}:127.0.0.9"]
)
def test_the_address_in_slurms_aliases_is_taken(aliases):
    found = with_known_address(RANKS, {"SLURM_NODE_ALIASES": aliases}, patience=2.0)
    assert found == replace(RANKS, master_address="127.0.0.9")


@pytest.mark.parametrize("answer", ["127.0.0.9", UNKNOWN])
def test_the_address_scontrol_tells_is_taken_if_it_is_one(tmp_path, monkeypatch, answer):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho NodeName=$3 Arch=x86_64 NodeAddr={answer} NodeHostName=x\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if answer == UNKNOWN:
        with pytest.raises(BackendError, match="MASTER_ADDR"):
            with_known_address(RANKS, {}, patience=2.0)
    else:
        assert with_known_address(RANKS, {}, patience=2.0).master_address == answer
        given = replace(RANKS, source="torchrun")
        with pytest.raises(BackendError, match="MASTER_ADDR"):
            with_known_address(given, {"MASTER_ADDR": UNKNOWN}, patience=2.0)


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "::1"])
def test_a_known_host_stays_as_it_is(address):
    ranks = replace(RANKS, master_address=address)
    assert with_known_address(ranks, {}) is ranks
