"""The published LoRAs that make few-step models, as data: how to know each one and which settings it wants.

Where the facts come from:
- sha256 and bytes of LCM-LoRA SD1.5 and SDXL, Lightning 4 steps and DMD2: several independent public download lists.
- sha256 of Hyper-SDXL CFG (8 and 12 steps) and Hyper-SDXL 4 and 8 steps, with their bytes: two public lists each.
- sha256 of LCM-LoRA SSD-1B, VegaRT, TCD, the other Hyper-SD files and PCM, and of Lightning 2 steps: one list each.
  That list of PCM gives steps and guidance, not names: of the guidance-free 4-step files, those that stand in the row
  of the small-cfg files are taken for these, and the one beside it for the LCM-like file.
- sha256 and bytes of the LoRAs for Wan, Qwen-Image, Flux.2 and LTX-2: what the repository that publishes them, or a copy
  of it, states of its large files, and public download lists, most of them several that agree. Kijai's and lightx2v's
  own copies of one LoRA are different files. One file of lightx2v's stands in two of its repositories, as the Wan 2.1
  I2V LoRA and as the low-noise half of a Wan 2.2 pair; it is listed as the first.
- modules, rank, alpha, parameters: counted from the UNets' configurations, with the rank of the released training
  script and the alpha of its published adapter configuration; Table 1 of arXiv 2311.05556 rounds the same counts.
Bytes and structure that nobody states are None; `about` stands for a size that was stated rounded. Files whose hash nobody states (Lightning 8 steps, TDD, AnimateLCM,
TCD for SD2.1) are not listed; they are recognised as acceleration LoRAs by structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Expert = Literal["high", "low"]
# A rounded size is that of the file to so much.
_ROUNDED = 0.01


@dataclass(frozen=True)
class Published:
    """One published file.

    name: what to call it.   base: name of a base in base_models.py or transformers.py.
    preset: name of the sampling settings it was made for.
    sha256: of the file, lower case.   repository: owner/name on huggingface.co.   file: its name there.
    bytes, modules, rank, alpha, parameters: None where unknown; parameters counts values of all factors.
    about: bytes, rounded to three digits.   steps: model calls it was distilled for, where the preset does not say it.
    expert: of a model in two halves (Wan 2.2 A14B) the half that it is for, the high noise or the low.
    """

    name: str
    base: str
    preset: str
    sha256: str
    repository: str
    file: str = "pytorch_lora_weights.safetensors"
    bytes: int | None = None
    modules: int | None = None
    rank: int | None = None
    alpha: float | None = None
    parameters: int | None = None
    about: int | None = None
    steps: int | None = None
    expert: Expert | None = None

    def may_have(self, size: int) -> bool | None:
        """Whether a file of so many bytes can be it; None where nobody states its size."""
        if self.bytes is not None:
            return self.bytes == size
        return None if self.about is None else abs(size - self.about) <= _ROUNDED * self.about

    @property
    def link(self) -> str:
        return f"https://huggingface.co/{self.repository}"


_HYPER = "ByteDance/Hyper-SD"
_LIGHTNING = "ByteDance/SDXL-Lightning"
_DMD2 = "tianweiy/DMD2"
_PCM = "wangfuyun/PCM_Weights"
_KIJAI = "Kijai/WanVideo_comfy"
_REPACKAGED_WAN = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"

# Presets by the name that they have in samplers/presets.py.
_WAN_21, _WAN_22 = "Wan 2.1 lightx2v", "Wan 2.2 lightx2v"
_FLUX2_TURBO, _LTX2_DISTILLED = "Flux.2 Turbo", "LTX-2 distilled"


def _lcm(base: str, sha256: str, repository: str, size: int | None, modules: int, parameters: int) -> Published:
    return Published(
        f"LCM-LoRA {base}", base=base, preset="LCM", sha256=sha256, repository=repository,
        bytes=size, modules=modules, rank=64, alpha=8.0, parameters=parameters,
    )  # fmt: skip


def _hyper(family: str, base: str, steps: str, preset: str, sha256: str, size: int | None = None) -> Published:
    return Published(
        f"Hyper-{family} {steps}",
        base=base,
        preset=preset,
        sha256=sha256,
        repository=_HYPER,
        file=f"Hyper-{family}-{steps}-lora.safetensors",
        bytes=size,
    )


def _pcm(base: str, kind: str, preset: str, *hashes: str) -> list[Published]:
    folder = {"SD1.5": "sd15", "SDXL": "sdxl"}[base]
    file = f"{folder}/pcm_{folder}_{kind}_converted.safetensors"
    return [
        Published(
            f"PCM {base} {kind.replace('_', ' ')}", base=base, preset=preset, sha256=sha256, repository=_PCM, file=file
        )
        for sha256 in hashes
    ]


def _qwen(
    kind: str, steps: int, version: str, sha256: str, size: int | None = None, about: int | None = None
) -> Published:
    """kind: what stands before "Lightning" in the file's name, version behind the steps. By DMD, in lightx2v's framework."""
    name = f"{kind}-Lightning-{steps}steps-{version}"
    repository = f"lightx2v/{kind}-Lightning" if "2511" in kind else "lightx2v/Qwen-Image-Lightning"
    folder = f"{kind}/" if "2509" in kind else ""
    return Published(
        name, base="Qwen-Image", preset=f"Qwen-Image-Lightning {steps} steps", sha256=sha256, repository=repository,
        file=f"{folder}{name}.safetensors",
        bytes=size, about=about, steps=steps,
    )  # fmt: skip


def _wan(
    name: str,
    preset: str,
    sha256: str,
    repository: str,
    file: str,
    size: int | None = None,
    *,
    about: int | None = None,
    expert: Expert | None = None,
) -> Published:
    """A LoRA of lightx2v's: 4 steps without guidance, by self-forcing and DMD."""
    return Published(
        f"lightx2v {name}", base="Wan 2.1/2.2 14B", preset=preset, sha256=sha256, repository=repository, file=file,
        bytes=size, about=about, steps=4, expert=expert,
    )  # fmt: skip


PUBLISHED: tuple[Published, ...] = (
    _lcm("SD1.5", "8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4",
         "latent-consistency/lcm-lora-sdv1-5", 134_621_556, 278, 67_252_224),
    _lcm("SDXL", "a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141",
         "latent-consistency/lcm-lora-sdxl", 393_855_224, 788, 196_751_360),
    _lcm("SSD-1B", "7adaaa69db6f011058a19fd1d5315fdf19ef79fcd513cdab30e173833fd5c59b",
         "latent-consistency/lcm-lora-ssd-1b", None, 423, 104_902_656),
    Published("LCM-LoRA SDXL (Fooocus's copy)", base="SDXL", preset="LCM",
              sha256="c3dbf7eb26dd00ae6b6b95da69be9f1cb95a3b2c5bcf9be82323227a19b91329",
              repository="lllyasviel/misc", file="sdxl_lcm_lora.safetensors", bytes=393_854_624),
    Published("Segmind-VegaRT", base="Segmind-Vega", preset="LCM",
              sha256="9b6e8cd833fa205eaeeed391ca623a6f2546e447470bd1c5dcce3fa8d2f26afb",
              repository="segmind/Segmind-VegaRT"),
    Published("TCD-LoRA SDXL", base="SDXL", preset="TCD",
              sha256="2c777bc60abf41d3eb0fe405d23d73c280a020eea5adf97a82a141592c33feba", repository="h1t/TCD-SDXL-LoRA"),
    Published("TCD-LoRA SD1.5", base="SD1.5", preset="TCD",
              sha256="eaecb24a1cda4411eab67275b1d991071216ac93693e8fa0c9226c9df0386232", repository="h1t/TCD-SD15-LoRA"),
    Published("DMD2 SDXL 4 steps", base="SDXL", preset="DMD2",
              sha256="b3d9173815a4b595991c3a7a0e0e63ad821080f314a0b2a3cc31ecd7fcf2cbb8",
              repository=_DMD2, file="dmd2_sdxl_4step_lora_fp16.safetensors", bytes=393_854_592),
    Published("DMD2 SDXL 4 steps (fp32)", base="SDXL", preset="DMD2",
              sha256="a374289e9446d7f14d2037c4b3770756b7b52c292142a691377c3c755010a1bb",
              repository=_DMD2, file="dmd2_sdxl_4step_lora.safetensors", bytes=787_359_616),
    Published("SDXL-Lightning 2 steps", base="SDXL", preset="Lightning 2 steps",
              sha256="04fafc778385b24144498a8247498ae4fb7a69f702ea0566bdce2845a31fcc43",
              repository=_LIGHTNING, file="sdxl_lightning_2step_lora.safetensors"),
    Published("SDXL-Lightning 4 steps", base="SDXL", preset="Lightning 4 steps",
              sha256="bf56cf2657efb15e465d81402ed481d1e11c4677e4bcce1bc11fe71ad8506b79",
              repository=_LIGHTNING, file="sdxl_lightning_4step_lora.safetensors", bytes=393_854_592),
    _hyper("SDXL", "SDXL", "1step", "Hyper-SD unified",
           "c912df184c5116792d2c604d26c6bc2aa916685f4a793755255cda1c43a3c78a"),
    _hyper("SDXL", "SDXL", "2steps", "Hyper-SD 2 steps",
           "69b25c0187ced301c3603c599c0bc509ac99b8ac34db89a2aecc3d5f77a35187"),
    _hyper("SDXL", "SDXL", "4steps", "Hyper-SD 4 steps",
           "12f81a27d00a751a40d68fd15597091896c5a90f3bd632fb6c475607cbdad76e", 787_359_648),
    _hyper("SDXL", "SDXL", "8steps", "Hyper-SD 8 steps",
           "ca689190e8c46038550384b5675488526cfe5a40d35f82b27acb75c100f417c1", 787_359_648),
    _hyper("SDXL", "SDXL", "8steps-CFG", "Hyper-SD 8 steps CFG",
           "55b51334c85061afff5eff7c550b61963c8b8607a5868bbe4f26db49374719b1", 825_798_408),
    _hyper("SDXL", "SDXL", "12steps-CFG", "Hyper-SD 12 steps CFG",
           "0b97f447b5878323a28fbe7c51ba7acebd21f4d77552ba77b04b11c8911825b6", 825_798_408),
    _hyper("SD15", "SD1.5", "1step", "Hyper-SD unified",
           "a04fd9a535c1e56d38f7590ee72a13fd5ca0409853b4fff021e5a9482cf1ca3b"),
    _hyper("SD15", "SD1.5", "2steps", "Hyper-SD 2 steps",
           "2f26dcc1d883feb07557a552315baae2ca2a04ac08556b08a355a244547e8c3a"),
    _hyper("SD15", "SD1.5", "4steps", "Hyper-SD 4 steps",
           "c5dd058616461ed5053e2b14eec4dbe3fa0eea3b13688642f6d6c80ea2ba5958"),
    _hyper("SD15", "SD1.5", "8steps", "Hyper-SD 8 steps",
           "91fc3186236e956d64dbb4357f2e120c69b968b78af7d2db9884a5ca74d3cd13"),
    _hyper("SD15", "SD1.5", "8steps-CFG", "Hyper-SD 8 steps CFG",
           "f6123d5b950d5250ab6c33600e27f4dcf71b3099ebf888685e01e9e8117ce482"),
    _hyper("SD15", "SD1.5", "12steps-CFG", "Hyper-SD 12 steps CFG",
           "64b98437383537cd968fda6f87a05c33160ece9c79ff4757949a1e212ff78361"),
    *_pcm("SDXL", "smallcfg_2step", "PCM small cfg 2 steps",
          "242cbe4695fe3f2e248faa71cf53f2ccbf248a316973e4b2f38ab9e34f35a5ab",
          "e1f600491bb8e0cd94f41144321e44fdb2cb346447f31e71f6e53f1c24cccfbf"),
    *_pcm("SDXL", "smallcfg_4step", "PCM small cfg 4 steps",
          "d0bf40a7f280829195563486bec7253f043a06b1f218602b20901c367641023e",
          "212150d7953627fb89df99aad579d6763645a1cb2ef26b19fee8b398d5e5ff4d"),
    *_pcm("SDXL", "smallcfg_8step", "PCM small cfg 8 steps",
          "e80fcf46d15f4d3821d3d9611bdb3022a4a8b647b2536833b168d317a91e4f74",
          "56ed9dc9f51f4bb0d6172e13b7947f215c347fc0da341c8951b2c12b9507d09e"),
    *_pcm("SDXL", "smallcfg_16step", "PCM small cfg 16 steps",
          "13fb038025ce9dad93b8ee1b67fc81bac8affb59a77b67d408d286e0b0365a1d",
          "3442eff271aa3b60a094fd6f9169d03e49e4051044a974f6fcf690507959191f"),
    *_pcm("SDXL", "normalcfg_4step", "PCM normal cfg 4 steps",
          "a85cf70ac16ed42011630a5cd6b5927722cb7c40a2107eff85e2670f9a38c893",
          "9f7f13bb019925eacd89aeff678e4fd831f7b60245b986855dff6634aee4eba9"),
    *_pcm("SDXL", "normalcfg_8step", "PCM normal cfg 8 steps",
          "3b9c970a3e4c0e182931e71b3f769c1956f16c6b06db98b4d67236790d4d0b1d",
          "7f04ba8911b4c25ef2c7cbf74abcb6daa3b4f0e4bc6a03896bdae7601f2f180b"),
    *_pcm("SDXL", "normalcfg_16step", "PCM normal cfg 16 steps",
          "04ea827435d5750e63d113dc509174b4f6e8a069ff8f91970c3d25299c10b1f8",
          "7eb353b2abcaabab6251ba4e17d6cbe2e763feb0674b0f950555552212b44621"),
    *_pcm("SDXL", "lcmlike_lora", "PCM LCM-like",
          "0365f6107250a4fed1b83e8ae6a070065e026a2ba54bff65f55a50284232bbe6"),
    *_pcm("SD1.5", "smallcfg_2step", "PCM small cfg 2 steps",
          "4c5f27a727d12146de4b1d987cee3343bca89b085d12b03c45297af05ce88ef4"),
    *_pcm("SD1.5", "smallcfg_4step", "PCM small cfg 4 steps",
          "29278bc86274fdfc840961e3c250758ff5e2dc4666d940f103e78630d5b879d3"),
    *_pcm("SD1.5", "smallcfg_8step", "PCM small cfg 8 steps",
          "41a7f0b966d18f643d16c4401f0b5ef6b9ef7362c20e17128322f17874709107"),
    *_pcm("SD1.5", "smallcfg_16step", "PCM small cfg 16 steps",
          "c7ac2fa3df3a5b7080ebe63f259ab13630014f104c93c3c706d77b05cc48506b"),
    *_pcm("SD1.5", "normalcfg_4step", "PCM normal cfg 4 steps",
          "fa6acb94f11dba3bf4120af5a12e3c88cd2b9572d43ec1a6fb04eede9f32829e"),
    *_pcm("SD1.5", "normalcfg_8step", "PCM normal cfg 8 steps",
          "bff3d4499718b61455b0757b5f8d98fe23e73a768b538c82ecf91c693b69dbcd"),
    *_pcm("SD1.5", "normalcfg_16step", "PCM normal cfg 16 steps",
          "8f605ffde3616592deb37ed8c6bacb83fe98963c1fd0883c2a4f93787098aa45"),
    *_pcm("SD1.5", "lcmlike_lora", "PCM LCM-like",
          "b80b27dd6504f1c3a7637237dda86bc7e26fa5766da30c4fc853c0a1d46bad31"),
    _qwen("Qwen-Image", 4, "V1.0", "9526e90d71c4290392feeccf3c2172cb77ab3a489f1faeb956637f97acb4c8b1", 1_698_951_104),
    _qwen("Qwen-Image", 4, "V1.0-bf16", "3ac242b4ff22f62f3bf195b927ba6d23ce23f08f320b24ccca94fb90ecdf8c84", 849_608_296),
    _qwen("Qwen-Image", 8, "V1.1-bf16", "fe04c3ec1dd46f361fe29010027da4168c439f93143879731ca8d407935279c8", 849_608_296),
    _qwen("Qwen-Image", 4, "V2.0", "878c519b75aaa19c5f37ef57b312ac035e936a0a36b14e02269e9dfd53d2c228",
          about=1_700_000_000),
    _qwen("Qwen-Image-Edit", 4, "V1.0", "e752ea1553f09626362a47728a43826d22d21f3ea3b19e26b4c6c023ef43cc1b",
          1_698_951_104),
    _qwen("Qwen-Image-Edit", 4, "V1.0-bf16", "d8132c32e7df906603dd6b072ff2fb0af88ab15ef0f3ac697a2011c8b47bbeb1",
          849_608_296),
    _qwen("Qwen-Image-Edit", 8, "V1.0", "5910104f8922bd3fa359c675ba2a72681327f538cfa768eb33044055bd27a826",
          1_698_951_104),
    _qwen("Qwen-Image-Edit-2509", 4, "V1.0-fp32", "6065f62669c999b4516ac4a6e7a120252bf7ff819b407dcb77b868d575e736b1",
          1_698_951_104),
    _qwen("Qwen-Image-Edit-2509", 8, "V1.0-fp32", "eece790fc6ac8c0e36ce8e53cb5f78edf370bf2da79918148db037f529f7e841",
          1_698_951_104),
    _qwen("Qwen-Image-Edit-2511", 4, "V1.0-bf16", "22226e8d05d354bb356627d428809f5afd7819399b077238a2b70a82883a904f",
          849_608_296),
    _wan("Wan 2.2 I2V high noise, v1", _WAN_22, "d176c808d6fc461999b68e321efcb7501b20b8c3797523ed0df14f7d1deff11e",
         _REPACKAGED_WAN, "split_files/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors",
         1_226_977_424, expert="high"),
    _wan("Wan 2.2 I2V low noise, v1", _WAN_22, "024f21de095bc8fad9809ded3e9e49a2e170dcf27075da8145ba7d60d8aab7f9",
         _REPACKAGED_WAN, "split_files/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors",
         1_226_977_424, expert="low"),
    _wan("Wan 2.2 T2V high noise, v1.1", _WAN_22, "698321cb86bd30c4af06c9b84e656a1048c8cb54e06d50694536fb5de37fde41",
         _REPACKAGED_WAN, "split_files/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors",
         1_226_977_424, expert="high"),
    _wan("Wan 2.2 T2V low noise, v1.1", _WAN_22, "ec95216e614b3c132c11bfb387b11feedf62163150ccc9068bca8a189771e75a",
         _REPACKAGED_WAN, "split_files/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors",
         1_226_977_424, expert="low"),
    _wan("Wan 2.2 I2V high noise, rank 64, 1022", _WAN_22,
         "887c3bdeb74e83859c920438e16ca31f39ab18ce189abc5f0e36f8348c5bbb19", "lightx2v/Wan2.2-Distill-Loras",
         "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors", 634_645_944, expert="high"),
    _wan("Wan 2.1 I2V, rank 64 (and Wan 2.2 I2V low noise, 1022)", _WAN_21,
         "8833bd4fd7c8eabebf0bc8ee5cfaf47f4f310ce116928a02c1adf8941dd4b0f1", "lightx2v/Wan2.1-Distill-Loras",
         "wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors", 739_472_104),
    _wan("Wan 2.2 T2V high noise, rank 64, 1217", _WAN_22,
         "89003385f8a9d53ba58fd6ede647fdc90292e8568a54683fcfe6db5556a31769", "lightx2v/Wan2.2-Distill-Loras",
         "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors", about=614_000_000, expert="high"),
    _wan("Wan 2.2 T2V low noise, rank 64, 1217", _WAN_22,
         "4df7c206f3189472da2f92c0a42dcf308f04433d9c14302d08d56e99a3f51322", "lightx2v/Wan2.2-Distill-Loras",
         "wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors", about=614_000_000, expert="low"),
    _wan("Wan 2.1 T2V, rank 64", _WAN_21,
         "1c918df9eaa102766d8f99104209ce55fe7a892278a667a63d721c5d1c18efb1", "lightx2v/Wan2.1-Distill-Loras",
         "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors", about=631_000_000),
    _wan("Wan 2.2 I2V low noise (Lightning, fp16)", _WAN_22,
         "a3d474925042ec908c212c6c4c1e338637e27585c3970253f65b9638a9f5874b", _KIJAI,
         "Wan22-Lightning/Wan2.2-Lightning_I2V-A14B-4steps-lora_LOW_fp16.safetensors", 613_561_776, expert="low"),
    _wan("Wan 2.2 I2V high noise, v1030, rank 64", _WAN_22,
         "2c4d41a22b0c16dc360570dfa12b53b2b5452338935eb8ea24bf40d2ada89bd0", _KIJAI,
         "Wan_2_2_I2V_A14B_HIGH_lightx2v_4step_lora_v1030_rank_64_bf16.safetensors", 630_697_104, expert="high"),
    _wan("Wan 2.1 T2V, rank 32 (Kijai's copy)", _WAN_21,
         "914fafa5dded72e6c470d6f764b97fe4d71567dae7cc01d1181b310efd5c37a6", _KIJAI,
         "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors", about=317_000_000),
    _wan("Wan 2.1 T2V, v2, rank 128", _WAN_21,
         "ef33de1ae634c5f583920b38748553cb2e68f4b811be2ccabde20aa9affb5e21", _KIJAI,
         "Lightx2v/lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank128_bf16.safetensors", 1_253_192_432),
    _wan("Wan 2.1 I2V 480p, rank 64", _WAN_21,
         "85c4a61c30e0497aa44b91d93a893b624708461a56fe5485183b28fa07e2dfb3", _KIJAI,
         "Lightx2v/lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors", 738_005_744),
    _wan("Wan 2.1 I2V 480p, rank 128", _WAN_21,
         "5c324ada09cfa447844f5d9a57240463a515de38270ef40c7513d74be3e64e72", _KIJAI,
         "Lightx2v/lightx2v_I2V_14B_480p_cfg_step_distill_rank128_bf16.safetensors", 1_466_506_280),
    Published("Flux.2 dev Turbo", base="Flux.2 dev", preset=_FLUX2_TURBO,
              sha256="011487390b8020baf22a9d543930c90d74a4809b7241bee6b0622777b17b413b",
              repository="fal/FLUX.2-dev-Turbo", file="comfy/Flux_2-Turbo-LoRA_comfyui.safetensors",
              bytes=2_760_814_880, steps=8),
    Published("LTX-2.3 distilled, rank 384", base="LTX-2", preset=_LTX2_DISTILLED,
              sha256="aec1918d71536467cf71f5546c42d6bbe894f0a06115134f2a127d821301c6a4",
              repository="Lightricks/LTX-2.3", file="ltx-2.3-22b-distilled-lora-384.safetensors", bytes=7_605_507_256,
              steps=8),
    Published("LTX-2.3 distilled, rank 384, v1.1", base="LTX-2", preset=_LTX2_DISTILLED,
              sha256="fca5735c41013042a3a32d0d2829e403a5c8b094dbe01312d9d21da0db47dac9",
              repository="Lightricks/LTX-2.3", file="ltx-2.3-22b-distilled-lora-384-1.1.safetensors",
              bytes=7_605_507_256, steps=8),
)  # fmt: skip


def instead(base: str, preset: str | None, catalogue: Sequence[Published] = PUBLISHED) -> Published | None:
    """The published file to use on a base: that of the same preset if there is one, else its LCM-LoRA, else None."""
    for wanted in (preset, "LCM"):
        for entry in catalogue:
            if entry.base == base and entry.preset == wanted:
                return entry
    return None
