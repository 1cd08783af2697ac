"""The published LoRAs that make few-step models, as data: how to know each one and which settings it wants.

Where the facts come from:
- sha256 and bytes of LCM-LoRA SD1.5 and SDXL, Lightning 4 steps and DMD2: several independent public download lists.
- sha256 of Hyper-SDXL CFG (8 and 12 steps) and Hyper-SDXL 4 and 8 steps, with their bytes: two public lists each.
- sha256 of LCM-LoRA SSD-1B, VegaRT, TCD, the other Hyper-SD files and PCM, and of Lightning 2 steps: one list each.
  That list of PCM gives steps and guidance, not names: of the guidance-free 4-step files, those that stand in the row
  of the small-cfg files are taken for these, and the one beside it for the LCM-like file.
- modules, rank, alpha, parameters: counted from the UNets' configurations, with the rank of the released training
  script and the alpha of its published adapter configuration; Table 1 of arXiv 2311.05556 rounds the same counts.
Bytes and structure that nobody states are None. Files whose hash nobody states (Lightning 8 steps, TDD, AnimateLCM,
TCD for SD2.1) are not listed; they are recognised as acceleration LoRAs by structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published file.

    name: what to call it.   base: name of a base in base_models.py.   preset: name of the sampling settings it was made for.
    sha256: of the file, lower case.   repository: owner/name on huggingface.co.   file: its name there.
    bytes, modules, rank, alpha, parameters: None where unknown; parameters counts values of all factors.
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

    @property
    def link(self) -> str:
        return f"https://huggingface.co/{self.repository}"


_HYPER = "ByteDance/Hyper-SD"
_LIGHTNING = "ByteDance/SDXL-Lightning"
_DMD2 = "tianweiy/DMD2"
_PCM = "wangfuyun/PCM_Weights"


def _lcm(base: str, sha256: str, repository: str, size: int | None, modules: int, parameters: int) -> Published:
    return Published(
        f"LCM-LoRA {base}", base, "LCM", sha256, repository,
        bytes=size, modules=modules, rank=64, alpha=8.0, parameters=parameters,
    )  # fmt: skip


def _hyper(family: str, base: str, steps: str, preset: str, sha256: str, size: int | None = None) -> Published:
    return Published(
        f"Hyper-{family} {steps}", base, preset, sha256, _HYPER, f"Hyper-{family}-{steps}-lora.safetensors", size
    )


def _pcm(base: str, kind: str, preset: str, *hashes: str) -> list[Published]:
    folder = {"SD1.5": "sd15", "SDXL": "sdxl"}[base]
    file = f"{folder}/pcm_{folder}_{kind}_converted.safetensors"
    return [Published(f"PCM {base} {kind.replace('_', ' ')}", base, preset, sha256, _PCM, file) for sha256 in hashes]


PUBLISHED: tuple[Published, ...] = (
    _lcm("SD1.5", "8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4",
         "latent-consistency/lcm-lora-sdv1-5", 134_621_556, 278, 67_252_224),
    _lcm("SDXL", "a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141",
         "latent-consistency/lcm-lora-sdxl", 393_855_224, 788, 196_751_360),
    _lcm("SSD-1B", "7adaaa69db6f011058a19fd1d5315fdf19ef79fcd513cdab30e173833fd5c59b",
         "latent-consistency/lcm-lora-ssd-1b", None, 423, 104_902_656),
    Published("LCM-LoRA SDXL (Fooocus's copy)", "SDXL", "LCM",
              "c3dbf7eb26dd00ae6b6b95da69be9f1cb95a3b2c5bcf9be82323227a19b91329",
              "lllyasviel/misc", "sdxl_lcm_lora.safetensors", 393_854_624),
    Published("Segmind-VegaRT", "Segmind-Vega", "LCM",
              "9b6e8cd833fa205eaeeed391ca623a6f2546e447470bd1c5dcce3fa8d2f26afb", "segmind/Segmind-VegaRT"),
    Published("TCD-LoRA SDXL", "SDXL", "TCD",
              "2c777bc60abf41d3eb0fe405d23d73c280a020eea5adf97a82a141592c33feba", "h1t/TCD-SDXL-LoRA"),
    Published("TCD-LoRA SD1.5", "SD1.5", "TCD",
              "eaecb24a1cda4411eab67275b1d991071216ac93693e8fa0c9226c9df0386232", "h1t/TCD-SD15-LoRA"),
    Published("DMD2 SDXL 4 steps", "SDXL", "DMD2",
              "b3d9173815a4b595991c3a7a0e0e63ad821080f314a0b2a3cc31ecd7fcf2cbb8",
              _DMD2, "dmd2_sdxl_4step_lora_fp16.safetensors", 393_854_592),
    Published("DMD2 SDXL 4 steps (fp32)", "SDXL", "DMD2",
              "a374289e9446d7f14d2037c4b3770756b7b52c292142a691377c3c755010a1bb",
              _DMD2, "dmd2_sdxl_4step_lora.safetensors", 787_359_616),
    Published("SDXL-Lightning 2 steps", "SDXL", "Lightning 2 steps",
              "04fafc778385b24144498a8247498ae4fb7a69f702ea0566bdce2845a31fcc43",
              _LIGHTNING, "sdxl_lightning_2step_lora.safetensors"),
    Published("SDXL-Lightning 4 steps", "SDXL", "Lightning 4 steps",
              "bf56cf2657efb15e465d81402ed481d1e11c4677e4bcce1bc11fe71ad8506b79",
              _LIGHTNING, "sdxl_lightning_4step_lora.safetensors", 393_854_592),
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
)  # fmt: skip


def instead(base: str, preset: str | None, catalogue: Sequence[Published] = PUBLISHED) -> Published | None:
    """The published file to use on a base: that of the same preset if there is one, else its LCM-LoRA, else None."""
    for wanted in (preset, "LCM"):
        for entry in catalogue:
            if entry.base == base and entry.preset == wanted:
                return entry
    return None
