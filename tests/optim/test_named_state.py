"""Optimizer states by parameter name: complete, and only what can be loaded without running code."""

import pytest
import torch

import lowtide
from lowtide.optim.named_state import load_named_state, named_state

RULES = {
    "lomo": lambda params: lowtide.Lomo(params, lr=0.1, rounding="compensated"),
    "stochastic": lambda params: lowtide.Lomo(params, lr=0.1),
    "adalomo": lambda params: lowtide.AdaLomo(params, lr=0.1),
    "adamw": lambda params: lowtide.PerParameter(torch.optim.AdamW, params, lr=0.1),
    "momentum": lambda params: lowtide.PerParameter(torch.optim.SGD, params, lr=0.1, momentum=0.9),
    "radam": lambda params: lowtide.PerParameter(torch.optim.RAdam, params, lr=0.1),
}


def start(rule):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)).bfloat16()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    optimizer = RULES[rule](model.parameters())
    return model, optimizer, {param: name for name, param in model.named_parameters()}


def run(model, optimizer, steps):
    for step in steps:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_bit_for_bit(rule):
    whole, first, second = start(rule), start(rule), start(rule)
    run(*whole[:2], range(8))
    run(*first[:2], range(4))
    tensors, plain = named_state(first[1], first[2])
    second[0].load_state_dict(first[0].state_dict())
    load_named_state(second[1], second[2], {name: (lambda t=t: t.clone()) for name, t in tensors.items()}, plain)
    run(*second[:2], range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True))
    assert bool(tensors) == (rule != "stochastic")


def test_an_unknown_parameter_is_refused():
    _, optimizer, names = start("adalomo")
    with pytest.raises(ValueError, match=r"'2\.weight', which this model does not train"):
        load_named_state(optimizer, names, {"2.weight:exp_avg_sq": lambda: torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="does not train"):
        load_named_state(optimizer, names, {}, {"x": {"step": 1}})


def test_what_only_a_pickle_could_hold_is_refused():
    model, optimizer, names = start("stochastic")
    optimizer.state[next(model.parameters())]["window"] = {"a": [object()]}
    with pytest.raises(TypeError, match="keeps a object in 'window' of 0.weight"):
        named_state(optimizer, names)
