"""What one call of ``train`` asks of Hydra."""

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from loralab.cli import main


@pytest.mark.parametrize(
    ("words", "times"), [([], 1), (["hydra.mode=RUN"], 2), (["--config-dir", "."], 2)], ids=["none", "word", "folder"]
)
def test_a_run_is_composed_once_where_no_one_can_have_set_hydras_mode(tmp_path, monkeypatch, capsys, words, times):
    monkeypatch.chdir(tmp_path)
    real, composed = ConfigLoaderImpl.load_configuration, []

    def load(*given, **options):
        composed.append(given)
        return real(*given, **options)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", load)
    assert main.run(["train", "adapter.r=0", "hydra.run.dir=r", *words]) == 2
    assert "adapter.r" in capsys.readouterr().err
    assert len(composed) == times
