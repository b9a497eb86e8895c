"""Implicit Q-learning on the true policy: its three terms by hand, and a reward that rises from old data alone."""

from collections import deque

import pytest
import torch
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.objectives import SoftUpdate

from agents import Evaluator, RestoreNext, TransitionSampler, iql_loss, make_collector, train
from diffusion_env import DenoisingEnv
from tests.chain import PROMPTS, STEPS, chain, linear_reward

BATCH = 64


def build_env(backbone, batch_size=BATCH):
    return DenoisingEnv(backbone, STEPS, linear_reward, PROMPTS, batch_size=batch_size, seed=0)


def collect(backbone, policy, batch_size=6):
    torch.manual_seed(1)
    collector = make_collector(build_env(backbone, batch_size), policy, iterations=1)
    (data,) = collector
    collector.shutdown()
    return data


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def randomise(loss):
    """Critics that say something: their last layers are zero at first. The targets say something else."""
    torch.manual_seed(5)
    with torch.no_grad():
        for params in (loss.qvalue_network_params, loss.value_network_params, loss.target_qvalue_network_params):
            params.apply(lambda tensor: tensor.data.normal_(std=0.3))


def values(network, params, data):
    """Of one set of parameters, [N]."""
    with params.to_module(network):
        return network(data.clone())[network.out_keys[0]].squeeze(-1)


def test_its_terms_are_those_of_the_paper():
    """Without discount, and nothing follows the last step."""
    backbone, _, policy = chain()
    data = RestoreNext()(collect(backbone, policy)).reshape(-1)
    inverse_temperature, expectile = 0.8, 0.7
    loss = iql_loss(policy, inverse_temperature=inverse_temperature, expectile=expectile, width=8)
    SoftUpdate(loss, tau=0.1)
    randomise(loss)
    with torch.no_grad():
        q = [values(loss.qvalue_network, loss.qvalue_network_params[k], data) for k in (0, 1)]
        target_q = [values(loss.qvalue_network, loss.target_qvalue_network_params[k], data) for k in (0, 1)]
        value = values(loss.value_network, loss.value_network_params, data)
        following = values(loss.value_network, loss.value_network_params, data["next"])
        last = data["step"][:, 0] == STEPS - 1
        aim = torch.where(last, data["next", "reward"][:, 0], following)
        expected_q = sum(nn.functional.smooth_l1_loss(each, aim) for each in q)
        gap = torch.minimum(*target_q) - value
        expected_v = (torch.where(gap > 0, expectile, 1 - expectile) * gap**2).mean()
        weight = (inverse_temperature * gap).exp()
        log_prob = policy.get_dist(data.clone()).log_prob(data["action"])
    assert not torch.equal(q[0], target_q[0])
    assert (gap > 0).any() and (gap < 0).any() and weight.max() < 100
    losses = loss(data.clone())
    torch.testing.assert_close(losses["loss_qvalue"], expected_q)
    torch.testing.assert_close(losses["loss_value"], expected_v)
    torch.testing.assert_close(losses["loss_actor"], -(weight * log_prob).mean())


def delayed(collector, iterations):
    """The collector's rollouts, each by a policy of that many iterations ago."""
    waiting = deque()
    for rollout in collector:
        waiting.append(rollout)
        if len(waiting) > iterations:
            yield waiting.popleft()


def test_the_reward_rises_from_data_more_than_an_iteration_old():
    backbone, _, policy = chain()
    evaluate = Evaluator(build_env(backbone), samples_per_prompt=64)
    before = evaluate(policy)
    torch.manual_seed(0)
    loss = iql_loss(policy, inverse_temperature=20.0, width=32)
    target_update = SoftUpdate(loss, tau=0.02)
    buffer = ReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=256, transform=RestoreNext())
    collector = make_collector(build_env(backbone), policy, iterations=12)
    rows = list(
        train(
            delayed(collector, 2),
            loss,
            torch.optim.Adam(trainable(loss), lr=1e-2),
            advantage=lambda rollout: rollout,
            sampler=TransitionSampler(range(STEPS)),
            updates_per_epoch=40,
            micro_batch=256,
            buffer=buffer,
            target_update=target_update,
        )
    )
    collector.shutdown()
    assert len(rows) == 10
    assert len(buffer) == 10 * BATCH * STEPS
    after = evaluate(policy)
    difference = after.rewards - before.rewards
    assert difference.mean() > 0.4 * before.std
    assert difference.mean() > 6 * difference.std() / len(difference) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inverse_temperature": -1.0}, "inverse_temperature is -1.0"),
        ({"expectile": 1.0}, "expectile is 1.0"),
        ({"expectile": 0.0}, "expectile is 0.0"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        iql_loss(chain()[2], **arguments)
