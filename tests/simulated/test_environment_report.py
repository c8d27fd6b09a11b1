"""check-env on the simulated NPU shows the environment that is set for its stack."""

import json
import subprocess
import sys

import pytest

# What torch_npu, its allocator and HCCL read when they start; HCCL's limits are check-env's own.
STACK = {
    "TORCH_NPU_FALLBACK_CPU_DISABLE=1",
    "INF_NAN_MODE_ENABLE=1",
    "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True",
    "HCCL_CONNECT_TIMEOUT=300",
    "HCCL_EXEC_TIMEOUT=120",
    "HCCL_EVENT_TIMEOUT=180",
}


@pytest.mark.timeout(600)  # compiles the device
def test_the_environment_of_the_stack_is_shown(simulated):
    names = {variable.partition("=")[0] for variable in STACK} | {"HCCL_DETERMINISTIC"}
    clean = {key: value for key, value in simulated.items() if key not in names}
    command = [sys.executable, "-m", "portmoe", "check-env", "--backend", "npu", "--json"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=560)
    checks = {check["check"]: check for check in json.loads(done.stdout)["backends"]["npu"]["checks"]}
    shown, _, deterministic = checks["environment"]["text"].partition("; with cudnn_deterministic also ")
    assert set(shown.split(", ")) >= STACK
    assert deterministic == "HCCL_DETERMINISTIC=true"
    assert "npu_moe_gating_top_k_softmax" in checks["topk_gating"]["text"]
    assert checks["operations"]["text"].startswith("moe.use_fused_gating is not met")
