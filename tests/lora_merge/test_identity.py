"""What a LoRA is, by hash, by structure and by its own words, in this order."""

import hashlib
import random
import re
import time

import pytest
import safetensors.torch
import torch

from lcm_kit.lora_merge import Lora, load, merge, save
from lcm_kit.lora_merge.recognise import identity
from lcm_kit.lora_merge.recognise.base_models import BY_NAME
from lcm_kit.lora_merge.recognise.catalogue import PUBLISHED, Published, instead
from lcm_kit.lora_merge.recognise.identity import half_by_name, identify, worth_hashing
from lcm_kit.lora_merge.recognise.transformers import BY_NAME as TRANSFORMERS
from lcm_kit.samplers.presets import PRESETS
from lcm_kit.tests.lora_merge import full_size
from lcm_kit.tests.lora_merge.make import factors, kohya

WAN = "Wan 2.1/2.2 14B"


def lora(base, metadata=None, **options):
    return Lora.from_state_dict(full_size.lora(base, **options), metadata=metadata, source=base)


def small(name="lora_unet_down_blocks_0_attentions_0_proj_in", seed=0):
    return kohya(name, *factors(320, 4, 320, (1, 1), seed=seed), alpha=2.0)


# ---- by structure


def test_the_smallest_and_the_largest_of_its_modules_are_told():
    other = "lora_unet_down_blocks_0_attentions_1_proj_in"
    tensors = small() | kohya(other, *factors(320, 8, 320, (1, 1), seed=1), alpha=16.0)
    structure = identify(Lora.from_state_dict(tensors, source="x")).structure
    assert (structure.ranks, structure.alphas, structure.scales) == ((4, 8), (2.0, 16.0), (0.5, 2.0))


@pytest.mark.parametrize("base", full_size.CONFIGS)
def test_the_official_loras_are_known_by_structure(base):
    found = identify(lora(base))
    assert (found.kind, found.bases, found.how, found.preset) == (f"LCM-LoRA {base}", (base,), "structure", "LCM")
    assert found.structure.parameters == full_size.PARAMETERS[base]
    assert found.structure.modules == full_size.MODULES[base]
    assert found.structure.ranks == (64, 64)
    assert found.structure.alphas == (8.0, 8.0)
    assert found.structure.scales == (0.125, 0.125)


@pytest.mark.parametrize("changed", [{"rank": 32}, {"alpha": 64.0}, {"only": lambda name: "mid_block" not in name}])
def test_another_rank_alpha_or_number_of_modules_is_not_that_file(changed):
    found = identify(lora("SD1.5", **changed))
    assert found.how == "unknown"
    assert found.bases == ("SD1.5",)
    assert found.preset is None
    assert found.structure.accelerates
    assert found.kind == "LoRA"


def test_a_style_lora_is_a_lora_for_its_base():
    found = identify(lora("SDXL", targets=full_size.ATTENTION, rank=8))
    assert (found.kind, found.bases, found.how, found.preset) == ("LoRA", ("SDXL",), "unknown", None)
    assert not found.structure.accelerates


# ---- by sha256


def row(path, **changes):
    fields = {
        "name": "Test 3 steps", "base": "SD1.5", "preset": "three", "repository": "somebody/test",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size,
    }  # fmt: skip
    return Published(**{**fields, **changes})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(small(), path)
    return path


def test_a_published_file_is_known_by_its_hash_whatever_it_is_called(file):
    found = identify(load(file), file, catalogue=[row(file)])
    assert (found.kind, found.bases, found.how, found.preset) == ("Test 3 steps", ("SD1.5",), "sha256", "three")
    assert found.published.link == "https://huggingface.co/somebody/test"
    assert found.how == "sha256"


def test_a_file_of_no_published_size_is_not_hashed(file):
    def never(path):
        raise AssertionError("hashed")

    found = identify(load(file), file, catalogue=[row(file, bytes=file.stat().st_size + 8)], digest=never)
    assert found.how == "unknown"
    assert not worth_hashing(file.stat().st_size + 1, [row(file)])
    assert worth_hashing(file.stat().st_size, [row(file)])


def test_a_file_of_a_published_size_and_another_hash_is_not_it(file):
    assert identify(load(file), file, catalogue=[row(file, sha256="0" * 64)]).how == "unknown"


def test_where_nobody_states_a_size_acceleration_loras_of_that_base_are_hashed(tmp_path):
    path = tmp_path / "a.safetensors"
    full_size.write(path, full_size.lora("SSD-1B", rank=1))
    hashed = []

    def digest(path):
        hashed.append(path)
        return "f" * 64

    unsized = [row(path, bytes=None, base="SSD-1B", sha256="f" * 64)]
    assert identify(load(path), path, catalogue=unsized, digest=digest).how == "sha256"
    assert len(hashed) == 1
    for other in (unsized[0].__class__(**{**vars(unsized[0]), "base": "SDXL"}),):
        assert identify(load(path), path, catalogue=[other], digest=digest).how == "unknown"
    assert len(hashed) == 1


def test_hash_beats_structure(tmp_path):
    path = tmp_path / "a.safetensors"
    full_size.write(path, full_size.lora("SD1.5"))
    assert identify(load(path), path, catalogue=[row(path), *PUBLISHED]).kind == "Test 3 steps"


# ---- by metadata


def test_a_lora_that_states_its_preset_is_believed_last():
    found = identify(Lora.from_state_dict(small(), metadata={identity.PRESET_KEY: "LCM"}, source="mine"))
    assert (found.how, found.preset, found.kind) == ("metadata", "LCM", "LCM LoRA")
    assert found.how == "metadata"
    official = identify(lora("SD1.5", metadata={identity.PRESET_KEY: "LCM"}))
    assert official.how == "structure"


def test_a_phased_lora_of_the_lcm_loras_structure_is_what_it_says():
    found = identify(lora("SD1.5", metadata={identity.PRESET_KEY: "Phased LCM 4 steps"}))
    assert (found.how, found.preset, found.bases) == ("metadata", "Phased LCM 4 steps", ("SD1.5",))


def test_a_merge_has_the_preset_of_the_one_that_states_one():
    """Its name would say another: an LCM-LoRA's, whose timesteps it does not know."""
    phased = Lora.from_state_dict(small(), metadata={identity.PRESET_KEY: "Phased LCM 4 steps"}, source="lcm_fast")
    style = Lora.from_state_dict(small(seed=1), source="ink")
    found = identify(merge([(style, 0.8), (phased, 1.0)]))
    assert (found.preset, found.kind) == ("Phased LCM 4 steps", "merge with Phased LCM 4 steps in it")
    assert identify(merge([(style, 0.8), (phased, 0.0)])).preset is None


def test_words_that_contradict_the_structure_win():
    """DMD2 and TCD LoRAs can have the modules, rank and alpha of the LCM-LoRA."""
    found = identify(lora("SDXL", metadata={"modelspec.title": "DMD2 sdxl 4 step"}))
    assert (found.how, found.preset, found.bases) == ("metadata", "DMD2", ("SDXL",))


@pytest.mark.parametrize(
    ("metadata", "preset"),
    [
        ({"modelspec.title": "tiny_emoji_lcm_lora"}, "LCM"),
        ({"ss_output_name": "TCD-thing"}, "TCD"),
        ({"modelspec.title": "tiny_emoji_ink_lora"}, None),
        ({"modelspec.title": "welcomely"}, None),
        ({"lcm_kit.merge": "not json"}, None),
        ({"lcm_kit.merge": "[1]"}, None),
    ],
)
def test_titles_say_what_a_lora_is(metadata, preset):
    assert identify(Lora.from_state_dict(small(), metadata=metadata)).preset == preset


def test_a_merge_with_an_lcm_lora_wants_its_settings(tmp_path):
    style = Lora.from_state_dict(small(seed=1), source="style.safetensors")
    lcm = Lora.from_state_dict(small(seed=2), source="lcm-lora.safetensors")
    save(merge([(style, 0.8), (lcm, 1.0)]), tmp_path / "both.safetensors")
    found = identify(load(tmp_path / "both.safetensors"), tmp_path / "both.safetensors")
    assert (found.kind, found.how, found.preset) == ("merge with LCM in it", "metadata", "LCM")
    without = merge([(style, 0.8), (lcm, 0.0)])
    assert identify(without).preset is None


def test_metadata_decides_between_the_bases_that_modules_leave():
    blocks = full_size.lora("SDXL", targets=full_size.ATTENTION, only=lambda n: "up_blocks.1.attentions.0.transformer_blocks.0" in n)  # fmt: skip
    assert len(identify(Lora.from_state_dict(blocks)).bases) > 1
    for key, text in (
        ("ss_base_model_version", "sdxl_base_v1-0"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
    ):
        assert identify(Lora.from_state_dict(blocks, metadata={key: text})).bases == ("SDXL",)
        assert identify(Lora.from_state_dict(kohya("lora_unet_x", *factors(6, 2, 5)), metadata={key: text})).bases == (
            "SDXL",
        )
    # and does not overrule them
    for contradiction in ("sdxl_base_v1-0", "sd_v2"):
        assert identify(lora("SD1.5", metadata={"ss_base_model_version": contradiction})).bases == ("SD1.5",)
    two = full_size.lora("SD1.5", targets=full_size.ATTENTION, only=lambda n: "attn1" in n)
    for said, bases in (("sd_v1", ("SD1.5",)), ("sd_v2_v", ("SD2",)), ("sdxl_base_v1-0", ("SD1.5", "SD2"))):
        assert identify(Lora.from_state_dict(two, metadata={"ss_base_model_version": said})).bases == bases


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", "high"),
        ("wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", "low"),
        ("Wan2_2-I2V-A14B-HIGH_bf16.safetensors", "high"),
        ("Wan2.2-Lightning_I2V-A14B-4steps-lora_LOW_fp16.safetensors", "low"),
        ("mystyle_low.safetensors", "low"),
        ("mystyle-high-v2.safetensors", "high"),
        ("BounceLow.safetensors", "low"),
        ("DancingHighNoise_e20.safetensors", "high"),
        ("wan22_t2v_low_q4_k_m.gguf", "low"),
        ("LowNoise Dancer", "low"),
        ("low_poly_style.safetensors", None),
        ("high_quality_wan_v2.safetensors", None),
        ("highlights.safetensors", None),
        ("slow.safetensors", None),
        ("yellow_v1.safetensors", None),
        ("high_noise_and_low_noise.safetensors", None),
        ("wan2.1_t2v_14b.safetensors", None),
        ("", None),
    ],
)
def test_halves_by_their_names(name, half):
    assert half_by_name(name) == half


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors", "lightx2v"),
        ("Qwen-Image-Lightning-4steps-V9.safetensors", "Lightning"),
        ("Hyper-FLUX.1-dev-8steps-lora.safetensors", "Hyper"),
        ("FLUX.1-Turbo-Alpha.safetensors", "Turbo"),
        ("my_lcm_thing.safetensors", "lcm"),
        ("style_4steps.safetensors", "4steps"),
        ("ink_style.safetensors", None),
        ("hyperrealism.safetensors", None),
        ("turbocharged_cars.safetensors", None),
        ("welcome.safetensors", None),
    ],
)
def test_a_name_that_sounds_like_an_acceleration_lora_gives_no_settings(name, word):
    found = identify(Lora.from_state_dict(small(), source=name))
    assert (found.looks_like, found.preset, found.how, found.kind) == (word, None, "unknown", "LoRA")


# As a person would write it down: the same text can be read in many ways, and Python's matcher tries them all.
_PLAINLY = re.compile(
    r"(?:[-_. ](?:v?\d[\d.]*|e\d+|q\d\w*|b?fp?\d+\w*|rank[-_]?\d+|r\d+|epoch\d*|steps?\d*|loras?|scaled|comfyui"
    r"|[a-z]\d_k(?:_[sml])?))+$",
    re.I,
)
_PARTS = """
1 2 22 v1 V2 1.5 v1.0 v2.1.3 e5 E10 e4m3fn q8 Q8_0 q4_K_M Q5_k_s q q4_K_XL bf16 fp8 FP8 fp8_e4m3fn fp8_e5m2_scaled f16 fp b8 rank rank32
rank_64 rank-8 r16 r epoch epoch12 step steps steps4 4steps lora loras Lora scaled comfyui i2v T2V 14B A14B p4_K a4_k_m k M s high low noise x
""".split()


@pytest.mark.parametrize("seed", range(20))
def test_what_may_follow_the_word_is_read_as_it_is_written(seed):
    draw = random.Random(seed)
    for _ in range(200):
        parts = [draw.choice(_PARTS) for _ in range(draw.randint(1, 7))]
        name = "wan_high" + "".join(draw.choice("-_. ") + part for part in parts)
        assert identity._BEHIND.sub("", name) == _PLAINLY.sub("", name)


@pytest.mark.parametrize(
    "unit", [".1", "_q1", ".1_q1", "-q1_k_q1_k", "_bf1", "1", ".v1", " e1", "_rank_1", "_e1_k_s", "..1", "_fp8_q8"]
)
@pytest.mark.parametrize("end", ["", "!"])
def test_no_name_and_no_title_takes_long_to_read(unit, end):
    for times in (30, 100, 1_000_000):
        name = f"high-1{unit * times}{end}"
        started = time.process_time()
        half_by_name(name)
        identify(Lora.from_state_dict(small(), source=name[:200], metadata={"modelspec.title": name}))
        assert time.process_time() - started < 1.0  # 0.01 s


def test_a_published_half_is_known_by_its_hash_and_a_style_by_what_it_is_called(tmp_path):
    path = tmp_path / "renamed_low_noise.safetensors"
    shapes = {name: shape for name, shape in TRANSFORMERS[WAN].modules.items() if "_self_attn_" in name}
    tensors = {}
    for name, (out, into) in shapes.items():
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.zeros(()).expand(out, 1)
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.zeros(()).expand(1, into)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    entry = row(path, base=WAN, expert="high", preset="Wan 2.2 lightx2v", bytes=None, about=path.stat().st_size + 100)
    found = identify(load(path), path, catalogue=[entry])
    assert (found.how, found.expert.expert, found.expert.source) == ("sha256", "high", "sha256")
    assert (found.bases, found.preset) == ((WAN,), "Wan 2.2 lightx2v")
    styled = identify(load(path), path, catalogue=[])
    assert (styled.expert.expert, styled.expert.source, styled.bases) == ("low", "file name", (WAN,))
    titled = Lora.from_state_dict(tensors, source="a.safetensors", metadata={"ss_output_name": "dance_high"})
    assert (identify(titled).expert.expert, identify(titled).expert.source) == ("high", "ss_output_name")
    assert identify(Lora.from_state_dict(small(), source="style_low.safetensors")).expert is None


def test_a_rounded_size_is_that_of_files_within_a_hundredth():
    entry = Published("a", WAN, "b", "0" * 64, "c/d", about=614_000_000)
    assert entry.may_have(614_453_000)
    assert not entry.may_have(634_645_944)
    assert worth_hashing(614_453_000, [entry])
    assert Published("a", WAN, "b", "0" * 64, "c/d").may_have(7) is None


# ---- the catalogue


def test_every_row_is_a_hash_of_its_own_for_a_known_base():
    hashes = [entry.sha256 for entry in PUBLISHED]
    assert len(set(hashes)) == len(hashes)
    for entry in PUBLISHED:
        assert len(entry.sha256) == 64
        assert int(entry.sha256, 16) > 0
        assert entry.sha256 == entry.sha256.lower()
        assert entry.base in BY_NAME or entry.base in TRANSFORMERS
        assert entry.preset in PRESETS
        assert entry.steps is None or entry.steps == PRESETS[entry.preset].steps


def test_a_file_of_qwen_image_lightning_lies_in_the_folder_of_its_model():
    """lightx2v's repository has the files for Qwen-Image-Edit-2509 in a folder; those for 2511 have a repository."""
    rows = [entry for entry in PUBLISHED if entry.preset.startswith("Qwen-Image-Lightning")]
    assert {entry.name.partition("-Lightning-")[0] for entry in rows} == {
        "Qwen-Image", "Qwen-Image-Edit", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511"
    }  # fmt: skip
    for entry in rows:
        kind = entry.name.partition("-Lightning-")[0]
        folder = "Qwen-Image-Edit-2509/" if kind.endswith("2509") else ""
        assert entry.file == f"{folder}{entry.name}.safetensors"
        assert entry.repository == (
            "lightx2v/Qwen-Image-Edit-2511-Lightning" if kind.endswith("2511") else "lightx2v/Qwen-Image-Lightning"
        )


def test_halves_of_a_pair_are_different_files_that_say_so():
    halves = [entry for entry in PUBLISHED if entry.expert]
    assert {entry.base for entry in halves} == {WAN}
    for entry in halves:
        assert half_by_name(entry.file.rsplit("/", 1)[-1]) == entry.expert
    for entry in PUBLISHED:
        if entry.base == WAN and entry.expert is None:
            assert half_by_name(entry.file) is None


def test_the_official_rows_count_what_the_unets_have():
    for base, parameters in full_size.PARAMETERS.items():
        (entry,) = (e for e in PUBLISHED if e.name == f"LCM-LoRA {base}")
        assert (entry.modules, entry.parameters) == (full_size.MODULES[base], parameters)
        if entry.bytes:
            # two bytes a value; the rest is the header and an alpha for each module
            assert 0 < entry.bytes - 2 * parameters < 1000 * entry.modules


def test_the_file_to_use_instead_is_of_the_same_kind_where_there_is_one():
    assert instead("SDXL", "TCD").name == "TCD-LoRA SDXL"
    assert instead("SSD-1B", "TCD").name == "LCM-LoRA SSD-1B"
    assert instead("SD1.5", None).name == "LCM-LoRA SD1.5"
    assert instead("KOALA-1B", "LCM") is None


def test_identification_looks_at_no_values():
    """On the meta device there are none."""
    tensors = full_size.lora("SD1.5", make=lambda *shape: torch.empty(shape, dtype=torch.float16, device="meta"))
    from lcm_kit.lora_merge.updates.layer import LoraLayer

    modules = {}
    for key in tensors:
        if key.endswith(".alpha"):
            name = key.removesuffix(".alpha")
            modules[name] = LoraLayer(tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"], 8.0)
    assert identify(Lora(modules)).kind == "LCM-LoRA SD1.5"


def test_what_accelerates_is_told_by_three_kinds_of_modules():
    """Those of timesteps, of convolutions and of the text: fewer are a style's."""
    places = ["resnets_0_time_emb_proj", "resnets_0_conv1", "attentions_0_transformer_blocks_0_attn2_to_k"]
    shapes = [((320, 1280), ()), ((320, 320), (3, 3)), ((320, 768), ())]
    states = [
        kohya(f"lora_unet_down_blocks_0_{place}", *factors(out, 2, inputs, kernel), 2.0)
        for place, ((out, inputs), kernel) in zip(places, shapes, strict=True)
    ]
    for left_out in (None, 0, 1, 2):
        state = {key: value for n, one in enumerate(states) if n != left_out for key, value in one.items()}
        assert identify(Lora.from_state_dict(state)).structure.accelerates is (left_out is None)


def test_one_published_file_of_a_size_is_enough_to_be_hashed(file):
    size = file.stat().st_size
    assert worth_hashing(size, [row(file, bytes=size + 1), row(file), row(file, bytes=size - 1)])
