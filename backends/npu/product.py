"""Which product a device is, and which products the documentation of a function names.

torch_npu documents each of its functions on a page of its own, and most pages list the products they hold
for. A product that a page leaves out is not asked to run the function, and the record names the page.
"""

import os

import torch

VARIABLE = "PORTMOE_NPU_PRODUCT"  # takes a device for another product, against its name

# Names of devices, by how they begin after "Ascend".
PRODUCTS = {"910B": "A2", "910_93": "A3", "950": "950"}

# Products by function, as the pages of 2.13.0 list them (2.11.0 and 2.12.0 list no more). A function that is
# not here has a page without a list, or no page: no product is excluded.
PAGES: dict[str, tuple[str, ...]] = {
    "npu_rotary_mul": ("A2", "A3"),
    "npu_swiglu": ("A2",),
    "npu_fusion_attention": ("A2",),
    "npu_fusion_attention_v2": ("A2", "A3", "950"),
    "npu_moe_token_permute": ("A2", "A3", "950"),
    "npu_moe_token_unpermute": ("A2", "A3", "950"),
    "npu_grouped_matmul": ("A2",),
    "npu_grouped_matmul_add_": ("A2", "A3", "950"),
    "npu_apply_adam_w": ("A2",),
}


def product_named(name: str) -> str | None:
    """The product of a device called ``name``, as "Ascend910B2"; None where the name says none."""
    return next((product for part, product in PRODUCTS.items() if f"Ascend{part}" in name), None)


def excluded(function: str, device: torch.device) -> str | None:
    """Why ``function`` is not for this device's product; None where nothing says so."""
    if device.type != "npu" or function not in PAGES:
        return None
    name = torch.get_device_module("npu").get_device_name(device.index or 0)
    product = os.environ.get(VARIABLE) or product_named(name)
    if product is None or product in PAGES[function]:
        return None
    listed = ", ".join(PAGES[function])
    return (
        f"the page of {function} in torch_npu 2.13.0 lists {listed}, and {name} is {product} "
        f"({VARIABLE}={PAGES[function][0]} takes it all the same)"
    )
