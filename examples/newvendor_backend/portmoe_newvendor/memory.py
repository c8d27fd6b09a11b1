"""Memory: statistics in bytes, from the vendor's runtime."""

from portmoe.accelerator import Memory


class NewvendorMemory(Memory):
    def allocated(self) -> int:
        from portmoe_newvendor import runtime

        return runtime.memory_allocated()

    def peak(self) -> int:
        from portmoe_newvendor import runtime

        return runtime.memory_peak()

    def reset_peak(self) -> None:
        from portmoe_newvendor import runtime

        runtime.memory_reset_peak()

    def total(self) -> int:
        from portmoe_newvendor import runtime

        return runtime.memory_total()
