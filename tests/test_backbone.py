"""The backbone against plain diffusers: network, guidance, decoding, sampling, weights on disk."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from agents import make_policy
from diffusion_env import DenoisingEnv, LoRA, StableDiffusionBackbone
from tests.tiny import tiny_pipeline

PROMPTS = ["a cat", "a dog"]
LORA = LoRA(rank=2, alpha=2.0)


def inputs(backbone, batch: int = 3):
    """Latents, timesteps that differ, encoded prompts, reproducibly."""
    x = torch.randn((batch, *backbone.latent_shape), generator=torch.Generator().manual_seed(5))
    cache = backbone.conditioning(PROMPTS)
    return x, torch.tensor([900, 500, 1])[:batch], cache(torch.tensor([0, 1, 1])[:batch])


def embed(pipeline, prompts):
    return pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]


def plain(tiny_folder) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gradients(backbone):
    """Gradients of what trains, by name, and clear them."""
    found = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    return found


@torch.no_grad()
def train_a_little(backbone):
    """Stands for training: random changes of what trains."""
    generator = torch.Generator().manual_seed(2)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_guidance_combines_two_calls_of_the_network(trained_backbone):
    x, t, conditioning = inputs(trained_backbone)
    out = trained_backbone(x, t, conditioning)
    out.square().sum().backward()
    ours = gradients(trained_backbone)
    cond = trained_backbone.unet(x, t, embed(trained_backbone.pipeline, ["a cat", "a dog", "a dog"])).sample
    uncond = trained_backbone.unet(x, t, embed(trained_backbone.pipeline, [""] * 3)).sample
    assert (cond - uncond).abs().max() > 1e-3  # guidance matters at all
    expected = uncond + 2.0 * (cond - uncond)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    for name, gradient in gradients(trained_backbone).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_guidance_1_is_one_call_of_the_network():
    backbone = StableDiffusionBackbone(tiny_pipeline(), lora=LORA, guidance_scale=1.0)
    rows = []
    backbone.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    x, t, conditioning = inputs(backbone)
    out = backbone(x, t, conditioning)
    assert rows == [3]
    expected = backbone.unet(x, t, embed(backbone.pipeline, ["a cat", "a dog", "a dog"])).sample
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [LORA, None])
def test_the_reference_is_the_pretrained_network(lora, tiny_folder):
    pretrained = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()
    backbone = StableDiffusionBackbone.from_pretrained(tiny_folder, lora=lora, guidance_scale=1.0, channels_last=False)
    x, t, conditioning = inputs(backbone)
    with torch.no_grad():
        expected = pretrained(x, t, conditioning["encoder_hidden_states"]).sample
        torch.testing.assert_close(backbone(x, t, conditioning), expected, rtol=0, atol=0)  # nothing is trained yet
    train_a_little(backbone)
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    before = backbone(x, t, conditioning)
    assert (before - expected).abs().max() > 1e-3
    with backbone.reference():
        out = backbone(x, t, conditioning)
        assert torch.equal(out, expected)
    assert torch.equal(backbone(x, t, conditioning), before)
    # A gradient of the policy's output from before the reference was asked for is not lost either.
    before.sum().backward()
    late = gradients(backbone)
    backbone(x, t, conditioning).sum().backward()
    after = gradients(backbone)
    assert late.keys() == after.keys() == trainable == {n for n, p in backbone.named_parameters() if p.requires_grad}
    for name in after:
        torch.testing.assert_close(late[name], after[name])
    assert any(gradient.abs().max() > 0 for gradient in after.values())


@pytest.mark.parametrize("lora", [LORA, None])
def test_the_policy_returns_when_the_reference_fails_or_is_nested(lora):
    backbone = StableDiffusionBackbone(tiny_pipeline(), lora=lora, guidance_scale=1.0)
    x, t, conditioning = inputs(backbone)
    with torch.no_grad():
        pretrained = backbone(x, t, conditioning)
        train_a_little(backbone)
        trained = backbone(x, t, conditioning)
        with pytest.raises(KeyError), backbone.reference():
            raise KeyError
        assert torch.equal(backbone(x, t, conditioning), trained)
        with backbone.reference():
            with backbone.reference():
                assert torch.equal(backbone(x, t, conditioning), pretrained)
            assert torch.equal(backbone(x, t, conditioning), pretrained)
        assert torch.equal(backbone(x, t, conditioning), trained)


def test_decode_is_the_vaes_and_has_gradients(backbone):
    vae = backbone.pipeline.vae
    x = torch.randn(5, *backbone.latent_shape).requires_grad_()
    images = backbone.decode(x)
    expected = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert images.shape == (5, 3, 16, 16)
    torch.testing.assert_close(images, expected)
    # What a user sees: diffusers' own post-processing.
    seen = backbone.pipeline.image_processor.postprocess(
        vae.decode(x.detach() / vae.config.scaling_factor).sample, output_type="pt"
    )
    torch.testing.assert_close(images.detach(), seen)
    (given,) = torch.autograd.grad(images.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(given, wanted)
    assert given.abs().max() > 0
    for chunk in (1, 2, 5, 100):
        torch.testing.assert_close(backbone.decode(x, chunk=chunk), images, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in vae.parameters())


def test_only_the_unet_is_in_the_parameters(backbone):
    assert {id(p) for p in backbone.parameters()} == {id(p) for p in backbone.unet.parameters()}
    assert all(("lora" in name) == p.requires_grad for name, p in backbone.named_parameters())
    full = StableDiffusionBackbone(tiny_pipeline())
    assert {id(p) for p in full.parameters()} == {id(p) for p in full.unet.parameters()}
    assert all(p.requires_grad for p in full.parameters())
    for part in (full.pipeline.vae, full.pipeline.text_encoder, full._reference[0]):
        assert not any(p.requires_grad for p in part.parameters())
        assert not part.training


def test_lora_reaches_exactly_its_targets(backbone):
    config = backbone.unet.peft_config["policy"]
    assert (config.r, config.lora_alpha) == (3, 5.0)
    adapted = {name.split(".lora_")[0] for name, _ in backbone.named_parameters() if ".lora_" in name}
    names = [name.removesuffix(".base_layer") for name, m in backbone.named_modules() if hasattr(m, "weight")]
    ends = ("to_q", "to_k", "to_v", "to_out.0", "conv1")
    assert adapted == {name for name in names if name.endswith(tuple(f".{end}" for end in ends)) and "lora" not in name}


@torch.no_grad()
def test_saved_lora_in_plain_diffusers_is_the_same_network(trained_backbone, tiny_folder, tmp_path):
    x, t, _ = inputs(trained_backbone)
    states = embed(trained_backbone.pipeline, ["a cat", "a dog", "a dog"])
    expected = trained_backbone.unet(x, t, states).sample
    trained_backbone.save(tmp_path / "lora")
    pipeline = plain(tiny_folder)
    untrained = pipeline.unet(x, t, states).sample
    pipeline.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(pipeline.unet(x, t, states).sample, expected, rtol=1e-5, atol=1e-6)
    assert (untrained - expected).abs().max() > 1e-2


@torch.no_grad()
def test_saved_full_network_loads_in_plain_diffusers(tmp_path):
    backbone = StableDiffusionBackbone(tiny_pipeline(), guidance_scale=1.0)
    train_a_little(backbone)
    backbone.save(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    x, t, conditioning = inputs(backbone)
    assert torch.equal(loaded(x, t, conditioning["encoder_hidden_states"]).sample, backbone(x, t, conditioning))
    with backbone.reference():  # and what was saved is not the reference
        assert not torch.equal(loaded(x, t, conditioning["encoder_hidden_states"]).sample, backbone(x, t, conditioning))


@pytest.mark.parametrize("lora", [LORA, None])
@torch.no_grad()
def test_what_was_saved_is_loaded(lora, tmp_path):
    trained, fresh = (StableDiffusionBackbone(tiny_pipeline(), lora=lora, guidance_scale=1.0) for _ in range(2))
    with torch.enable_grad():
        train_a_little(trained)
    trained.save(tmp_path / "weights")
    x, t, conditioning = inputs(trained)
    pretrained = fresh(x, t, conditioning)
    fresh.load(tmp_path / "weights")
    assert torch.equal(fresh(x, t, conditioning), trained(x, t, conditioning))
    with fresh.reference():
        assert torch.equal(fresh(x, t, conditioning), pretrained)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in trained.named_parameters() if p.requires_grad
    }
    if lora:
        assert LoRA.saved_in(tmp_path / "weights") == replace(lora, targets=tuple(sorted(lora.targets)))


def test_other_weights_than_its_own_are_refused(trained_backbone, tmp_path):
    trained_backbone.save(tmp_path / "lora")
    other = StableDiffusionBackbone(tiny_pipeline(), lora=LoRA(rank=2), guidance_scale=1.0)
    with pytest.raises(ValueError, match="rank=3.*rank=2"):
        other.load(tmp_path / "lora")
    for backbone in (other, StableDiffusionBackbone(tiny_pipeline(), guidance_scale=1.0)):
        with pytest.raises(FileNotFoundError, match="holds no"):
            backbone.load(tmp_path)


def test_bfloat16_keeps_what_trains_in_float32(tiny_folder):
    lora = LoRA(rank=3, alpha=5.0, targets=("to_q", "conv1"))
    half = StableDiffusionBackbone.from_pretrained(tiny_folder, dtype="bfloat16", lora=lora, guidance_scale=2.0)
    full = StableDiffusionBackbone.from_pretrained(tiny_folder, lora=lora, guidance_scale=2.0)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    half.load_state_dict({k: v for k, v in full.state_dict().items() if "lora" in k}, strict=False)
    train_a_little(half)
    train_a_little(full)
    x, t, conditioning = inputs(half)
    out = half(x, t, conditioning)
    assert out.dtype == torch.float32
    expected = full(*inputs(full))
    assert (out - expected).norm() / expected.norm() < 0.05  # bfloat16 has three digits
    out.square().mean().backward()
    expected.square().mean().backward()
    ours, exact = gradients(half), gradients(full)
    assert ours.keys() == exact.keys()
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    a, b = (torch.cat([g[name].flatten() for name in exact]) for g in (ours, exact))
    assert torch.cosine_similarity(a, b, dim=0) > 0.95
    assert half.decode(x).dtype == torch.float32


def test_gradient_checkpointing_recomputes_and_changes_nothing():
    """In evaluation mode too, in which the network always is: diffusers asks only whether gradients are enabled."""
    outputs, found, calls = [], [], []
    for checkpointing in (False, True):
        backbone = StableDiffusionBackbone(tiny_pipeline(), lora=LORA, gradient_checkpointing=checkpointing)
        assert not backbone.unet.training
        train_a_little(backbone)
        count = []
        # Before the call: recomputation stops early, as soon as it has what the backward pass needs.
        backbone.unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        out = backbone(*inputs(backbone))
        out.square().mean().backward()
        outputs.append(out)
        found.append(gradients(backbone))
        calls.append(len(count))
    assert calls == [1, 2]
    assert torch.equal(*outputs)
    assert found[0].keys() == found[1].keys() == {n for n, p in backbone.named_parameters() if p.requires_grad}
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_sampling_equals_plain_diffusers(prediction_type):
    """The whole chain: the same first noise, the same seed, the same images as `pipe(...)`."""
    steps = 5
    pipeline = tiny_pipeline(prediction_type=prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(12)
    settings = {"guidance_scale": 4.0, "num_inference_steps": steps, "eta": 1.0, "output_type": "latent"}
    expected = pipeline(PROMPTS, latents=latents.clone(), generator=generator, **settings).images

    backbone = StableDiffusionBackbone(pipeline, guidance_scale=4.0, lora=LORA)
    policy = make_policy(backbone, backbone.sampler(steps), backbone.conditioning(PROMPTS))
    env = DenoisingEnv(backbone, steps, lambda images, _: images.mean((1, 2, 3)), PROMPTS, batch_size=2)
    state = env.reset(TensorDict({"latents": latents, "prompt_id": torch.tensor([[0], [1]])}, [2]))
    torch.manual_seed(12)
    with set_exploration_type(ExplorationType.RANDOM):
        data = env.rollout(steps, policy, auto_reset=False, tensordict=state)
    torch.testing.assert_close(data["action"][:, -1], expected, rtol=1e-4, atol=1e-4)
    assert (expected - latents).abs().max() > 0.1
    images = (pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(data["next", "reward"][:, -1, 0], images.mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_what_cannot_train_is_refused(tiny_folder):
    with pytest.raises(ValueError, match="guidance_scale is 0.5; it must be at least 1"):
        StableDiffusionBackbone(tiny_pipeline(), guidance_scale=0.5)
    with pytest.raises(ValueError, match="layer of the UNet is called 'to_z'"):
        StableDiffusionBackbone(tiny_pipeline(), lora=LoRA(targets=("to_q", "to_z")))
    with pytest.raises(ValueError, match="choose one of float32, bfloat16$"):
        StableDiffusionBackbone.from_pretrained(tiny_folder, dtype="float64", lora=LORA)
    with pytest.raises(ValueError, match="full fine-tuning in bfloat16 loses small updates"):
        StableDiffusionBackbone.from_pretrained(tiny_folder, dtype="bfloat16")
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"targets": ()}):
        with pytest.raises(ValueError, match="LoRA needs"):
            LoRA(**wrong)
