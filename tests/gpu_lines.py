"""Which statements run only where there is a GPU? Used by test_gpu_rehearsal.py: has each of them run?"""
import ast
import re

NAME, CUDA = re.compile("cuda|gpu|cudnn|nccl", re.IGNORECASE), re.compile(r"(cuda|cpu:gloo,cuda)(:.*)?")


def gpu_statements(source):
    """-> {(first line, last line): text} of the statements that only a machine with a GPU runs: see gpu_nodes."""
    return {(node.lineno, node.end_lineno): ast.unparse(node) for node in gpu_nodes(ast.parse(source).body)}


def gpu_nodes(block, only_gpu=False):
    """Yield, of a block of statements, the simple statements and conditions that name a GPU, and of all that stand
    where only a machine with one comes: in `if cuda`, after `if device == "cpu": return`, in a function `on_gpu`.

    Where there is a GPU, a statement that names one takes its branch of `a if cuda else b`: it is enough that it ran.
    """
    for statement in block:
        if isinstance(statement, ast.If):
            where, otherwise = sides(statement.test)
            yield from one(statement.test, only_gpu)
            yield from gpu_nodes(statement.body, only_gpu or where == "gpu")
            yield from gpu_nodes(statement.orelse, only_gpu or otherwise == "gpu")
            only_gpu = only_gpu or (otherwise == "gpu" and isinstance(statement.body[-1], ast.Return | ast.Raise))
        elif hasattr(statement, "body"):
            inside = only_gpu or bool(NAME.search(getattr(statement, "name", "")))
            for name in ("body", "orelse", "finalbody"):
                yield from gpu_nodes(getattr(statement, name, []), inside)
            for handler in getattr(statement, "handlers", []):
                yield from gpu_nodes(handler.body, inside)
        else:
            yield from one(statement, only_gpu)


def one(node, only_gpu):
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if (only_gpu or names_gpu(node)) and not docstring:
        yield node


def sides(test):
    """-> where a condition is true, and where it is false: "gpu", "cpu", or None for either."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return next(filter(None, (sides(value)[0] for value in test.values)), None), None
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return sides(test.operand)[::-1]
    if not names_gpu(test):
        return None, None
    differs = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.NotEq)
    return ("cpu", "gpu") if names_cpu(test) != differs else ("gpu", "cpu")


def names_gpu(node):
    """cuda in a name or as a text; or the CPU compared with, as in device != "cpu"."""
    return any(NAME.search(" ".join(str(getattr(part, name, "")) for name in ("id", "attr", "arg")))
               or (isinstance(part, ast.Constant) and CUDA.fullmatch(str(part.value)))
               or (isinstance(part, ast.Compare) and names_cpu(part)) for part in ast.walk(node))


def names_cpu(node):
    return any(isinstance(part, ast.Constant) and part.value == "cpu" for part in ast.walk(node))
