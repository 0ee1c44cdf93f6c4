"""Settings that are lowered or ignored give a warning."""

from types import SimpleNamespace

import pytest

from cli.errors import UserError
from distributed.world import DistributedConfig, World
from training.plan import share_batch


def test_a_micro_batch_above_the_share_of_a_step_is_lowered_with_a_warning(capsys):
    config = SimpleNamespace(batch_size=8, micro_batch_size=64)
    share_batch(config, World())
    assert config.micro_batch_size == 8
    assert capsys.readouterr().err.startswith("warning: --micro_batch_size 64: a rank has 8 blocks per step")
    config = SimpleNamespace(batch_size=9, micro_batch_size=None)
    world = World()
    world.size = 2
    share_batch(config, world)
    assert config.micro_batch_size == 5 and capsys.readouterr().err == ""
    world.size = 10
    with pytest.raises(UserError, match=r"^--batch_size 9: there are 10 ranks\. Set at least 10\.$"):
        share_batch(config, world)


def test_flags_of_ranks_are_ignored_in_one_process_with_a_warning(capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    World(DistributedConfig(strategy="fsdp", rank_timeout=9))
    assert "--strategy fsdp, --rank_timeout 9: ignored" in capsys.readouterr().err
    World(DistributedConfig())
    assert capsys.readouterr().err == ""
