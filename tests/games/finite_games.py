"""Random games, and optimisers that know nothing of closed forms; tests import this as ``games.finite_games``."""

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from openrlhf_sgpo.games import Game

QUICK = settings(max_examples=40)
UNIFORM = np.full(3, 1 / 3)
DIGITS = 1e-6  # of the printed values


@st.composite
def games(draw, largest=5, certain=True):
    """Preferences and references at random, from all but deterministic to all but indifferent."""
    size = draw(st.integers(2, largest))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    raw = generator.normal(size=(size, size)) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    preferences = 1 / (1 + np.exp(raw.T - raw))
    if certain and draw(st.booleans()):
        preferences = np.where(preferences == 0.5, 0.5, np.round(preferences))
    leader, behaviour = generator.dirichlet(np.full(size, 3.0), 2)
    return Game(preferences, (), leader, generator.dirichlet(np.full(size, 3.0), size), behaviour)


def log_softmax(logits):
    return torch.log_softmax(logits, dim=-1)


def minimised(objective, *shape):
    """softmax(logits) of the given shape at which objective(log-probabilities) is smallest, by BFGS from the uniform one."""

    def value_and_gradient(flat):
        logits = torch.tensor(flat.reshape(shape), requires_grad=True)
        value = objective(log_softmax(logits))
        value.backward()
        return value.item(), logits.grad.numpy().ravel()

    result = minimize(value_and_gradient, np.zeros(np.prod(shape)), jac=True, method="BFGS", options={"gtol": 1e-10})
    assert np.abs(result.jac).max() < 1e-8
    return log_softmax(torch.tensor(result.x.reshape(shape))).exp().numpy()


def torch_kl(log_policy, reference):
    return (log_policy.exp() * (log_policy - torch.tensor(reference).log())).sum(-1)


def played(update, start=(0.2, 0.2, 0.6), rounds=4000):
    policy = np.array(start)
    for _ in range(rounds):
        policy = update(policy)
    return policy
