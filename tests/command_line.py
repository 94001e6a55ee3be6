"""The options of all commands, and `tilt steer` called as from a command line."""

import importlib
import re

from steering import tiny
from tilt.commands import compare
from tilt.commands import steer as script
from tilt.main import COMMANDS

EMBEDDED = (tiny.FOLDER / "tiny-sd3" / "model_index.json").exists()
SMALL = ["--steps", "5", "--particles", "3", "--num-scores", "2", "--reward", "jpeg"]
COMMAND = {
    name: importlib.import_module(f"tilt.commands.{name.replace(' ', '_')}") for name in COMMANDS
}
OPTIONS = {name: COMMAND[name].OPTIONS for name in COMMANDS if name != "compare"}
OPTIONS |= {f"compare {name}": options for name, options in compare.OPTIONS.items()}


def refused(capsys, *argv: str) -> str:
    """The one sentence that these arguments are refused with."""
    assert script.main([*argv]) == 2
    out, err = capsys.readouterr()
    err = re.sub(r"^tilt steer: loading .*\n", "", err, flags=re.M)  # what goes on before
    assert out == ""
    assert err.startswith("tilt steer: ")
    assert err.count("\n") == 1
    return err
