"""Nabla-DB on a linear-Gaussian chain, whose tilted optimum is known, and on a small true pipeline."""

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Independent, Normal
from torch.nn.attention import SDPBackend, sdpa_kernel

from agents import NablaDBLoss, RewardGradient, TransitionSampler, make_collector, make_policy, train
from diffusion_env import CorrectionUNet, DDIMSampler, DenoisingEnv, LoRA, StableDiffusionBackbone
from tests.chain import GAIN, LATENT, PROMPTS, STEPS, TableCorrection, chain, linear_reward, solution, transitions
from tests.tiny import SCHEDULE, tiny_pipeline

BETA = 2.0


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def solved(weighting="none", **arguments):
    """The chain at its tilted optimum with the correction that goes with it, its loss, and data of its policy."""
    backbone, sampler, policy = chain()
    correction = TableCorrection(sampler.timesteps)
    with torch.no_grad():
        for parameter, value in zip(
            (backbone.offset, correction.table), solution(backbone, sampler, BETA), strict=True
        ):
            parameter.copy_(value)
    loss = NablaDBLoss(policy, beta=BETA, correction=correction, weighting=weighting, **arguments)
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler).reshape(-1))
    return backbone, correction, loss, data


def total(losses):
    return sum(value for key, value in losses.items() if key.startswith("loss_"))


def gradients(module):
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


# --- closed forms ---------------------------------------------------------------------------------------------------


def rounding(sampler, weighting):
    """What float32 leaves of a score that should be zero: a mean square, a few roundings of outputs around 1."""
    b, std = sampler.mean_out, sampler.std
    weight = {"none": 1, "sigma": std, "output": std**2 / b}[weighting]
    return (weight * b / std**2 * 1e-6).square().mean()


@pytest.mark.parametrize("weighting", ["none", "sigma", "output"])
@pytest.mark.parametrize("backward_trains_policy", [False, True])
def test_every_loss_is_zero_at_the_tilted_optimum(weighting, backward_trains_policy):
    backbone, correction, loss, data = solved(weighting, backward_trains_policy=backward_trains_policy)
    zero = {key: rounding(DDIMSampler(SCHEDULE, STEPS), key) for key in ("none", weighting)}
    losses = loss(data)
    assert set(losses.keys()) == set(loss.out_keys)
    assert losses["loss_forward"] < zero[weighting]
    assert losses["loss_backward"] < zero["none"]
    assert losses["loss_terminal"] == 0
    assert losses["score_rms"] > 0.1
    # Each is sensitive: a few hundredths of the answer too much show.
    with torch.no_grad():
        backbone.offset.mul_(1.05)
        elsewhere = loss(data)
        correction.table[-1] += 0.05
    assert elsewhere["loss_forward"] > 100 * zero[weighting]
    assert elsewhere["loss_backward"] > 100 * zero["none"]
    assert loss(data)["loss_terminal"] > 1e-4


@pytest.mark.parametrize("weighting", ["none", "output"])
def test_a_run_from_elsewhere_converges_to_the_tilted_optimum(weighting):
    """Policy and correction are learned together, from data of the policy that is being learned."""
    backbone, sampler, policy = chain()
    correction = TableCorrection(sampler.timesteps)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (backbone.offset, backbone.slope):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    loss = NablaDBLoss(policy, beta=BETA, correction=correction, weighting=weighting)
    gradient = RewardGradient(policy, linear_reward, jacobian=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05, eps=1e-12)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    for iteration in range(1000):
        if iteration % 20 == 0:
            data = gradient(transitions(policy, sampler, trajectories=8, seed=iteration).reshape(-1))
        total(loss(data)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    offset, missing = solution(backbone, sampler, BETA)
    assert backbone.slope.abs().max() < 0.01
    for learned, exact in ((backbone.offset, offset), (correction.table, missing)):
        assert exact.abs().max() > 0.3
        torch.testing.assert_close(learned.detach(), exact, rtol=0.02, atol=0.01)


class QuadraticChain:
    """r = -sum of squared pixels on two steps, every latent element by itself; double precision, by integration."""

    beta = 3.0

    def __init__(self, backbone, sampler):
        self.k, self.m = backbone.k.double(), backbone.m.double().flatten(1)
        self.a, self.b, self.std = (table.double() for table in (sampler.mean_x, sampler.mean_out, sampler.std))
        self.last = sampler.num_steps - 1

    def after(self, x, i):
        """A grid over the latents after pretrained decision i from x [..., 4], and its log-weights in the tilt."""
        nodes = torch.linspace(-8, 8, 401).double().view(-1, *[1] * x.ndim)
        mean = self.a[i] * x + self.b[i] * (self.k[i].item() * x + self.m[i])
        grid = mean + self.std[i] * nodes
        return grid, self.log_flow(grid, i + 1) - nodes**2 / 2

    def log_flow(self, x, i):
        if i > self.last:
            return -3 * self.beta * (0.5 + GAIN * x) ** 2  # three equal channels
        return self.after(x, i)[1].logsumexp(0)

    def score(self, x, i):
        with torch.enable_grad():
            leaf = x.detach().double().flatten(1).requires_grad_()
            return torch.autograd.grad(self.log_flow(leaf, i).sum(), leaf)[0].view_as(x).float()

    def best_mean(self, x, i):
        """Mean of the tilted step from every element of x [n, 4]."""
        grid, log_weight = self.after(x.double(), i)
        return (log_weight.softmax(0) * grid).sum(0)


def test_the_optimum_of_a_quadratic_reward_is_the_best_fit():
    """The tilted steps are narrower; a policy of fixed width can match their means only, and does.

    There the expected gradient is zero. Two noises, +1 and -1, give the expectation exactly: all is affine.
    """
    backbone, sampler, policy = chain(num_steps=2)
    exact = QuadraticChain(backbone, sampler)
    with torch.no_grad():
        for i in range(2):
            zero, one = exact.best_mean(torch.stack([torch.zeros(4), torch.ones(4)]), i)
            backbone.slope[i] = (((one - zero)[0] - exact.a[i]) / exact.b[i] - exact.k[i]) / backbone.scale[i]
            backbone.offset[i] = (zero / exact.b[i] - exact.m[i]).view(LATENT) / backbone.scale[i]

    def quadratic_reward(images, prompts):
        return -images.square().sum((1, 2, 3))

    reward_gradient = RewardGradient(policy, quadratic_reward)

    class Missing(torch.nn.Module):
        """The exact score of the flow before the last decision, less the parametrised part."""

        def forward(self, x, timestep, conditioning):
            step = torch.ones(len(x), 1, dtype=torch.int64)
            raw = reward_gradient.gradient(x, step, torch.zeros_like(step))
            return exact.score(x, 1) - exact.beta * sampler.signal_power[1] * raw

    loss = NablaDBLoss(
        policy, beta=exact.beta, correction=Missing(), backward_weight=0, terminal_weight=0, weighting="output"
    )
    x_t = torch.linspace(-1.5, 1.5, 7).repeat_interleave(2)[:, None, None, None].expand(-1, *LATENT)
    noise = torch.tensor([1.0, -1.0]).repeat(7)[:, None, None, None]
    for i in range(2):
        data = TensorDict(
            {"latents": x_t, "step": torch.full((14, 1), i), "prompt_id": torch.zeros(14, 1, dtype=torch.int64)}, [14]
        )

        def gradient(data=data):
            distribution = policy.get_dist(data.clone())
            data["action"] = (distribution.mean + distribution.stddev * noise).detach()
            loss(reward_gradient(data))["loss_forward"].backward()
            return gradients(backbone)

        at_optimum = gradient()
        with torch.no_grad():
            backbone.offset[i] *= 1.1
            backbone.slope[i] += 0.05
        nearby = gradient()
        for name in ("offset", "slope"):
            assert at_optimum[name].abs().max() < 2e-3 * nearby[name].abs().max(), (i, name)


@pytest.mark.parametrize("backward_trains_policy", [False, True])
def test_not_residual_is_zero_where_every_equation_holds(backward_trains_policy):
    """exp(r) = q(x | x_0 = target): DDPM's posterior given that x_0 is the policy, q(x_i | x_0) the flow."""
    backbone, sampler, policy = chain()
    target = torch.tensor([[[0.5, -1.0], [0.2, 0.0]]])
    power = torch.cat([sampler.signal_power[:-1], sampler._alphas_cumprod[:1]]).view(-1, 1, 1, 1)
    with torch.no_grad():
        offset = -(power.sqrt() * target / (1 - power).sqrt())[:-1] - backbone.m
        backbone.offset += (offset / backbone.scale)[:, None]
        backbone.slope += (1 / (1 - power[:-1]).sqrt() - backbone.k) / backbone.scale

    def score(x, i):
        return -(x - power[i].sqrt() * target) / (1 - power[i])

    class Correction(torch.nn.Module):
        def forward(self, x, timestep, conditioning):
            i = (timestep[:, None] == sampler.timesteps).float()
            # 0 at the clean latents, where the reward's gradient, given below, is all.
            return torch.where(i.any(1).view(-1, 1, 1, 1), score(x, i.argmax(1)), 0)

    data = transitions(policy, sampler).reshape(-1)
    last = (data["step"] == STEPS - 1).view(-1, 1, 1, 1)
    data["next", "reward_grad"] = torch.where(last, score(data["action"], torch.full((len(data),), STEPS)), 0)
    data["reward_grad"] = torch.zeros_like(data["latents"])
    loss = NablaDBLoss(
        policy, beta=1, correction=Correction(), residual=False, backward_trains_policy=backward_trains_policy
    )
    losses = loss(data)
    assert losses["loss_forward"] < 1e-7 * losses["score_rms"] ** 2
    assert losses["loss_backward"] < 1e-7 * losses["score_rms"] ** 2
    assert losses["loss_terminal"] == 0
    with torch.no_grad():
        backbone.offset += 0.02 * losses["score_rms"]
    assert loss(data)["loss_forward"] > 1e-4 * losses["score_rms"] ** 2


# --- a true network -------------------------------------------------------------------------------------------------


@pytest.fixture
def real(trained_backbone):
    """Policy with the true log-density, sampler, and transitions at random latents."""
    sampler = trained_backbone.sampler(STEPS)
    cache = trained_backbone.conditioning(PROMPTS)
    policy = make_policy(trained_backbone, sampler, cache, log_prob_reduction="sum", keep_model_output=True)
    generator = torch.Generator().manual_seed(4)
    state = TensorDict(
        {
            "latents": torch.randn(4, 4, 8, 8, generator=generator),
            "step": torch.arange(4)[:, None],
            "prompt_id": torch.tensor([[0], [1], [0], [1]]),
        },
        [4],
    )
    torch.manual_seed(0)
    with torch.no_grad():
        data = policy(state)
    for key in ("reward_grad", ("next", "reward_grad")):
        data[key] = torch.randn(4, 4, 8, 8, generator=generator)
    return trained_backbone, sampler, policy, data


def log_prob(policy, data, x_t, x_prev):
    return policy.get_dist(data.clone().set("latents", x_t)).log_prob(x_prev)


def ratio_gradients(real, *, residual):
    """Autograd of the log-density ratio by x_prev and x_t, with the graph of the parameters."""
    backbone, sampler, policy, data = real
    x_t, x_prev = (data[key].clone().requires_grad_() for key in ("latents", "action"))
    ratio = log_prob(policy, data, x_t, x_prev)
    if residual:
        with backbone.reference():
            ratio = ratio - log_prob(policy, data, x_t, x_prev)
    else:
        noising = sampler.noising(data["step"][:, 0], x_t)
        ratio = ratio - Independent(Normal(noising.scale * x_prev, noising.std.expand_as(x_t)), 3).log_prob(x_t)
    return torch.autograd.grad(ratio.sum(), (x_prev, x_t), create_graph=True)


@pytest.mark.parametrize("residual", [True, False])
def test_both_residuals_are_autograds_of_the_log_density_ratio(real, residual):
    """And so are the gradients of their losses by the parameters: those of the backward one are of second order."""
    _, _, policy, data = real
    loss = NablaDBLoss(policy, beta=0.5, residual=residual, backward_trains_policy=True, weighting="sigma")
    losses = loss(data)
    with sdpa_kernel(SDPBackend.MATH):
        by_x_prev, by_x_t = ratio_gradients(real, residual=residual)
    sampler, i = real[1], data["step"][:, 0]
    gamma = torch.cat([sampler.signal_power[1:-1], torch.ones(1)])[i].view(-1, 1, 1, 1)
    target_after = 0.5 * gamma * data["next", "reward_grad"]
    target_before = -0.5 * sampler.signal_power[i].view(-1, 1, 1, 1) * data["reward_grad"]
    std = sampler.std[i].view(-1, 1, 1, 1)
    for key, score, target in (
        ("loss_forward", by_x_prev, target_after),
        ("loss_backward", by_x_t, target_before),
    ):
        weight = std if key == "loss_forward" else 1  # backward matching is not weighted
        expected = (weight * (score - target)).square().mean()
        torch.testing.assert_close(losses[key], expected, rtol=1e-3, atol=1e-6)
        losses[key].backward(retain_graph=True)
        found = gradients(policy)
        expected.backward(retain_graph=True)
        by_hand = gradients(policy)
        assert found.keys() == by_hand.keys() and found
        scale = max(gradient.abs().max() for gradient in by_hand.values())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, by_hand[name], rtol=1e-2, atol=2e-3 * float(scale))


def test_the_forward_residual_is_free_of_the_sampling_noise(real):
    _, _, policy, data = real
    loss = NablaDBLoss(policy, beta=0)
    other = data.clone().set("action", data["action"] + torch.randn(4, 4, 8, 8))
    assert torch.equal(loss(data)["loss_forward"], loss(other)["loss_forward"])
    assert loss(data)["loss_forward"] > 0


def test_without_reward_the_pretrained_model_stays(backbone):
    """Beta = 0: no gradient at all, for the adapters and for the correction."""
    sampler = backbone.sampler(STEPS)
    policy = make_policy(backbone, sampler, backbone.conditioning(PROMPTS), keep_model_output=True)
    correction = CorrectionUNet(backbone, block_out_channels=(32, 32))
    loss = NablaDBLoss(policy, beta=0, correction=correction, backward_trains_policy=True, trust_region=3.0)
    torch.manual_seed(0)
    data = TensorDict(
        {
            "latents": torch.randn(4, 4, 8, 8),
            "step": torch.arange(4)[:, None],
            "prompt_id": torch.zeros(4, 1, dtype=torch.int64),
        },
        [4],
    )
    with torch.no_grad():
        data = policy(data)
    data["reward_grad"] = data["next", "reward_grad"] = torch.randn(4, 4, 8, 8)
    losses = loss(data)
    losses["loss_forward"].backward(retain_graph=True)
    assert not any(gradient.any() for gradient in gradients(loss).values())
    total(losses).backward()  # its second-order part adds up in another order with the adapters in place
    at_zero = max(gradient.abs().max() for gradient in gradients(loss).values())
    # With a reward it moves, and moves the correction's last layer first.
    loss = NablaDBLoss(policy, beta=1, correction=correction, backward_trains_policy=True)
    total(loss(data)).backward()
    found = gradients(loss)
    assert max(gradient.abs().max() for name, gradient in found.items() if "lora" in name) > 1e4 * at_zero
    assert {name for name, gradient in found.items() if name.startswith("correction") and gradient.any()} == {
        "correction.unet.conv_out.weight",
        "correction.unet.conv_out.bias",
    }


def test_backward_matching_trains_the_correction_alone_unless_told(real):
    backbone, _, policy, data = real
    correction = CorrectionUNet(backbone, block_out_channels=(32, 32))
    for trains_policy in (False, True):
        loss = NablaDBLoss(policy, beta=1, correction=correction, backward_trains_policy=trains_policy)
        loss(data)["loss_backward"].backward()
        found = gradients(loss)
        assert found["correction.unet.conv_out.bias"].abs().max() > 0
        assert any("lora" in name for name in found) == trains_policy
    # The value is the same; only what is differentiated changes.
    first = NablaDBLoss(policy, beta=1, correction=correction)(data)["loss_backward"]
    torch.testing.assert_close(first, loss(data)["loss_backward"], rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_nothing_of_the_second_order_graph():
    """Activations are recomputed outside the loss, where another attention kernel would be chosen."""
    found = []
    for checkpointing in (False, True):
        lora = LoRA(rank=3, alpha=5.0, targets=("to_q", "to_k", "to_v", "to_out.0"))
        pipeline = tiny_pipeline()
        backbone = StableDiffusionBackbone(
            pipeline, lora=lora, guidance_scale=2.0, gradient_checkpointing=checkpointing
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in backbone.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        policy = make_policy(backbone, backbone.sampler(STEPS), backbone.conditioning(PROMPTS))
        state = {
            "latents": torch.randn(2, 4, 8, 8, generator=generator),
            "action": torch.randn(2, 4, 8, 8, generator=generator),
            "step": torch.tensor([[0], [1]]),
            "prompt_id": torch.tensor([[0], [1]]),
            "reward_grad": torch.randn(2, 4, 8, 8, generator=generator),
        }
        data = TensorDict(state, [2])
        data["next", "reward_grad"] = data["reward_grad"]
        loss = NablaDBLoss(policy, beta=1, backward_trains_policy=True)
        losses = loss(data)
        total(losses).backward()
        found.append(gradients(loss))
    assert found[0].keys() == found[1].keys()
    assert max(gradient.abs().max() for gradient in found[0].values()) > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_full_fine_tuning_is_compared_with_the_frozen_copy():
    pipeline = tiny_pipeline()
    full = StableDiffusionBackbone(pipeline, guidance_scale=2.0)
    sampler = full.sampler(STEPS)
    policy = make_policy(full, sampler, full.conditioning(PROMPTS))
    loss = NablaDBLoss(policy, beta=0)
    data = TensorDict(
        {
            "latents": torch.randn(2, 4, 8, 8),
            "step": torch.zeros(2, 1, dtype=torch.int64),
            "prompt_id": torch.zeros(2, 1, dtype=torch.int64),
            "action": torch.randn(2, 4, 8, 8),
            ("next", "reward_grad"): torch.randn(2, 4, 8, 8),
        },
        [2],
    )
    assert loss(data)["loss_forward"] < 1e-10
    with torch.no_grad():
        full.unet.conv_out.bias += 0.5
    before = full.unet
    expected = (sampler.mean_out[0] / sampler.std[0] ** 2 * 0.5).square()  # guidance keeps what both branches share
    torch.testing.assert_close(loss(data)["loss_forward"], expected, rtol=1e-3, atol=0)
    assert full.unet is before


def test_the_loop_trains_policy_and_correction(backbone):
    """Through `agents.train`, the gradients computed for the drawn transitions by the buffer."""
    sampler = backbone.sampler(STEPS)
    policy = make_policy(backbone, sampler, backbone.conditioning(PROMPTS), keep_model_output=True)
    env = DenoisingEnv(backbone, STEPS, brightness, PROMPTS, batch_size=4, seed=0)
    correction = CorrectionUNet(backbone, block_out_channels=(32, 32))
    loss = NablaDBLoss(policy, beta=100, correction=correction, trust_region=1.0, weighting="output")
    trainable = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    collector = make_collector(env, policy, iterations=2)
    loop = train(
        collector,
        loss,
        torch.optim.AdamW(trainable, lr=1e-3),
        advantage=lambda data: data,
        sampler=TransitionSampler(range(STEPS), 0.5, stratified=True, always_last=True),
        updates_per_epoch=2,
        micro_batch=3,
        transform=RewardGradient(policy, brightness),
    )
    torch.manual_seed(0)
    rows = list(loop)
    collector.shutdown()
    assert len(rows) == 2
    for row in rows:
        assert set(loss.out_keys) <= set(row)
        assert row["reward_flow_rms"] > 0
    assert rows[0]["loss_trust_region"] > 0, "the second update of an iteration is off the sampling policy"
    started_at_zero = [
        parameter
        for name, parameter in loss.named_parameters()
        if "lora_B" in name or name.startswith("correction.unet.conv_out")
    ]
    assert len(started_at_zero) > 2
    assert all(parameter.any() for parameter in started_at_zero)


# --- options, keys, refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["none", "sigma", "output"])
@pytest.mark.parametrize("gamma_power", [0.0, 0.5, 1.0])
def test_weights_and_attenuation_are_those_of_the_formulas(weighting, gamma_power):
    backbone, sampler, policy = chain()
    with torch.no_grad():
        backbone.offset += 0.1
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler))  # [B, T] does as well
    loss = NablaDBLoss(policy, beta=BETA, weighting=weighting, gamma_power=gamma_power)
    expected = 0
    for i in range(STEPS):
        b, std = sampler.mean_out[i], sampler.std[i]
        gamma = sampler.signal_power[i + 1] ** gamma_power if i + 1 < STEPS else 1
        weight = {"none": 1, "sigma": std, "output": std**2 / b}[weighting]
        residual = 0.1 - BETA * gamma * data["next", "reward_grad"][:, i]
        expected += (weight * residual).square().mean() / STEPS
    torch.testing.assert_close(loss(data)["loss_forward"], expected, rtol=1e-4, atol=1e-7)


def test_the_trust_region_is_the_change_of_the_networks_output():
    backbone, sampler, policy = chain()
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler).reshape(-1))
    loss = NablaDBLoss(policy, beta=BETA, trust_region=50.0)
    assert loss(data)["loss_trust_region"] < 1e-9
    with torch.no_grad():
        backbone.offset += 0.2
    losses = loss(data)
    expected = 50 * (0.2 * backbone.scale).square().mean()
    torch.testing.assert_close(losses["loss_trust_region"], expected, rtol=1e-3, atol=0)
    losses["loss_trust_region"].backward()
    assert (backbone.offset.grad > 0).all()


def test_terms_have_their_weights_and_micro_batches_change_nothing():
    backbone, correction, loss, data = solved()
    with torch.no_grad():
        correction.table += 0.1
        backbone.offset += 0.1
    once = loss(data)
    torch.testing.assert_close(once["loss_terminal"], torch.tensor(0.1**2 / STEPS), rtol=1e-4, atol=0)
    weighted = NablaDBLoss(
        loss.actor_network, beta=BETA, correction=correction, backward_weight=3.0, terminal_weight=5.0
    )(data)
    for key, factor in {"loss_forward": 1, "loss_backward": 3, "loss_terminal": 5}.items():
        torch.testing.assert_close(weighted[key], factor * once[key])
        parts = [loss(part)[key] * len(part) / len(data) for part in data.split(5)]
        torch.testing.assert_close(sum(parts), once[key], rtol=1e-4, atol=1e-7)


def test_the_last_step_with_a_density_is_terminal():
    """A schedule that ends at alpha_bar = 1 has no noise in its last step: the state before it counts as the end."""
    backbone, sampler, policy = chain(set_alpha_to_one=True, timestep_spacing="trailing")
    assert sampler.has_density.tolist() == [True, True, True, False]
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler).reshape(-1))
    correction = TableCorrection(sampler.timesteps)
    with torch.no_grad():
        correction.table += 1.0
    loss = NablaDBLoss(policy, beta=BETA, correction=correction)
    with pytest.raises(ValueError, match="some transitions are deterministic"):
        loss(data)
    end = data[data["step"][:, 0] == 2]
    losses = loss(end)
    assert losses["loss_terminal"] == 1
    expected = (BETA * end["next", "reward_grad"]).square().mean()  # gamma = 1, and no correction
    torch.testing.assert_close(losses["loss_forward"], expected)


def test_an_earlier_step_can_be_the_last():
    """As if those after it had no density: g is 0 there, gamma 1; and before it nothing changes."""
    _, correction, loss, data = solved()
    with torch.no_grad():
        correction.table += 0.1
    arguments = {"beta": BETA, "correction": correction}
    shorter = NablaDBLoss(loss.actor_network, **arguments, last_step=1)
    end, before = (data[data["step"][:, 0] == step] for step in (1, 0))
    losses = shorter(end)
    assert not loss(end)["loss_terminal"]
    torch.testing.assert_close(losses["loss_terminal"], losses["correction_rms"] ** 2)
    plain = NablaDBLoss(loss.actor_network, beta=BETA, gamma_power=0.0)(end)
    torch.testing.assert_close(losses["loss_forward"], plain["loss_forward"])
    torch.testing.assert_close(shorter(before)["loss_forward"], loss(before)["loss_forward"])
    for missing in (-1, 7):
        with pytest.raises(ValueError, match=f"last_step={missing} is no decision with a density"):
            NablaDBLoss(loss.actor_network, **arguments, last_step=missing)


def test_renamed_keys():
    backbone, sampler, policy = chain()
    data = RewardGradient(policy, linear_reward)(transitions(policy, sampler).reshape(-1))
    loss = NablaDBLoss(policy, beta=BETA, trust_region=1.0, correction=TableCorrection(sampler.timesteps))
    expected = loss(data)
    names = {"action": "taken", "reward_grad": "slope", "model_output": "output"}
    loss.set_keys(**names)
    renamed = data.clone()
    for old, new in {**names, ("next", "reward_grad"): ("next", "slope")}.items():
        renamed.rename_key_(old, new)
    assert set(loss.in_keys) == set(renamed.select(*loss.in_keys).keys(True, True))
    found = loss(renamed)
    for key in loss.out_keys:
        torch.testing.assert_close(found[key], expected[key])


def test_what_is_missing_is_named():
    _, sampler, policy = chain()
    data = transitions(policy, sampler).reshape(-1)
    with pytest.raises(KeyError, match="reward_grad comes from RewardGradient"):
        NablaDBLoss(policy, beta=1)(data)
    data = RewardGradient(policy, linear_reward, before=False)(data)
    NablaDBLoss(policy, beta=1)(data)
    with pytest.raises(KeyError, match=r"no \['reward_grad'\]"):
        NablaDBLoss(policy, beta=1, backward_trains_policy=True)(data)
    with pytest.raises(KeyError, match="keep_model_output=True"):
        NablaDBLoss(policy, beta=1, trust_region=1.0)(data.exclude("model_output"))


def test_bad_settings_are_refused():
    _, sampler, policy = chain()
    with pytest.raises(ValueError, match="would be a constant"):
        NablaDBLoss(policy, beta=1, backward_weight=1.0)
    for setting in ("beta", "backward_weight", "terminal_weight", "trust_region", "gamma_power"):
        arguments = {"beta": 1, setting: -1}
        with pytest.raises(ValueError, match=f"{setting}=-1"):
            NablaDBLoss(policy, **arguments)
    with pytest.raises(ValueError, match="weighting is 'epsilon'"):
        NablaDBLoss(policy, beta=1, weighting="epsilon")
    with pytest.raises(ValueError, match="every step of this sampler is deterministic"):
        NablaDBLoss(chain(eta=0.0)[2], beta=1)
    with pytest.raises(TypeError, match="make it with `make_policy`"):
        NablaDBLoss(policy.module[-1], beta=1)


def test_the_correction_network_is_zero_at_first_and_fits_the_latents(backbone):
    correction = CorrectionUNet(backbone, block_out_channels=(32, 64))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([981, 0])
    conditioning = backbone.conditioning(PROMPTS)(torch.tensor([0, 1]))
    assert not correction(x, t, conditioning).any()
    torch.nn.init.ones_(correction.unet.conv_out.weight)
    out = correction(x, t, conditioning)
    assert out.shape == x.shape
    swapped = backbone.conditioning(PROMPTS)(torch.tensor([1, 0]))
    assert not torch.allclose(out, correction(x, t, swapped)), "it must read the prompt"
    with pytest.raises(ValueError, match="cannot be halved 4 times"):
        CorrectionUNet(backbone, block_out_channels=(32,) * 5)
