import pytest
import torch

from canter.errors import ConfigError
from canter.runtime import choose_device


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [("foo", 0, "no such device"), ("cuda", 0, "no GPU is available"), ("cuda:3", 2, "only 2 GPUs")],
)
def test_devices_that_are_not_here_are_refused(name, gpus, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=message):
        choose_device(name)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto").type == "cuda"
