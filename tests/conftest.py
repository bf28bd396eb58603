import hypothesis
import pytest
import session  # before torch, which reads the environment that it sets
import torch

from nanorlhf.look import plots

pytest_collection_modifyitems = session.pytest_collection_modifyitems
pytest_collection_finish = session.pytest_collection_finish
pytest_xdist_node_collection_finished = session.pytest_xdist_node_collection_finished
hypothesis.settings.register_profile("course", derandomize=True)  # in class, every run is the same run
hypothesis.settings.load_profile("course")
torch.set_num_threads(1)  # the models are tiny: a second thread only waits


@pytest.fixture
def no_curves(monkeypatch):
    """curves.png is not drawn: it takes longer than a tiny run."""
    monkeypatch.setattr(plots, "pyplot", lambda: None)


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """Data files, and an SFT and a reward model made of them; stages.config gives runs of 50 ms."""
    from stages import Stages

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plots, "pyplot", lambda: None)
        return Stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def at_step(monkeypatch):
    """at_step(k, action): call action once in step k, between gradients and update; returns an undo."""
    from nanorlhf.run.checkpoint import (
        Run,  # only now: the environment above is read when kernels are imported
    )

    def install(k, action):
        check, todo = Run.check, [action]

        def check_and_act(run, step, *args):
            if step == k and todo:
                todo.pop()()
            return check(run, step, *args)

        monkeypatch.setattr(Run, "check", check_and_act)
        return lambda: monkeypatch.setattr(Run, "check", check)

    return install


@pytest.fixture
def gradients(monkeypatch):
    """What reaches the optimizer before it is clipped: one list of gradients a step."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def record(parameters, max_norm):
        parameters = list(parameters)
        seen.append([p.grad.clone() for p in parameters])
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    return seen


@pytest.fixture
def spy(monkeypatch):
    """spy(module, name): from now on its calls are recorded in the list returned, as (arguments, result)."""

    def watch(where, name):
        calls, real = [], getattr(where, name)

        def wrapper(*args, **kw):
            out = real(*args, **kw)
            calls.append((args, out))
            return out

        monkeypatch.setattr(where, name, wrapper)
        return calls

    return watch
