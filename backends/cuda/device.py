"""NVIDIA GPUs as devices."""

from collections.abc import Mapping

import torch

from portmoe.accelerator import Device, Probe
from portmoe.backends.cuda.probe import INSTALL_DRIVER, INSTALL_TORCH, check_driver, driver_version, software

# Dense peaks by NVIDIA's data sheets, in 10¹² FLOP/s: bfloat16 and float16, TF32, float32.
# The first row whose words are all in the device's name is taken.
DATA_SHEET: tuple[tuple[frozenset[str], tuple[float, float, float]], ...] = (
    (frozenset({"A100"}), (312, 156, 19.5)),
    (frozenset({"A800"}), (312, 156, 19.5)),
    (frozenset({"H100", "PCIe"}), (756, 378, 51)),
    (frozenset({"H100", "NVL"}), (835, 417.5, 60)),
    (frozenset({"H100"}), (989, 494.5, 67)),
    (frozenset({"H800"}), (989, 494.5, 67)),
    (frozenset({"H200", "NVL"}), (835, 417.5, 60)),
    (frozenset({"H200"}), (989, 494.5, 67)),
    (frozenset({"GH200"}), (989, 494.5, 67)),
    (frozenset({"L40S"}), (362, 183, 91.6)),
    (frozenset({"L4"}), (121, 60, 30.3)),
)


class CudaDevice(Device):
    """torch.cuda; the generic calls of ``torch.accelerator`` cover the rest."""

    type = "cuda"

    advice = INSTALL_DRIVER

    def software(self) -> Probe:
        return software()

    def find_devices(self, probe: Probe) -> None:
        if torch.version.cuda is None:
            probe.fail(f"the installed torch {torch.__version__} was built without CUDA", INSTALL_TORCH)
            return
        probe.facts["CUDA of torch"] = torch.version.cuda
        super().find_devices(probe)
        if not probe.usable:
            check_driver(probe, driver_version(), int(torch.version.cuda.split(".")[0]))
            return
        if not torch.distributed.is_nccl_available():
            probe.fail(f"the installed torch {torch.__version__} was built without NCCL", INSTALL_TORCH)
        self._check_kernels(probe)

    def _check_kernels(self, probe: Probe) -> None:
        """Warn where this torch has no kernels for the GPU's generation."""
        major, minor = torch.cuda.get_device_capability()
        probe.facts["compute capability"] = f"{major}.{minor}"
        # A binary for sm_XY runs on every later minor of the same major; PTX would be compiled at first use.
        architectures = torch.cuda.get_arch_list()
        if not any(
            a.startswith(f"sm_{major}") and int(a[-1:]) <= minor for a in architectures if a[3:].isdigit()
        ):
            probe.warn(
                f"this torch has kernels for {', '.join(architectures)} and none for sm_{major}{minor}",
                "install a torch release that lists this GPU's generation",
            )

    def deterministic_environment(self) -> Mapping[str, str]:
        # The workspace size cuBLAS needs to repeat itself, and one fixed reduction order in NCCL.
        return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}

    def data_sheet_flops(self, dtype: torch.dtype) -> float | None:
        words = set(self.name().replace("-", " ").split())
        row = next((peaks for needed, peaks in DATA_SHEET if needed <= words), None)
        if row is None:
            return None
        half, tf32, single = row
        if dtype in (torch.bfloat16, torch.float16):
            return half * 1e12
        if dtype == torch.float32:
            exact = torch.get_float32_matmul_precision() == "highest"
            return (single if exact else tf32) * 1e12
        return None
