"""Which of a file's statements that only a GPU runs (gpu_lines.py) did run? Each is noted once a process in LINES_RUN.

As Python imports one of the WATCHED_FILES (a list in JSON), a call goes before each. (A tracer, such as coverage's,
makes all of Python half as fast.)
"""
import ast
import json
import os
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path

import gpu_lines
import torch

WATCHED = json.loads(os.environ["WATCHED_FILES"])
compiled = SourceFileLoader.get_code


@torch.compiler.assume_constant_result      # the compiler runs it as it reads the code
@cache
def ran(path, line):
    with open(os.environ["LINES_RUN"], "a") as file:
        file.write(f"{path}:{line}\n")
    return True


class Noting(ast.NodeTransformer):
    def __init__(self, path, tree):
        self.path, self.watched = path, set(gpu_lines.gpu_nodes(tree.body))

    def visit(self, node):
        node = super().visit(node)
        if node not in self.watched:
            return node
        call = ast.parse(f"__import__('lines_run').ran({self.path!r}, {node.lineno})").body[0]
        return [call, node] if isinstance(node, ast.stmt) else ast.BoolOp(ast.And(), [call.value, node])


def get_code(self, name):
    if self.path not in WATCHED:
        return compiled(self, name)
    tree = ast.parse(Path(self.path).read_text(encoding="utf-8"))
    return compile(ast.fix_missing_locations(Noting(self.path, tree).visit(tree)), self.path, "exec")


SourceFileLoader.get_code = get_code
