"""Loss and gradient against diffusers' UNet and DDIM and PEFT's LoRA, on the same weights and draws."""

import warnings

import pytest
import torch

from lcm_kit.distillation.adapter import LoraAdapters
from lcm_kit.distillation.objective import Batch, Draws, distillation_loss
from lcm_kit.distillation.recompute import blocks, recomputing
from lcm_kit.distillation.targets import DIFFUSERS_TYPES, targets
from lcm_kit.tests.distillation.live_memory import LiveMemory

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # both warn about each other's versions while they are imported
    diffusers = pytest.importorskip("diffusers", reason="the reference: pip install -r tools/requirements.txt")
    peft = pytest.importorskip("peft", reason="the reference: pip install -r tools/requirements.txt")

RANK, ALPHA, STRIDE, HUBER = 3, 6.0, 20, 0.001
TIMESTEPS = torch.tensor([19, 39, 499, 999])


def unet():
    torch.manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=6,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=True,
        )  # fmt: skip
    # float64: at sigma 14.6 float32 leaves five digits of x - sigma * eps in either formula
    return network.double().eval()


def scheduler():
    """As Stable Diffusion configures it; set_alpha_to_one=False ends at the first training timestep, as the scripts do."""
    made = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    made.set_timesteps(1000 // STRIDE)
    made.alphas_cumprod = made.alphas_cumprod.double()
    made.final_alpha_cumprod = made.final_alpha_cumprod.double()
    return made


ALPHAS = scheduler().alphas_cumprod
TABLE = ((1 - ALPHAS) / ALPHAS).sqrt()


def epsilon_denoiser(network, prediction="epsilon"):
    """The UNet in sigma space: what ComfyUI makes of an epsilon or v-prediction model."""

    def denoise(x, sigma, cond):
        wide = sigma.view(-1, 1, 1, 1)
        timestep = (TABLE[None] - sigma[:, None]).abs().argmin(1)
        scale = (1 + wide * wide).sqrt()
        output = network(x / scale, timestep, cond).sample
        if prediction == "epsilon":
            return x - wide * output
        return x / scale**2 - output * wide / scale

    return denoise


def draws():
    generator = torch.Generator().manual_seed(1)
    z0, noise = torch.randn(2, 4, 4, 8, 8, generator=generator, dtype=torch.float64)
    cond, uncond = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    return z0, noise, cond, uncond, torch.tensor([1.5, 4.0, 8.5, 15.0], dtype=torch.float64)


def reference(network, prediction="epsilon"):
    """(loss, {layer: (gradient of A, of B)}): the authors' steps, in VP scale, image by image where diffusers wants."""
    ddim = scheduler()
    ddim.register_to_config(prediction_type="v_prediction" if prediction == "v" else "epsilon")
    z0, noise, cond, uncond, cfg = draws()
    omega = (cfg - 1).view(-1, 1, 1, 1)
    z = ddim.add_noise(z0, noise, TIMESTEPS)

    def x0_and_output(z, timesteps, prompt):
        output = network(z, timesteps, prompt).sample
        a = ALPHAS[timesteps].view(-1, 1, 1, 1)
        if prediction == "v":
            return a.sqrt() * z - (1 - a).sqrt() * output, output
        return (z - (1 - a).sqrt() * output) / a.sqrt(), output

    def f(z, timesteps, prompt):
        t = timesteps.view(-1, 1, 1, 1).double()
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25).sqrt()
        return c_skip * z + c_out * x0_and_output(z, timesteps, prompt)[0]

    with torch.no_grad():
        network.disable_adapters()
        output_cond, output_uncond = x0_and_output(z, TIMESTEPS, cond)[1], x0_and_output(z, TIMESTEPS, uncond)[1]
        network.enable_adapters()
        output = output_cond + omega * (output_cond - output_uncond)
        z_hat = torch.cat([
            ddim.step(output[i : i + 1], int(t), z[i : i + 1], eta=0.0).prev_sample for i, t in enumerate(TIMESTEPS)
        ])  # fmt: skip
        wanted = f(z_hat, (TIMESTEPS - STRIDE).clamp(min=0), cond)
    loss = ((f(z, TIMESTEPS, cond) - wanted).square() + HUBER**2).sqrt().sub(HUBER).mean()
    loss.backward()
    layers = {n: m for n, m in network.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    return loss.detach(), {n: (m.lora_A["lcm"].weight.grad, m.lora_B["lcm"].weight.grad) for n, m in layers.items()}


def pair():
    """Our adapters on one UNet and PEFT's on an equal one, with the same factors. The second is ready to run."""
    ours, theirs = unet(), unet()
    adapters = LoraAdapters(ours, RANK, ALPHA, generator=torch.Generator().manual_seed(2)).double()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(DIFFUSERS_TYPES))
    theirs.add_adapter(config, "lcm")
    theirs.double()
    with torch.no_grad():
        for name, branch in zip(adapters.names, adapters.branches, strict=True):
            branch.up.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(0.2)
            layer = theirs.get_submodule(name)
            layer.lora_A["lcm"].weight.copy_(branch.down)
            layer.lora_B["lcm"].weight.copy_(branch.up)
    return ours, adapters, theirs


def ours_loss(network, adapters, prediction="epsilon"):
    z0, noise, cond, uncond, cfg = draws()
    batch = Batch(z0, cond, uncond, torch.cat([cond, uncond]))
    return distillation_loss(
        epsilon_denoiser(network, prediction), adapters, batch, Draws(TIMESTEPS, cfg, noise),
        stride=STRIDE, table=TABLE, huber_c=HUBER,
    )  # fmt: skip


def test_the_layers_are_those_that_peft_adapts_by_the_scripts_names():
    ours, adapters, theirs = pair()
    assert sorted(adapters.names) == sorted(n for n, m in theirs.named_modules() if hasattr(m, "lora_A"))
    assert len({name.split(".")[-1] for name in targets(ours)} - {"0", "2", "proj", "conv"}) >= 9


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_loss_and_gradient_are_those_of_diffusers_and_peft(prediction):
    ours, adapters, theirs = pair()
    loss = ours_loss(ours, adapters, prediction)
    loss.backward()
    expected_loss, expected = reference(theirs, prediction)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert len(expected) == len(adapters.names) > 30
    for name, branch in zip(adapters.names, adapters.branches, strict=True):
        for actual, wanted in zip((branch.down.grad, branch.up.grad), expected[name], strict=True):
            assert (actual - wanted).norm() <= 1e-5 * wanted.norm(), name
            assert wanted.norm() > 0


def test_checkpointing_keeps_less_and_gives_the_same_gradient():
    ours, adapters, _ = pair()

    def run(active):
        adapters.zero_grad(set_to_none=True)
        with recomputing(ours, active):
            with LiveMemory() as memory:
                loss = ours_loss(ours, adapters)
                kept = memory.now
            loss.backward()
        return loss.item(), kept, [p.grad.clone() for p in adapters.parameters()]

    plain, checkpointed = run(False), run(True)
    assert checkpointed[0] == plain[0]
    assert checkpointed[1] < 0.5 * plain[1]
    for actual, wanted in zip(checkpointed[2], plain[2], strict=True):
        torch.testing.assert_close(actual, wanted)
    kinds = [type(block).__name__ for block in blocks(ours)]
    assert kinds == ["TimestepEmbedding", "CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D",
                     "UNetMidBlock2DCrossAttn"]  # fmt: skip
    assert not any("forward" in vars(module) for module in ours.modules())
