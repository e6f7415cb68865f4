"""A log file whose folder is gone stops nothing, and says so once."""

import logging
import shutil

from loralab.records.log_file import LogFile


def test_a_folder_that_is_gone_before_the_first_line_is_said_once(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    handler = LogFile(tmp_path / "run" / "train.log", delay=True)
    shutil.rmtree(tmp_path / "run")
    log = logging.Logger("gone")
    log.addHandler(handler)
    log.warning("one")
    log.warning("two")
    handler.close()
    said = capsys.readouterr().err
    assert said.count("cannot be written: No such file or directory; the run goes on") == 1
    assert "Traceback" not in said
