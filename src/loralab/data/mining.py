"""Functions and docstrings out of Python source, the split by file, and how a copy of a function is known."""

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = {"test", "tests", "testing", "idle_test", "_tests"}
NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
SKIPPED_FOLDERS = TESTS | NOT_SOURCE | {"pydoc_data", "encodings"}  # the last two are tables
COMMENTS_AND_SPACE = re.compile(r"#[^\n]*|\s+")


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a file; ``code`` is dedented and without its docstring."""

    name: str
    code: str
    docstring: str  # "" where there is none
    line: int
    statements: int  # of the body, without the docstring
    docstring_lines: tuple[int, int]  # 1-based, inclusive; (0, 0) where there is none

    @property
    def key(self) -> bytes:
        """What the function does: equal for copies, however documented."""
        return function_key(self.code)

    @property
    def summary(self) -> str:
        return self.docstring.split("\n", 1)[0].strip()

    @property
    def answer_key(self) -> bytes:
        """Name and summary: equal for edited copies, whose docstring would give the held-out one away."""
        return function_key(f"{self.name}:{self.summary}")


def stdlib_root() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(relative_path: str) -> str:
    """train, validation or test by the hash of a file's path: all functions of a file fall on one side."""
    bucket = int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def python_files(root: Path) -> list[Path]:
    """Python files below ``root``, sorted, without tests, code pages and generated build data."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        python = [name for name in names if name.endswith(".py")]
        paths += [Path(folder, name) for name in python if not name.startswith(("_sysconfigdata", "test_"))]
    return sorted(paths)


def read_source(path: Path) -> str | None:
    """A file's text with plain newlines, or None where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def functions(source: str) -> Iterator[Function]:
    """Every function and method, nested ones too. Nothing from a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    # as the parser counts: a form feed or \x85 ends no line
    lines = source.split("\n")
    queue: deque[ast.AST] = deque([tree])
    while queue:
        node = queue.popleft()
        # expressions hold no functions with docstrings: three quarters of the tree need no visit
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            children = getattr(node, block, None)
            queue.extend(children if isinstance(children, list) else [])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _function(node, lines)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function:
    docstring = ast.get_docstring(node) or ""
    start, end = node.lineno, node.end_lineno or node.lineno
    numbers = list(range(start, end + 1))
    cut = (0, 0)
    first = node.body[0]
    if docstring and first.lineno > start and _alone(first, lines):
        cut = (first.lineno, first.end_lineno or first.lineno)
        numbers = [number for number in numbers if not cut[0] <= number <= cut[1]]
    code = "\n".join(lines[number - 1][_indent(lines[number - 1], node.col_offset) :] for number in numbers)
    if cut == (0, 0):
        docstring = ""
    return Function(node.name, code.rstrip(), docstring, start, len(node.body) - bool(docstring), cut)


def _alone(statement: ast.stmt, lines: list[str]) -> bool:
    """Whether the lines of a statement hold nothing else, so that they can be cut out."""
    before = lines[statement.lineno - 1].encode()[: statement.col_offset].strip()
    after = lines[(statement.end_lineno or 1) - 1].encode()[statement.end_col_offset :].strip()
    return not before and (not after or after.startswith(b"#"))


def _indent(line: str, width: int) -> int:
    """How much of the function's own indentation this line has (text in a string may have less)."""
    return min(width, len(line) - len(line.lstrip(" \t")))


def function_key(code: str) -> bytes:
    """8 bytes of sha256 over the code without comments and space: the same for reformatted copies."""
    return hashlib.sha256(COMMENTS_AND_SPACE.sub("", code).encode()).digest()[:8]
