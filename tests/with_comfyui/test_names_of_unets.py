"""The two namings of Stable Diffusion UNets in lora_merge/, against ComfyUI's own table."""

import comfy.utils
import pytest

from lcm_kit.lora_merge.naming import names, unet
from lcm_kit.lora_merge.naming.unet import infer_layout

SD15 = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
SDXL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["SD1.5", "SDXL"])
def test_both_namings_of_every_module_are_one(config):
    table = comfy.utils.unet_to_diffusers(config)
    pairs = {
        diffusers.removesuffix(".weight").replace(".", "_"): ldm.removesuffix(".weight").replace(".", "_")
        for diffusers, ldm in table.items()
        if diffusers.endswith(".weight")
    }
    assert len(pairs) > 300
    layout = infer_layout(pairs)
    assert {d: names.canonical(f"lora_unet_{d}", layout) for d in pairs} == {
        d: f"lora_unet_{ldm}" for d, ldm in pairs.items()
    }
    # label_emb has two diffusers names, of which SDXL's is the one to write
    back = {ldm: diffusers for diffusers, ldm in pairs.items() if not diffusers.startswith("class_embedding")}
    layout = infer_layout(back)
    assert {ldm: unet.to_diffusers(ldm, layout) or ldm for ldm in back} == back
