"""LCM Guidance Embedding on ComfyUI's own UNet, against diffusers' UNet with the same weights."""

import copy
import os
import warnings

import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from safetensors.torch import save_file

from lcm_kit.host.sampling import embedding
from lcm_kit.nodes.guidance import LCMGuidanceEmbedding
from lcm_kit.nodes.loading import ApplyLoRA
from lcm_kit.nodes.sampling import LCMKSampler
from lcm_kit.samplers.guidance import guidance_embedding
from lcm_kit.samplers.noise import StepNoise, level_numbers
from lcm_kit.tests.helpers import relative
from lcm_kit.tests.samplers import toy
from lcm_kit.tests.with_comfyui import tiny

SEED = 3
NAME = "tiny_full_lcm.safetensors"
WEIGHT, BIAS = "diffusion_model.time_embed.0.weight", "diffusion_model.time_embed.0.bias"
# Convolutions around attention and a fixed number of heads, as in SD1.5.
SD15 = {"use_linear_in_transformer": False, "num_heads": 2, "num_head_channels": -1}


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def unet():
    """diffusers' SD1.5-type UNet with a guidance input and random weights."""
    toy.diffusers()  # its own import warns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    net = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=tiny.CONTEXT,
        attention_head_dim=2,  # the number of heads, by a mistake that diffusers keeps
        time_cond_proj_dim=256,
    )
    tiny.fill(net, seed=1)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def file(unet, comfy_home):
    """The UNet's file in ComfyUI's folder, as diffusers saves it."""
    path = comfy_home / "models" / "diffusion_models" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in unet.state_dict().items()}, path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def shared(unet, file):
    """A MODEL with the UNet's weights, as ComfyUI's loader makes it: the guidance projection is dropped."""
    model = tiny.tiny_model(**SD15)
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    weights = {names[key]: tensor for key, tensor in unet.state_dict().items() if key in names}
    assert unet.state_dict().keys() - names.keys() == {"time_embedding.cond_proj.weight"}
    model.model.diffusion_model.load_state_dict(weights)
    return model


@pytest.fixture
def model(shared):
    """The same for all tests: neither the node nor sampling may leave anything in it."""
    before = {key: tensor.clone() for key, tensor in shared.model.state_dict().items() if "time_embed" in key}
    yield shared
    shared.detach()
    after = shared.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert (shared.patches, shared.attachments, shared.callbacks) == ({}, {}, {})


@pytest.fixture
def own_model(shared, monkeypatch):
    """change(layer): the model with another first layer of its time embedding, until the test ends."""

    def change(layer):
        monkeypatch.setitem(shared.model.diffusion_model.time_embed._modules, "0", layer)
        return shared

    return change


def applied(model, guidance=8.0, unet_name=NAME):
    return LCMGuidanceEmbedding.execute(model=model, unet_name=unet_name, guidance=guidance).result[0]


def output_of(model, x, times, context):
    """The UNet's output with the MODEL's patches in its weights, which are taken out again."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    try:
        return model.model.diffusion_model(x, times, context=context)
    finally:
        model.detach()


def diffusers_lcm(model, unet, steps, guidance, noise):
    """The latent that diffusers makes with its own UNet, its own timestep_cond and the noise of our sampler."""
    from diffusers.schedulers import scheduling_lcm

    scheduler = scheduling_lcm.LCMScheduler()
    scheduler.set_timesteps(steps)
    context = tiny.cond(1)[0][0].expand(noise.shape[0], -1, -1)
    cond = guidance_embedding(torch.full((noise.shape[0],), guidance - 1.0))
    step_noise, x = StepNoise(SEED), noise
    table = model.get_model_object("model_sampling").sigmas
    levels = [*level_numbers(table[scheduler.timesteps[1:]], table), 0]
    with pytest.MonkeyPatch.context() as patch:
        for step, t in enumerate(scheduler.timesteps):
            drawn = step_noise(levels[step], noise)
            patch.setattr(scheduling_lcm, "randn_tensor", lambda *args, drawn=drawn, **kwargs: drawn)
            eps = unet(x, t, encoder_hidden_states=context, timestep_cond=cond).sample
            x, denoised = scheduler.step(eps, t, x, return_dict=False)
    return model.model.process_latent_out(denoised)


def lcm(model, latent, steps=4):
    return LCMKSampler.execute(
        model=model, positive=tiny.cond(1), latent_image=latent, seed=SEED, steps=steps, cfg=1.0, denoise=1.0, gamma=1.0,
        cfg_steps=-1, original_steps=50,
    ).result[0]["samples"]  # fmt: skip


# ---- the same numbers as diffusers


@pytest.mark.parametrize("guidance", [1.0, 4.0, 8.0, 13.0])
def test_unet_gives_the_output_of_diffusers(unet, model, guidance):
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), tiny.cond(1)[0][0].expand(2, -1, -1)
    times = torch.tensor([999.0, 259.0])
    cond = guidance_embedding(torch.full((2,), guidance - 1.0))
    expected = unet(x, times, encoder_hidden_states=context, timestep_cond=cond).sample
    assert relative(output_of(applied(model, guidance), x, times, context), expected) < 1e-5
    # ... which is another one than without guidance, by far more than that
    assert relative(output_of(model, x, times, context), expected) > 1e-2


@pytest.mark.parametrize(("guidance", "steps"), [(3.0, 1), (8.0, 4), (12.5, 8)])
def test_sampling_gives_the_latent_of_diffusers(unet, model, guidance, steps):
    latent = tiny.latent(2)
    noise = comfy.sample.prepare_noise(latent["samples"], SEED)
    made = lcm(applied(model, guidance), latent, steps)
    assert relative(made, diffusers_lcm(model, unet, steps, guidance, noise)) < 1e-5
    assert relative(lcm(model, latent, steps), made) > 1e-2


def test_guidance_works_in_cores_own_sampler(unet, model):
    """The patch lies in the weights, so nothing of ours is needed to sample: Euler here, one step, from 999 to 0."""
    latent, guidance = tiny.latent(), 7.5
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.cat([sampling.sigmas[-1:], torch.zeros(1)])
    euler = custom.KSamplerSelect.execute("euler").result[0]
    made = custom.SamplerCustom.execute(
        applied(model, guidance), True, SEED, 1.0, tiny.cond(1), tiny.cond(2), euler, sigmas, latent
    ).result[0]["samples"]
    noise = comfy.sample.prepare_noise(latent["samples"], SEED)
    assert relative(made, diffusers_lcm(model, unet, 1, guidance, noise)) < 1e-5


# ---- an ordinary patch


def test_patch_is_the_constant_on_the_bias_alone(unet, model):
    patched = applied(model, 4.0)
    assert patched.patches.keys() == {BIAS}
    state = unet.state_dict()
    expected = state["time_embedding.linear_1.weight"] @ (
        state["time_embedding.cond_proj.weight"] @ guidance_embedding(3.0)
    )
    ((strength, (kind, (constant,)), *_),) = patched.patches[BIAS]
    assert (strength, kind) == (1.0, "diff")
    torch.testing.assert_close(constant, expected, rtol=1e-5, atol=1e-6)


def test_model_given_is_left_as_it_was_and_unpatching_restores_every_bit(model):
    before = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}
    patched = applied(model, 4.0)
    assert model.patches == {}
    assert model.get_attachment(embedding.ATTACHMENT) is None
    lcm(patched, tiny.latent())
    assert not torch.equal(model.model.state_dict()[BIAS], before[BIAS])  # it was loaded with the patch
    patched.detach()
    after = model.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_node_reads_the_unpatched_weights_of_a_model_that_is_loaded_with_patches(model):
    lora = time_lora(model)
    loaded = ApplyLoRA.execute(model=model, lora=lora, strength_model=1.0, strength_clip=1.0).result[0]
    lcm(loaded, tiny.latent())  # leaves its patches in the weights
    assert not torch.equal(constant_of(applied(loaded)), constant_of(applied(model)))
    again = constant_of(applied(model))
    loaded.detach()
    assert torch.equal(again, constant_of(applied(model)))


def constant_of(model):
    return model.patches[BIAS][0][1][1][0]


def time_lora(model):
    return tiny.lora(model, endings=("time_embedding.linear_1",))


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_guidance_after_a_lora_on_the_time_embedding_is_exact(unet, model, strength):
    """As diffusers has it: the LoRA's layer sees the timestep embedding and the guidance together."""
    lora = time_lora(model)
    adapted = ApplyLoRA.execute(model=model, lora=lora, strength_model=strength, strength_clip=1.0).result[0]
    up, down, alpha = (
        next(tensor for key, tensor in lora.items() if key.endswith(ending))
        for ending in (".lora_up.weight", ".lora_down.weight", ".alpha")
    )
    delta = strength * alpha / down.shape[0] * (up @ down)
    state = unet.state_dict()
    expected = (state["time_embedding.linear_1.weight"] + delta) @ (
        state["time_embedding.cond_proj.weight"] @ guidance_embedding(7.0)
    )
    torch.testing.assert_close(constant_of(applied(adapted)), expected, rtol=1e-4, atol=1e-5)


def test_a_lora_on_the_time_embedding_after_the_node_is_reported(model, caplog):
    patched = applied(model)
    late = ApplyLoRA.execute(model=patched, lora=time_lora(model), strength_model=1.0, strength_clip=1.0).result[0]
    lcm(late, tiny.latent())
    assert "Put LCM Guidance Embedding behind it" in caplog.text
    caplog.clear()
    before = ApplyLoRA.execute(model=model, lora=time_lora(model), strength_model=1.0, strength_clip=1.0).result[0]
    lcm(applied(before), tiny.latent())
    other = ApplyLoRA.execute(model=patched, lora=tiny.lora(model), strength_model=1.0, strength_clip=1.0).result[0]
    lcm(other, tiny.latent())
    assert "LCM Guidance Embedding" not in caplog.text


def test_a_second_node_is_refused(model):
    with pytest.raises(ValueError, match=r"already has guidance 8 .*Bypass one"):
        applied(applied(model, 8.0), 4.0)


def layer_like(layer, weight):
    """A layer with another weight and the same bias."""
    made = copy.copy(layer)
    made._parameters = {"weight": torch.nn.Parameter(weight, requires_grad=False), "bias": layer.bias}
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_model_in_fewer_bits_gives_the_constant_of_its_own_weights(unet, model, own_model, dtype):
    weight = unet.state_dict()["time_embedding.linear_1.weight"].to(dtype)
    fewer = own_model(layer_like(model.model.diffusion_model.time_embed[0], weight))
    expected = weight.float() @ (unet.state_dict()["time_embedding.cond_proj.weight"] @ guidance_embedding(7.0))
    torch.testing.assert_close(constant_of(applied(fewer)), expected, rtol=1e-4, atol=1e-5)
    assert fewer.model.state_dict()[WEIGHT].dtype == dtype


@pytest.mark.parametrize("name", tiny.quantised_formats())
def test_scale_of_a_quantised_layer_counts(unet, model, own_model, name):
    """ComfyUI's own quantised layer keeps its scale beside the weight."""
    weight = unet.state_dict()["time_embedding.linear_1.weight"]
    layer = comfy.ops.mixed_precision_ops({}, compute_dtype=torch.float32).Linear(32, 128, device="cpu")
    bias = model.model.diffusion_model.time_embed[0].bias
    layer.load_state_dict(tiny.quantised_state({"weight": weight, "bias": bias.clone()}, name))
    projected = unet.state_dict()["time_embedding.cond_proj.weight"] @ guidance_embedding(7.0)
    expected = layer.weight.dequantize() @ projected
    assert not torch.equal(layer.weight.dequantize(), weight)
    torch.testing.assert_close(constant_of(applied(own_model(layer))), expected, rtol=1e-4, atol=1e-5)


def test_a_quantisation_that_cannot_be_read_is_refused(model, own_model):
    packed = layer_like(model.model.diffusion_model.time_embed[0], torch.zeros(128, 18, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"stored as torch\.uint8 of shape \(128, 18\).*Load the model unquantised"):
        applied(own_model(packed))


def test_a_model_of_another_kind_is_refused(model, own_model):
    with pytest.raises(ValueError, match=r"has no diffusion_model\.time_embed\.0.*SD1\.5, SSD-1B and SDXL"):
        applied(own_model(torch.nn.Identity()))


# ---- files


@pytest.fixture
def written(comfy_home):
    """write(name, content): a file in the diffusion_models folder; content: tensors, or bytes."""
    made = []

    def write(name, content, folder="diffusion_models"):
        path = comfy_home / "models" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file({key: tensor.clone().contiguous() for key, tensor in content.items()}, path)
        return path

    yield write
    for path in made:
        path.unlink(missing_ok=True)


PROJECTION, LINEAR = "time_embedding.cond_proj.weight", "time_embedding.linear_1.weight"


@pytest.mark.parametrize(
    ("projection", "linear"),
    [
        (PROJECTION, LINEAR),
        (f"unet.{PROJECTION}", f"unet.{LINEAR}"),
        (f"model.diffusion_model.{PROJECTION}", f"model.diffusion_model.{LINEAR}"),
        ("model.diffusion_model.time_embed.cond_proj.weight", "model.diffusion_model.time_embed.0.weight"),
    ],
)
def test_names_that_files_use_are_all_found(unet, model, written, projection, linear):
    state = unet.state_dict()
    written("named.safetensors", {projection: state[PROJECTION], linear: state[LINEAR], "other": torch.zeros(1)})
    assert torch.equal(constant_of(applied(model, unet_name="named.safetensors")), constant_of(applied(model)))


def test_a_file_in_half_precision_and_a_checkpoint_are_read(unet, model, written):
    tensor = unet.state_dict()[PROJECTION].half()
    written("lcm_checkpoint.safetensors", {f"model.diffusion_model.{PROJECTION}": tensor}, "checkpoints")
    made = constant_of(applied(model, unet_name="lcm_checkpoint.safetensors"))
    # fp16 has 11 bits
    torch.testing.assert_close(made, constant_of(applied(model)), rtol=0, atol=2e-3 * float(made.abs().max()))


def test_a_file_with_a_tensor_without_values_is_read(unet, model, written):
    """As scaled fp8 models have it, to say so."""
    written("marked.safetensors", {PROJECTION: unet.state_dict()[PROJECTION], "scaled_fp8": torch.zeros(0)})
    assert torch.equal(constant_of(applied(model, unet_name="marked.safetensors")), constant_of(applied(model)))


def test_file_list_names_both_folders_and_no_pickles(file, written):
    written("some.safetensors", b"", "checkpoints")
    written("some.ckpt", b"")
    folder_paths.filename_list_cache.clear()
    names = embedding.unet_names()
    assert {NAME, "some.safetensors"} <= set(names)
    assert "some.ckpt" not in names


def test_an_overwritten_file_is_noticed_and_a_changed_guidance_reads_nothing(unet, model, written, monkeypatch):
    state = {PROJECTION: unet.state_dict()[PROJECTION]}
    path = written("changing.safetensors", state)
    fingerprint = LCMGuidanceEmbedding.fingerprint_inputs(model=None, unet_name="changing.safetensors", guidance=8.0)
    first = constant_of(applied(model, 8.0, "changing.safetensors"))

    opened = []
    read = embedding.safe_open
    monkeypatch.setattr(embedding, "safe_open", lambda path, **options: opened.append(path) or read(path, **options))
    applied(model, 5.0, "changing.safetensors")
    assert opened == []

    written("changing.safetensors", {PROJECTION: 2 * state[PROJECTION]})
    os.utime(path, ns=(1, 1))  # a file system's clock may be coarse
    assert LCMGuidanceEmbedding.fingerprint_inputs(unet_name="changing.safetensors") != fingerprint
    torch.testing.assert_close(constant_of(applied(model, 8.0, "changing.safetensors")), 2 * first)
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"time_embedding.linear_1.weight": torch.zeros(128, 32)}, r"no full LCM.*LCM-LoRA.*bypass it"),
        ({PROJECTION: torch.zeros(320, 256)}, r"width 320, but that of this model is 32 wide\. Choose the file"),
        ({PROJECTION: torch.ones(32, 256), LINEAR: torch.ones(128, 32)}, r"belongs to another kind of model"),
        ({PROJECTION: torch.zeros(32, 256, 1)}, r"of shape \(32, 256, 1\).*has to be a matrix"),
        ({PROJECTION: torch.zeros(32, 256).to(torch.float8_e4m3fn)}, r"float8_e4m3fn; .*the original file here"),
        ({PROJECTION: torch.full((32, 256), torch.nan)}, r"finite"),
        ({PROJECTION: torch.zeros(32, 3)}, r"dim is 3; "),
        ({PROJECTION: torch.zeros(32, 256), f"unet.{PROJECTION}": torch.zeros(32, 256)}, r"has 2 such tensors"),
        (b"", r"is empty; download it again"),
        (b"PK\x03\x04" + bytes(100), r"is a pickle .*not opened"),
        (b"\x80\x02}q\x00.", r"is a pickle .*not opened"),
        (b"<!DOCTYPE html><html>", r"is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer"),
        (b"\xff" * 4096, r"is not a safetensors file"),
    ],
)
def test_a_file_of_no_use_is_refused_with_the_reason(model, written, content, message):
    path = written("hostile.safetensors", content)
    with pytest.raises(ValueError, match=message):
        applied(model, unet_name=path.name)
    assert model.patches == {}


def test_a_truncated_file_is_refused(model, file, written):
    written("cut.safetensors", file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"is cut off: \d+ of \d+ bytes are there; download it again"):
        applied(model, unet_name="cut.safetensors")


def test_a_file_that_is_not_there_is_named(model):
    with pytest.raises(ValueError, match=r"'gone\.safetensors' is in none of the folders .*diffusion_models"):
        applied(model, unet_name="gone.safetensors")
    assert LCMGuidanceEmbedding.fingerprint_inputs(unet_name="gone.safetensors") == ("gone.safetensors",)
