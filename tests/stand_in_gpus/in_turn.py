"""Several commands in one process, by their scripts' own main: in_turn.py '[[notes, "module.function", [words]]]'."""
import importlib
import json
import os
import sys

for notes, function, words in json.loads(sys.argv.pop()):
    os.environ["STAND_IN_NOTES"] = notes
    module, name = function.split(".")
    sys.argv = [f"{module}.py", *map(str, words)]
    getattr(importlib.import_module(module), name)()
