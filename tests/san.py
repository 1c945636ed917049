"""Small networks of san_model and images for them, and its command line, for the tests."""

import torch

from san_model import SAN

SMALL = {"n_resgroups": 2, "n_resblocks": 1, "n_feats": 16, "reduction": 4}


def small(seed=0, **config):
    """A small network with no weight at zero: gamma and W start there, which would hide what they multiply."""
    torch.manual_seed(seed)
    model = SAN(**(SMALL | config))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def image(*size, batch=1, dtype=torch.float32, seed=0):
    return (
        torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 255
    )


def assert_same(model, other):
    assert model.config == other.config
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    assert all(torch.equal(state[name], others[name]) for name in state)


def run(*arguments):
    from san_model import cli  # here: it needs more than the network does

    return cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """What a command line that must fail prints."""
    try:
        status = run(*arguments)
    except SystemExit as exit_:  # the parser's own way out
        status = exit_.code
    assert status == 2
    return " ".join(capsys.readouterr().err.split())
