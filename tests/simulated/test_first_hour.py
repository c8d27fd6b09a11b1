"""The first hour on the simulated card, with crashes, hangs, wrong values and missing symbols planted."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(600)


def bring_up(folder, environment, faults, *arguments):
    command = [sys.executable, "-m", "portmoe.verify.bring_up", "--backend", "npu", "--out", str(folder)]
    done = subprocess.run(
        [*command, *arguments],
        env=environment | {"SIMULATED_NPU_FAULTS": faults},
        capture_output=True,
        text=True,
        timeout=580,
    )
    found = json.loads((folder / "summary.json").read_text())["findings"]
    return done.returncode, {(f["stage"], f["subject"]): f for f in found}


def test_a_crash_of_the_driver_names_its_function(tmp_path, simulated):
    only = ("--stage", "functions", "--only", "swiglu.npu_swiglu", "--only", "attention.npu_fusion_attention")
    code, found = bring_up(tmp_path, simulated, "crash:npu_swiglu lack:npu_fusion_attention", *only)
    assert code == 4
    crashed = found["functions", "swiglu.npu_swiglu"]
    assert (crashed["status"], crashed["text"]) == ("died", "ended by SIGSEGV in float32")
    missing = found["functions", "attention.npu_fusion_attention"]
    assert missing["status"] == "not taken"
    assert "has no npu_fusion_attention" in missing["text"]
    assert "swiglu.npu_swiglu" in (tmp_path / "SUMMARY.txt").read_text().partition("left out of")[2]


@pytest.mark.slow
def test_the_whole_hour_goes_on_without_what_is_broken(tmp_path, simulated):
    faults = (
        "hang:npu_rms_norm wrong:npu_rotary_mul:1.01 gradient:npu_grouped_matmul:1.01 fail:npu_apply_adam_w"
    )
    names = ("rms_norm.npu_rms_norm", "rotary.npu_rotary_mul", "swiglu.npu_swiglu", "adamw.npu_apply_adam_w")
    names += ("expert_ffn.npu_grouped_matmul", "expert_ffn_ragged.npu_grouped_matmul")
    only = [part for name in names for part in ("--only", name)]
    code, found = bring_up(tmp_path, simulated, faults, "--timeout", "60", *only)
    assert code == 4
    statuses = {subject: f["status"] for (stage, subject), f in found.items() if stage == "functions"}
    assert statuses == {
        "rms_norm.npu_rms_norm": "died",
        "rotary.npu_rotary_mul": "fail",
        "swiglu.npu_swiglu": "pass",
        "adamw.npu_apply_adam_w": "fail",
        "expert_ffn.npu_grouped_matmul": "fail",
        "expert_ffn_ragged.npu_grouped_matmul": "fail",
    }
    assert "did not end" in found["functions", "rms_norm.npu_rms_norm"]["text"]
    assert found["validate", "--quick"]["status"] == "skip"
    for stage, subject in (
        ("bisect", "static"),
        ("bisect", "dropless"),
        ("train", "npu"),
        ("compare", "cpu"),
        ("replay", "cpu"),
    ):
        assert found[stage, subject]["status"] == "pass", found[stage, subject]
